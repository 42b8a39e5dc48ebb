"""Weights quantized: by what settings, on what text, layer by layer."""
