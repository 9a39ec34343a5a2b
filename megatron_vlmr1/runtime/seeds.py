"""Random generators of a rank."""

from __future__ import annotations

import torch


def seed_everything(seed: int) -> None:
    """Seed torch's and megatron-core's generators. Sampling and the data order don't use them: they are pure."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
