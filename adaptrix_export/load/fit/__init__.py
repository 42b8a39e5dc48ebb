"""Whether adapters fit their base, and what is adjusted so that they do."""
