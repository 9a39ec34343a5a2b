"""The plan's numbers of kernels against the operators that this program really calls."""

from __future__ import annotations

import numpy as np
import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vlmr1.data.packing import PackedGroup, model_input, pack
from megatron_vlmr1.grpo.update import label_tensors
from megatron_vlmr1.plan import layers, rollout_time
from megatron_vlmr1.rollout.engine import Engine
from megatron_vlmr1.rollout.sampling import Sampling
from tests.checkpoints import mixed_prompts, write_random_checkpoint
from tests.distributed import ranks, work

VIEWS = {"view", "transpose", "t", "slice", "select", "unsqueeze", "squeeze", "expand", "permute", "split", "unbind"}
VIEWS |= {"detach", "alias", "_unsafe_view", "as_strided", "split_with_sizes", "unflatten", "chunk", "_reshape_alias"}


class Count(TorchDispatchMode):
    """Counts operators that compute or copy."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += function.__name__.split(".")[0] not in VIEWS
        return function(*args, **(kwargs or {}))


def counted(directory, depth: int, num_layers: int, mesh) -> np.ndarray:
    """Operators of a forward pass, its backward pass, and of a tick."""
    vision = {"depth": depth, "fullatt_block_indexes": [1]}
    policy = work.load_policy(write_random_checkpoint(directory, vision=vision, num_hidden_layers=num_layers), mesh)
    completions = tuple(np.full(17, 7 + i) for i in range(4))
    group = PackedGroup(mixed_prompts(directory)[3], completions, tuple(range(4)))
    batch = pack([group], policy.shape.image_token_id, 1)
    with Count() as count:
        hidden = policy.model(model_input(batch, policy))
        forward = count.n
        logprobs, _ = policy.logprobs(hidden, *label_tensors(batch))
        before = count.n
        logprobs.sum().backward()
        backward = count.n - before
    ticks = []
    for tokens in (4, 12):
        sampling = Sampling(max_new_tokens=tokens, stop_ids=frozenset({511}), seed=1)
        with Count() as count:
            Engine(policy, lambda ids: "", 10_000).generate(mixed_prompts(directory)[:1], 4, sampling)
        ticks.append(count.n)
    return np.array([forward, backward, (ticks[1] - ticks[0]) / 8])


def test_kernels_of_layers_blocks_and_ticks(tmp_path):
    with ranks.alone() as mesh:
        base = counted(tmp_path / "a", 2, 2, mesh)
        layer = (counted(tmp_path / "b", 2, 4, mesh) - base) / 2
        block = (counted(tmp_path / "c", 4, 2, mesh) - base) / 2
    assert layer[0] == pytest.approx(layers.LAYER_KERNELS["forward"], rel=0.1)
    assert layer[1] == pytest.approx(layers.LAYER_KERNELS["backward"], rel=0.1)
    assert layer[2] == pytest.approx(rollout_time.LAYER_KERNELS, rel=0.1)
    assert base[2] - 2 * layer[2] == pytest.approx(rollout_time.SAMPLING_KERNELS, rel=0.1)
    assert block[0] == pytest.approx(layers.BLOCK_KERNELS, rel=0.1)
    assert block[1] == pytest.approx(2 * layers.BLOCK_KERNELS, rel=0.2)
