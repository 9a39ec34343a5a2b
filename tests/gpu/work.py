"""What the tests on a GPU have in common: models, passes over packed groups, and how far two of them are apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from megatron_vlmr1.checkpoint import weights
from megatron_vlmr1.data.packing import PackedGroup, model_input, pack
from megatron_vlmr1.grpo.update import label_tensors
from megatron_vlmr1.models.families import read_shape
from megatron_vlmr1.models.policy import Policy
from megatron_vlmr1.models.specs import Layers
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.types import Completion, Prompt
from tests.checkpoints import PLAIN_IDS, banned_ids, mixed_prompts

BF16, FP32 = torch.bfloat16, torch.float32
MULTIPLE = 16  # tokens of a pack, for FP8
# Of an operand's rounding: bf16 keeps 8 binary digits of a number, e4m3 4; twice that for what adds up.
FP8_BY_BF16 = 2 * 2.0**4


def policy(directory: Path, mesh: Mesh, dtype: torch.dtype, layers: Layers | None = None) -> Policy:
    """Build the model of `directory` on the device."""
    out = Policy(read_shape(directory), mesh, dtype, banned_ids(directory), layers=layers)
    weights.load(out.chunks, weights.HfWeights(directory))
    return out


class Passes(NamedTuple):
    """What a forward and a backward pass came to, on the host in fp32."""

    logprobs: torch.Tensor  # [labels]
    gradients: dict[str, torch.Tensor]  # by the name that both layer specs have


def drawn(directory: Path) -> list[PackedGroup]:
    """Return prompts with and without images, each with three completions of drawn tokens, none of them banned."""
    rng, allowed = np.random.default_rng(5), np.setdiff1d(np.arange(PLAIN_IDS), banned_ids(directory))
    return [
        PackedGroup(prompt, tuple(rng.choice(allowed, n) for n in (9, 4, 17)), (3 * i, 3 * i + 1, 3 * i + 2))
        for i, prompt in enumerate(mixed_prompts(directory))
    ]


def passes(of: Policy, groups: Sequence[PackedGroup]) -> Passes:
    """Run one pack forward and backward, by a loss that weighs each log-prob by a drawn number."""
    batch = pack(groups, of.shape.image_token_id, MULTIPLE)
    of.model.zero_grad()
    values, _ = of.logprobs(of.model(model_input(batch, of)), *label_tensors(batch))
    upstream = torch.randn(len(values), generator=torch.Generator().manual_seed(1))
    (values * upstream.to(values.device)).sum().backward()
    named = {part.name: part.parameter.grad for part in weights.parameter_pieces(of.model)}
    assert all(gradient is not None for gradient in named.values())
    return Passes(values.detach().float().cpu(), {name: g.float().cpu() for name, g in named.items() if g is not None})


@torch.no_grad()
def trained_logprobs(of: Policy, prompts: Sequence[Prompt], rows: Sequence[tuple[Completion, ...]]) -> torch.Tensor:
    """Return what training's forward pass says of all completions, one after another, on the host."""
    slots = iter(range(sum(map(len, rows))))
    groups = [
        PackedGroup(prompt, tuple(c.token_ids for c in row), tuple(next(slots) for _ in row))
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    batch = pack(groups, of.shape.image_token_id, MULTIPLE)
    values, _ = of.logprobs(of.model(model_input(batch, of)), *label_tensors(batch))
    return values.float().cpu()


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the mean absolute difference."""
    return float((a - b).abs().mean())


def worst_gradient(a: Passes, b: Passes) -> float:
    """Return the largest relative difference of a parameter's gradients, |a - b| / |b| in the Euclidean norm."""
    assert a.gradients.keys() == b.gradients.keys()
    return max(float((a.gradients[name] - g).norm() / g.norm()) for name, g in b.gradients.items())


def alignment(a: Passes, b: Passes) -> float:
    """Return the cosine between all gradients of one and of the other."""
    x, y = (torch.cat([p.gradients[name].reshape(-1).double() for name in sorted(p.gradients)]) for p in (a, b))
    return float(x @ y / (x.norm() * y.norm()))
