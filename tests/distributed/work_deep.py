"""What four ranks do with a model of eight layers: uneven and virtual stages, with parts of it computed again."""

from __future__ import annotations

from pathlib import Path

from megatron_vlmr1.config import RecomputeConfig
from tests.checkpoints import mixed_prompts
from tests.distributed import work, work_pair
from tests.distributed.ranks import layout

LAYOUTS = {
    "tp2_pp2_vp2": RecomputeConfig(granularity="full", tower=True),
    "pp4_vp2": RecomputeConfig(granularity="selective", modules=["core_attn", "mlp"]),
    "dp2_pp2": RecomputeConfig(granularity="full", method="block", num_layers=2),
}


def everything(root: Path) -> None:
    """Weights, logits, gradients on each layout; the training state of one of them, and on another."""
    groups = work.replayed_groups(root / "untied", root / "one" / "sampled_0.json")
    for name, recompute in LAYOUTS.items():
        with layout(name) as mesh:
            out = root / name
            out.mkdir(exist_ok=True)
            policy = work.load_policy(root / "untied", mesh, banned=[])
            work.logits(policy, mixed_prompts(root / "untied"), out / "logits.safetensors")
            work.write_weights(policy, root / "untied", out / "again")
            work.gradient_checks(root, out, "untied", mesh, groups, recompute)
    with layout("tp2_pp2_vp2") as mesh:
        work_pair.save_and_restore(root, "tp2_pp2_vp2", root / "untied", mesh)
    with layout("dp2_pp2") as mesh:
        work_pair.other_layout(root, root / "state_tp2_pp2_vp2", root / "untied", mesh)
