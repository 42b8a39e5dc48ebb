"""Reports and findings for people."""
