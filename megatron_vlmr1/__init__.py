"""R1-style reinforcement learning for vision-language models on megatron-core."""

__version__ = "0.1.0"
