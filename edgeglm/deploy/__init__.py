"""Bundles onto devices over SSH: by digest, in two slots, one switch, and back again by itself."""
