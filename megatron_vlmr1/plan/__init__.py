"""What a step costs, before it runs."""
