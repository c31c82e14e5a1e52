"""A bundle behind HTTP and gRPC: the Open Inference Protocol, embeddings, search, operation."""
