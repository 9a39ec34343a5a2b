"""Moments in fewer bytes: steps, checkpoints, checks, plans; with a stand-in for Transformer Engine's Adam.

`tests/gpu/test_gpu_moments.py` runs the same with the real one.
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from megatron_vlmr1 import config
from megatron_vlmr1.checkpoint import state, weights
from megatron_vlmr1.errors import RunStopped
from megatron_vlmr1.models.specs import layers
from megatron_vlmr1.parallel import optimizer as parallel_optimizer
from megatron_vlmr1.parallel.offload import Offload
from megatron_vlmr1.parallel.replicas import Replicas
from megatron_vlmr1.plan.memory import rank_memory
from megatron_vlmr1.plan.shapes import read_plan_shape
from megatron_vlmr1.runtime import device
from megatron_vlmr1.train.check import check_machine
from tests import te_adam
from tests.checkpoints import write_random_checkpoint
from tests.distributed import work

SMALLER = ("bf16", "fp8")
ERRORS = {"fp32": (0.0, 0.0), "bf16": (2**-8, 2**-11), "fp8": (2**-4, 2**-11)}  # relative, of both moments
FLOORS = {"fp32": (0.0, 0.0), "bf16": (0.0, 2**-38), "fp8": (2**-18, 2**-38)}  # of a tensor's largest


def settings(dtype: str = "fp32", **sections):
    raw = {"model": {"path": "-"}, "data": {"train": "-"}, "optimizer": {"lr": 1e-3, "moments_dtype": dtype}}
    return config.parse(raw | sections, "test")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("moments") / "model", num_hidden_layers=2)


def built(directory, mesh, dtype: str = "fp32"):
    policy = work.load_policy(directory, mesh, dtype=torch.bfloat16)
    return policy, parallel_optimizer.build(settings(dtype).optimizer, policy.wrap_for_training())


def step(policy, optimizer, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for part in sorted(weights.parameter_pieces(policy.model), key=lambda part: part.name):
        part.parameter.main_grad.copy_(torch.randn(part.parameter.shape, generator=generator))
    optimizer.step()


def kept(policy, optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """Masters and moments in fp32, by parameter."""
    (inner,) = optimizer.chained_optimizers
    names = {id(part.parameter): part.name for part in weights.parameter_pieces(policy.model)}
    out = {}
    for parameter, _ in parallel_optimizer.states(optimizer):
        tensors = inner._get_main_param_and_optimizer_states(parameter)
        out[names[id(parameter)]] = {k: t.detach().clone() for k, t in tensors.items() if t.dim()}
    return out


def assert_near(found, expected, dtype: str) -> None:
    """Masters are the same bit for bit, moments as near as their types have digits."""
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        assert torch.equal(found[name]["param"], tensors["param"]), name
        for kind, error, floor in zip(("exp_avg", "exp_avg_sq"), ERRORS[dtype], FLOORS[dtype], strict=True):
            bound = error * tensors[kind].abs() + floor * tensors[kind].abs().max() + 2e-30 * (error > 0)
            assert ((found[name][kind] - tensors[kind]).abs() <= bound * (1 + 1e-5)).all(), (name, kind)


@pytest.mark.parametrize("dtype", SMALLER)
def test_steps(monkeypatch, mesh, directory, dtype):
    """The first is that of torch's Adam, from which later ones differ by the moments' digits."""
    ours = built(directory, mesh)
    te_adam.install(monkeypatch)
    theirs = built(directory, mesh, dtype)
    assert [parallel_optimizer.adam(optimizer) for _, optimizer in (ours, theirs)] in (
        ["torch", "tests"],
        ["transformer_engine", "transformer_engine"],
    )
    step(*ours), step(*theirs)
    expected, found = kept(*ours), kept(*theirs)
    for part in weights.parameter_pieces(theirs[0].model):
        assert torch.equal(part.parameter.flatten(), found[part.name]["param"].bfloat16())
    for name in expected:
        torch.testing.assert_close(found[name]["param"], expected[name]["param"], rtol=1e-6, atol=1e-8)
        expected[name]["param"] = found[name]["param"]
    assert_near(found, expected, dtype)
    before = {name: tensors["param"] for name, tensors in kept(*ours).items()}
    step(*ours, seed=2), step(*theirs, seed=2)
    moved = {name: tensors["param"] - before[name] for name, tensors in kept(*ours).items()}
    off = {name: tensors["param"] - kept(*ours)[name]["param"] for name, tensors in kept(*theirs).items()}
    total = torch.cat(list(off.values())).norm() / torch.cat(list(moved.values())).norm()
    assert 0 < total < {"bf16": 0.01, "fp8": 0.1}[dtype]


@pytest.mark.parametrize("dtype", SMALLER)
def test_a_parameter_without_gradients_stays(monkeypatch, mesh, directory, tmp_path, dtype):
    """In steps, and through a save and a load: a tensor of zeros has no largest number to scale by."""
    te_adam.install(monkeypatch)
    policy, optimizer = built(directory, mesh, dtype)
    before = [p.detach().clone() for p in policy.parameters()]
    for _ in range(2):
        for parameter in policy.parameters():
            parameter.main_grad.zero_()
        optimizer.step()
    state.save(policy, optimizer, {}, tmp_path, "dp_reshardable")
    other = built(directory, mesh, dtype)
    state.load(*other, tmp_path)
    for parameter in other[0].parameters():
        parameter.main_grad.zero_()
    other[1].step()
    assert all(torch.equal(a, b) for a, b in zip(before, other[0].parameters(), strict=True))


@pytest.mark.parametrize("kind", state.FORMATS)
@pytest.mark.parametrize(("before", "after"), [("fp32", "bf16"), ("bf16", "fp8"), ("fp8", "fp32"), ("fp8", "fp8")])
def test_a_run_goes_on_with_other_moments(monkeypatch, mesh, directory, tmp_path, before, after, kind):
    """Of torch's Adam too, where it is fp32; saved before a first step as well."""
    te_adam.install(monkeypatch)
    one = built(directory, mesh, before)
    for steps in range(2):
        if steps:
            step(*one)
        saved = tmp_path / str(steps)
        saved.mkdir()
        state.save(*one, {}, saved, kind)
        other = built(directory, mesh, after)
        state.load(*other, saved)
        assert_near(kept(*other), kept(*one), after)


@pytest.mark.parametrize("dtype", SMALLER)
def test_offloading_keeps_the_bits(monkeypatch, mesh, directory, dtype):
    te_adam.install(monkeypatch)
    policy, optimizer = built(directory, mesh, dtype)
    step(policy, optimizer)
    expected, weights_before = kept(policy, optimizer), [p.detach().clone() for p in policy.parameters()]
    tensors = [
        t
        for _, part in parallel_optimizer.states(optimizer)
        for k, t in part.items()
        if k != "master" or t.dtype is torch.float32
    ]
    held = sum(t.nbytes for t in tensors)
    offload = Offload(policy.ddp, optimizer, "always")
    offload.before_generation()
    assert offload.host_bytes == held == sum(t.nbytes for t in tensors)
    assert all(t.untyped_storage().nbytes() == 0 for t in tensors)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), weights_before, strict=True))
    offload.before_backward()
    offload.before_step()
    assert_near(kept(policy, optimizer), expected, "fp32")
    step(policy, optimizer, seed=2)


@pytest.mark.parametrize("dtype", SMALLER)
@pytest.mark.parametrize("kind", ["master", "exp_avg", "exp_avg_sq"])
def test_a_flipped_bit_is_found(monkeypatch, mesh, directory, dtype, kind):
    te_adam.install(monkeypatch)
    policy, optimizer = built(directory, mesh, dtype)
    checked = Replicas(policy.chunks, optimizer, mesh, 1)
    checked.remember()
    checked.check(state=True)
    step(policy, optimizer)
    checked.remember()
    checked.check(state=True)
    _, part = list(parallel_optimizer.states(optimizer))[3]
    part[kind].view(torch.uint8)[5] ^= 1
    named = "the fp32 master" if kind == "master" else kind
    with pytest.raises(RunStopped, match=f"{named} of .* is not what the last step left there"):
        checked.check(state=True)


@pytest.mark.parametrize("dtype", SMALLER)
def test_the_plan_counts_what_is_held(monkeypatch, mesh, directory, dtype):
    te_adam.install(monkeypatch)
    shape = read_plan_shape(str(directory))
    (smaller,), (whole,) = (rank_memory(settings(each), shape, 1, "cuda") for each in (dtype, "fp32"))
    policy, optimizer = built(directory, mesh, dtype)
    buffer = sum(b.param_data.numel() for chunk in policy.ddp for b in chunk.buffers)
    parameters = sum(p.numel() for p in policy.parameters())
    held = sum(t.nbytes for _, part in parallel_optimizer.states(optimizer) for t in part.values())
    each = {"bf16": 4 + 4, "fp8": 4 + 3}[dtype]
    assert held == each * parameters
    assert smaller.phases["update"]["optimizer"] == each * buffer
    assert whole.phases["update"]["optimizer"] == 12 * buffer
    assert smaller.phases["save"]["saved moments"] == 8 * buffer and "saved moments" not in whole.phases["save"]
    offloaded = {"optimizer": {"moments_dtype": dtype, "offload": "rollout"}}
    (away,) = rank_memory(settings(**offloaded), shape, 1, "cuda")
    assert away.host["offloaded optimizer"] == each * buffer
    assert smaller.peak("rollout") - away.peak("rollout") == (each + 4) * buffer


@pytest.mark.parametrize(
    ("optimizer", "says"),
    [
        (
            {"moments_dtype": "fp8", "beta1": 0.95},
            "moments_dtype=fp8 with beta1=0.95: .* lost in 4 .*; beta1 may be 0.9375",
        ),
        (
            {"moments_dtype": "bf16", "beta2": 0.9999},
            "moments_dtype=bf16 with beta2=0.9999: .* beta2 may be 0.999512 at m",
        ),
        ({"moments_dtype": "fp16"}, "optimizer.moments_dtype: Input should be 'fp32', 'bf16' or 'fp8'"),
    ],
)
def test_what_does_not_go_together(optimizer, says):
    with pytest.raises(ValueError, match=says):
        settings(optimizer=optimizer)
    with pytest.raises(ValueError, match="optimizer.moments_dtype=fp8 needs precision.dtype=bf16"):
        settings("fp8", precision="fp32")


@pytest.mark.parametrize(("dtype", "largest"), [(torch.bfloat16, 1 - 2**-8), (torch.float16, 1 - 2**-11)])
def test_what_a_type_can_let_decay(dtype, largest):
    """Any number moves at the largest beta that is allowed; a little above, some stay for ever."""
    numbers = torch.arange(0x3C00, 0x4000, dtype=torch.int16).view(torch.float16).to(dtype).float().unique()
    assert ((numbers * largest).to(dtype).float() < numbers).all()
    assert ((numbers * (1 - (1 - largest) / 4)).to(dtype).float() == numbers).any()


def test_a_machine_without_it(monkeypatch):
    for found, cuda, says in (
        (None, True, "^optimizer.moments_dtype=bf16 needs Transformer Engine, which is not installed: .*cuda"),
        (
            SimpleNamespace(),
            False,
            "^optimizer.moments_dtype=bf16: Transformer Engine needs a GPU, and this rank has no",
        ),
    ):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=found: found)
        monkeypatch.setattr(device, "has_cuda", lambda cuda=cuda: cuda)
        with pytest.raises(ValueError, match=says):
            layers(settings("bf16"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install"):
        check_machine(settings("fp8"))
    check_machine(settings())
