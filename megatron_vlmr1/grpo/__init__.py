"""Advantages, losses and the policy update."""
