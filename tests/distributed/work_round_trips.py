"""What ranks do in tests of round trips: through each of many layouts, load a directory and save it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megatron_vlmr1.config import ParallelConfig
from megatron_vlmr1.models.policy import Policy
from tests.distributed import work
from tests.distributed.ranks import layout


def everything(root: Path, layouts: dict[str, dict[str, Any]], also_bf16: list[str]) -> None:
    """Write ``root/again/layout/checkpoint``, the checkpoint in bf16 on some layouts; and what each rank held."""
    for name, settings in layouts.items():
        with layout(ParallelConfig(**settings)) as mesh:
            for which in ("untied", "tied", *(["bf16"] if name in also_bf16 else [])):
                dtype = torch.bfloat16 if which == "bf16" else torch.float32
                policy = work.load_policy(root / which, mesh, banned=[], dtype=dtype)
                work.write_weights(policy, root / which, root / "again" / name / which)
            (root / f"held_{name}_{mesh.rank}.json").write_text(json.dumps(_held(policy)))


def _held(policy: Policy) -> dict[str, Any]:
    """Return this rank's place, the layers of each of its chunks, and the rows of a layer's first feed-forward."""
    layers = [list(chunk.language.decoder.layers) for chunk in policy.chunks]
    return {
        "tp_rank": policy.mesh.tp_rank,
        "pp_rank": policy.mesh.pp_rank,
        "copies": policy.mesh.dp_size,
        "layers": [[layer.layer_number - 1 for layer in chunk] for chunk in layers],
        "rows": len(layers[0][0].mlp.linear_fc1.weight),
    }
