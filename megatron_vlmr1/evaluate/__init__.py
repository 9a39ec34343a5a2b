"""Same rollout and rewards as training, no update."""
