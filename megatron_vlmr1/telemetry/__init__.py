"""Metrics, timers, FLOPs, device readings, sample pages."""
