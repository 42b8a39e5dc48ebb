"""Files of tensors, read by header."""
