"""What draws a graph."""
