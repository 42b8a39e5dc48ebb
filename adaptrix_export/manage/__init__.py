"""What is done with published artifacts and with inputs, beside building."""
