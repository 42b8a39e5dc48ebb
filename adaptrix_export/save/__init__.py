"""Files out: hashed while written, staged, published whole."""
