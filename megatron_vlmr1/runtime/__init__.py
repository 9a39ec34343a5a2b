"""Devices, process groups' start and end, signals, seeds."""
