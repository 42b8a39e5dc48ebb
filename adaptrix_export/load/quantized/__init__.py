"""Bases that store weights otherwise than as floats."""
