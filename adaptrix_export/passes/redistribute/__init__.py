"""An adapter moved onto a few layers."""
