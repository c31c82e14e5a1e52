"""Bundles onto devices over SSH: by digest, in slots of its own, one switch, and back again by itself."""
