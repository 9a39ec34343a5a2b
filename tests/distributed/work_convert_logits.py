"""What four ranks do with a converted checkpoint: the logits of real prompts on each layout, in fp32 and in bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_vlmr1.config import ParallelConfig
from tests.checkpoints import real_prompts
from tests.distributed import work
from tests.distributed.ranks import layout


def everything(root: Path, layouts: dict[str, dict[str, Any]]) -> None:
    """Write ``root/dtype_layout.safetensors``: logits by the positions of the prompts."""
    prompts = list(real_prompts(root / "model").values())
    for name, settings in layouts.items():
        with layout(ParallelConfig(**settings)) as mesh:
            for dtype in ("float32", "bfloat16"):
                policy = work.load_policy(root / "model", mesh, banned=[], dtype=getattr(torch, dtype))
                work.logits(policy, prompts, root / f"{dtype}_{name}.safetensors")
