"""Metrics, parity and gates: how good a pair of towers is, and whether that is good enough."""
