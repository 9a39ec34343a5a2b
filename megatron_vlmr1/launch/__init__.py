"""Start ranks on this machine."""
