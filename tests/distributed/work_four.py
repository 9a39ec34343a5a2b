"""What four ranks do in tests: load a directory on a layout, and save it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megatron_vlmr1.models.policy import Policy
from tests.checkpoints import mixed_prompts
from tests.distributed import work
from tests.distributed.ranks import layout

LAYOUTS = ("tp2_pp2", "tp2", "pp2", "tp4", "pp4")
CHECKPOINTS = ("untied", "tied", "odd_vocabulary", "odd_width", "one_kv_head", "bf16")


def round_trips(root: Path) -> None:
    """Write each checkpoint again, through each layout; and some logits."""
    for name in LAYOUTS:
        with layout(name) as mesh:
            for which in CHECKPOINTS:
                dtype = torch.bfloat16 if which == "bf16" else torch.float32
                policy = work.load_policy(root / which, mesh, banned=[], dtype=dtype)
                if which in ("tied", "odd_vocabulary", "odd_width", "one_kv_head"):
                    work.logits(policy, mixed_prompts(root / which), root / f"logits_{name}_{which}.safetensors")
                work.write_weights(policy, root / which, root / f"again_{name}" / which)
                if which == "odd_vocabulary":
                    (root / f"padding_{name}_{mesh.rank}.json").write_text(json.dumps(_padding(policy)))
            if name == "tp2_pp2":
                policy = work.load_policy(root / "fp32", mesh, dtype=torch.bfloat16)
                work.write_weights(policy, root / "fp32", root / "again_as_bf16")


def _padding(policy: Policy) -> dict[str, Any]:
    """Count the rows of this rank's embedding and output layer, and add up what is in the padding of the last rank."""
    mesh = policy.mesh
    weights = [policy.chunks[-1].output_weight()] if mesh.is_last_stage else []
    weights += [policy.chunks[0].language.embedding.word_embeddings.weight] if mesh.is_first_stage else []
    last = mesh.tp_rank + 1 == mesh.tp_size
    rows = -policy.shape.text.vocab_size % mesh.tp_size if last else 0
    return {"rows": [len(w) for w in weights], "padding": [float(w[len(w) - rows :].abs().sum()) for w in weights]}
