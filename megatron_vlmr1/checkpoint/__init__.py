"""Publish, verify and resume; Hugging Face tensors and ranks' slices."""
