"""torch -> ONNX, ONNX -> ONNX passes, and what an ONNX file holds."""

# The folder lies at the top of the checkout, so a bare ``import export`` would find it too and
# every class would exist twice.
if __name__ != "edgeglm.export":
    raise ImportError(f"imported as {__name__!r}; import edgeglm.export")
