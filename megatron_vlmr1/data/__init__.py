"""WebDataset shards to prompts."""
