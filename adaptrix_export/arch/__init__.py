"""What is known of model types and tasks."""
