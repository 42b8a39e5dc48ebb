"""Figures about adapters and plans, measured on text."""
