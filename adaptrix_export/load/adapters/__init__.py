"""Adapter formats, a module each."""
