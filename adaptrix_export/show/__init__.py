"""What an artifact is and how it was proved, as a page, as a table, and as a card for the hub."""
