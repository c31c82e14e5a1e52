"""edgeglm: take a pretrained teacher to a verified bundle on an edge device."""

__version__ = "0.1.0"
