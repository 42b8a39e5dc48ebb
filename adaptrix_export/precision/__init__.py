"""Number formats of weights: one row a format, the quantizers, and the pass over a graph."""
