"""What other people's tools make of our artifacts: `make clients`, see `tests/tools/clients.py`."""
