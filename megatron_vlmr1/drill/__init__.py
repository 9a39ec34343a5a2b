"""The fault matrix: runs of the real program in which one thing goes wrong, and what must be true of them."""
