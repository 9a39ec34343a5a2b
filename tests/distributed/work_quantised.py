"""What ranks do in tests of generation in FP8: one prompt through the layers, and completions."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_vlmr1.models.attention import AttentionPlan
from megatron_vlmr1.models.segments import Segment
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.rollout.engine import Engine
from megatron_vlmr1.rollout.forward import Forward
from megatron_vlmr1.rollout.quantised import QuantisedWeights
from megatron_vlmr1.rollout.sampling import Sampling
from tests.checkpoints import mixed_prompts
from tests.distributed import work
from tests.distributed.ranks import layout

TOKENS = torch.arange(7, 47)


class Plain:
    """Causal attention over one text, without a cache."""

    def __init__(self) -> None:
        self._plan = AttentionPlan([Segment(0, len(TOKENS))])

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """See `rollout.forward.FusedAttend`."""
        return self._plan.attend(layer, qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2], qkv[:, :, -1])


def hidden_states(root: Path, name: str, mesh: Mesh) -> None:
    """Write the last hidden states, and a layer's copies, of the weights as they are and in FP8."""
    policy = work.load_policy(root / "untied", mesh)
    weights = QuantisedWeights(policy)
    out = {}
    with torch.inference_mode():
        for kind, quantised in (("exact", None), ("fp8", weights)):
            forward = Forward(policy, len(TOKENS), quantised)
            rotation = forward.rotation(torch.arange(len(TOKENS)).expand(3, -1))
            out[kind] = forward.run(0, forward.embed(TOKENS), rotation, Plain())
        for field, weight in weights.refresh()[0][0]._asdict().items():
            out[f"{field} values"], out[f"{field} scales"] = weight.values.float(), weight.scales
    save_file({key: value.clone() for key, value in out.items()}, root / f"fp8_{name}_{mesh.rank}.safetensors")


def completions(root: Path, name: str, mesh: Mesh) -> None:
    """Generate in FP8, and write it."""
    prompts = mixed_prompts(root / "untied")
    engine = Engine(work.load_policy(root / "untied", mesh), str, 10_000, quantization="fp8")
    rows = engine.generate(prompts, work.GENERATIONS, Sampling(work.MAX_NEW_TOKENS, work.STOPS, seed=3))
    if mesh.rank == 0:
        work.write_completions(root / f"fp8_{name}.json", prompts, rows)


def everything(root: Path) -> None:
    """On two tensor-parallel ranks, and on two stages of two virtual ones each."""
    with layout("tp2") as mesh:
        hidden_states(root, "tp2", mesh)
    with layout("pp2_vp2") as mesh:
        completions(root, "stages", mesh)
