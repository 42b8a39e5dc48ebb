"""A front end tried on a small replica."""
