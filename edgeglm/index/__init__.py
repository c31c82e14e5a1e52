"""Vectors of pictures on disk, searched by cosine: durable, incremental, bound to one embedding space."""
