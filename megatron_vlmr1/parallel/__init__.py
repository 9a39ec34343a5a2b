"""Process groups, optimizer and schedule."""
