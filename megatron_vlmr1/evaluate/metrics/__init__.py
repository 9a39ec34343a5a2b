"""Figures over the rows of a split: pure functions with intervals. Nothing here knows a model or a rank."""
