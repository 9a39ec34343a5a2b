"""Generation on the training weights."""
