"""Vision-language models on megatron-core."""
