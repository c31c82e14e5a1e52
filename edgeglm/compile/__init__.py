"""From ONNX to what a device executes: the builder, the plan of who builds where, and the stage."""
