"""Generation in FP8 against numbers of e4m3 from their definition, plain sums, and transformers' own model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from megatron_vlmr1 import config
from megatron_vlmr1.config import ParallelConfig
from megatron_vlmr1.models import fp8
from megatron_vlmr1.models.families import read_shape
from megatron_vlmr1.plan.generation import Generation
from megatron_vlmr1.plan.load import Load
from megatron_vlmr1.plan.memory import rank_memory
from megatron_vlmr1.plan.shapes import read_plan_shape
from megatron_vlmr1.rollout import quantised
from megatron_vlmr1.rollout.decoding_copy import CopyEngine
from megatron_vlmr1.rollout.engine import Engine
from megatron_vlmr1.rollout.sampling import Sampling
from megatron_vlmr1.runtime import device
from tests import recipes
from tests.checkpoints import banned_ids, mixed_prompts, plain_model, write_random_checkpoint
from tests.distributed import plain, work
from tests.distributed.plain import within


def e4m3_numbers() -> np.ndarray:
    """All that are not negative, from the definition (arXiv 2209.05433): 4 bits of exponent, bias 7, 3 of mantissa."""
    exponent, mantissa = np.divmod(np.arange(127), 8)  # 127 is not a number
    normal = 2.0 ** (exponent - 7) * (1 + mantissa / 8)
    return np.where(exponent == 0, 2.0**-6 * mantissa / 8, normal)


def nearest(x: np.ndarray) -> np.ndarray:
    """The nearest numbers of e4m3, of two equally near ones the even."""
    table = e4m3_numbers()
    above = np.clip(np.searchsorted(table, np.abs(x)), 1, len(table) - 1)
    low, high = table[above - 1], table[above]
    middle = (low + high) / 2
    up = (np.abs(x) > middle) | ((np.abs(x) == middle) & (above % 2 == 0))
    return np.copysign(np.where(up, high, low), x)


def in_rows(x: torch.Tensor) -> np.ndarray:
    """What x is after it was quantised with a scale for each row, in fp64."""
    values = x.double().numpy()
    scale = np.maximum(np.abs(values).max(-1, keepdims=True), 1e-12).astype(np.float32) / np.float32(448)
    return nearest((values.astype(np.float32) / scale).astype(np.float64)) * scale.astype(np.float64)


def drawn(*size: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    """Numbers of many magnitudes, one row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator) * torch.exp(spread * torch.randn(size, generator=generator))
    x[len(x) // 2] = 0.0
    return x


def test_the_numbers_of_e4m3():
    table = e4m3_numbers()
    assert np.array_equal(table, torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy())
    assert (table[1], table[-1]) == (2.0**-9, quantised.LARGEST)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_of_a_row(dtype):
    """Half a unit in the last of 4 binary digits, or half the least number; the largest of a row is exact."""
    x = drawn(64, 256).to(dtype)
    values, scales = quantised.quantise(x)
    assert values.dtype == torch.float8_e4m3fn and scales.shape == (64, 1) and scales.dtype == torch.float32
    back = values.double() * scales
    bound = torch.maximum(x.double().abs() / 16, scales.double() * 2.0**-10)
    assert ((back - x).abs() <= bound * (1 + 1e-6)).all()
    largest = values.float().abs().amax(-1)
    assert (largest[: len(x) // 2] == 448).all() and largest[len(x) // 2] == 0
    assert np.abs(back.numpy() - in_rows(x)).max() == 0


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 48)])
def test_a_product(bias):
    """Emulated as well as by torch's own kernel, which takes a CPU's tensors too: sums of the same numbers."""
    x, weight = drawn(7, 64, seed=1), drawn(48, 64, seed=2, spread=0.5)
    expected = in_rows(x) @ in_rows(weight).T + (0 if bias is None else bias.double().numpy())
    copy = quantised.QuantisedWeight(weight)
    copy.refresh()
    size = np.abs(in_rows(x)) @ np.abs(in_rows(weight)).T + 1
    found = copy.product(x, bias)
    assert found.dtype == torch.float32
    assert (np.abs(found.double().numpy() - expected) <= 1e-6 * size).all()
    in_bf16 = None if bias is None else bias.bfloat16()
    assert copy.product(x.bfloat16(), in_bf16).dtype == torch.bfloat16
    kernel = quantised.multiply(*quantised.quantise(x), copy.values, copy.scales, in_bf16)
    assert kernel.dtype == torch.bfloat16
    rounded = expected if bias is None else expected - bias.double().numpy() + in_bf16.double().numpy()
    assert (np.abs(kernel.double().numpy() - rounded) <= 2.0**-8 * np.abs(rounded) + 1e-5 * size).all()


@pytest.mark.parametrize(("size", "tp"), [("3b", 1), ("7b", 4), ("32b", 8), ("72b", 8)])
def test_what_a_gpu_would_be_given(size, tp):
    """torch's own checks of layouts, shapes and types for CUDA, at the sides of published models' matrices."""
    device.prepare_megatron()  # from here on "cuda" means the CPU wherever tensors are made
    mode = FakeTensorMode()

    def on_a_gpu(*sides: int, dtype: torch.dtype) -> torch.Tensor:
        return FakeTensor(mode, torch.empty(sides, dtype=dtype, device="meta"), torch.device("cuda", 0))

    for rows, columns in fp8.matrices(read_shape(recipes.published(size)).text, tp).values():
        for tokens in (1, 8, 200):
            x = on_a_gpu(tokens, columns, dtype=torch.bfloat16)
            weight = on_a_gpu(rows, columns, dtype=quantised.E4M3)
            scales, bias = on_a_gpu(1, rows, dtype=torch.float32), on_a_gpu(rows, dtype=torch.bfloat16)
            with mode:
                out = quantised.multiply(*quantised.quantise(x), weight, scales, bias)
            assert out.shape == (tokens, rows) and out.dtype == torch.bfloat16 and out.is_cuda
    with mode, pytest.raises(RuntimeError, match="divisible by 16"):
        odd = on_a_gpu(8, 100, dtype=quantised.E4M3), on_a_gpu(8, 1, dtype=torch.float32)
        quantised.multiply(*odd, on_a_gpu(32, 100, dtype=quantised.E4M3), on_a_gpu(1, 32, dtype=torch.float32), None)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("quantised") / "model", seed=7)


def engine(policy, quantization="fp8") -> Engine:
    return Engine(policy, lambda ids: " ".join(map(str, ids)), 10_000, quantization=quantization)


class Linear(torch.nn.Module):
    """A linear layer of transformers' model whose product is of quantised rows, summed in fp64."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = torch.from_numpy(in_rows(linear.weight.detach())), linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.from_numpy(in_rows(x.flatten(0, -2))) @ self.weight.t()
        return (out.float() if self.bias is None else out.float() + self.bias).unflatten(0, x.shape[:-1])


def quantised_model(directory):
    """Return transformers' model with all matrices of the language model's layers replaced."""
    model = plain_model(directory)
    for layer in model.model.language_model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(part, name, Linear(child))
    return model


def test_sampled_log_probs_are_those_of_the_quantised_weights(mesh, directory, record_property):
    """Against transformers' model. A number that lies near the middle of two of e4m3 may go either way in it."""
    prompts = mixed_prompts(directory)
    rows = engine(work.load_policy(directory, mesh)).generate(prompts, 4, Sampling(12, work.STOPS, seed=3))
    gaps = {}
    for kind, model in (("quantised", quantised_model(directory)), ("exact", plain_model(directory))):
        found = []
        for prompt, row in zip(prompts, rows, strict=True):
            for c in row:
                with torch.no_grad():
                    expected = plain.logprobs(model, prompt, c.token_ids, banned_ids(directory))
                found.append((expected - torch.from_numpy(c.logprobs)).abs())
        gaps[kind] = torch.cat(found)
    within(record_property, "median", float(gaps["quantised"].median()), 1e-5)
    assert gaps["exact"].median() >= 0.01


def test_evaluation_is_exact(mesh, directory):
    policy, prompts = work.load_policy(directory, mesh), mixed_prompts(directory)
    greedy = Sampling(12, frozenset(), greedy=True)
    both = engine(policy)
    expected = engine(policy, "none").generate(prompts, 1, greedy)
    with both.exact():
        found = both.generate(prompts, 1, greedy)
    assert both.quantised is not None and both.quantised.nbytes == 0
    changed = both.generate(prompts, 1, greedy)
    logprobs = [np.concatenate([c.logprobs for (c,) in rows]) for rows in (found, expected, changed)]
    assert np.array_equal(logprobs[0], logprobs[1]) and not np.array_equal(logprobs[0], logprobs[2])


def addresses(weights: quantised.QuantisedWeights) -> list[int]:
    return [t.data_ptr() for chunk in weights.refresh() for m in chunk for w in m for t in (w.values, w.scales)]


def test_copies_follow_the_weights_in_place(mesh, directory):
    """Graphs go on with their addresses from version to version; what is given back comes again with the same bits."""
    policy = work.load_policy(directory, mesh)
    policy.wrap_for_training()  # moves the values that the copies have to follow
    weights = quantised.QuantisedWeights(policy)
    assert weights.nbytes == 0
    before = addresses(weights)
    first = weights.refresh()[0][1].down
    kept = first.values.view(torch.uint8).clone(), first.scales.clone()
    held = weights.nbytes
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(-2.0)
    assert torch.equal(weights.refresh()[0][1].down.scales, kept[1])  # nobody has said that they changed
    policy.weights_changed(tower=True)
    assert addresses(weights) == before
    assert torch.equal(first.scales, 2 * kept[1])
    assert torch.equal(first.values.float(), -kept[0].view(quantised.E4M3).float())
    weights.release()
    weights.release()
    assert weights.nbytes == 0
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(-0.5)
    weights.refresh()
    assert weights.nbytes == held
    assert torch.equal(first.values.view(torch.uint8), kept[0]) and torch.equal(first.scales, kept[1])


def test_a_decoding_copy_is_quantised_anew(mesh, directory):
    policy, prompts = work.load_policy(directory, mesh), mixed_prompts(directory)[:2]
    greedy = Sampling(6, frozenset(), greedy=True)
    with_copy = CopyEngine(policy, ParallelConfig(), banned_ids(directory), str, 10_000, 1 << 62, quantization="fp8")
    own = engine(policy)
    for factor in (1.0, 1.5):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(factor)
        policy.weights_changed(tower=True)
        expected, found = own.generate(prompts, 2, greedy), with_copy.generate(prompts, 2, greedy)
        for a, b in zip(expected, found, strict=True):
            assert [c.logprobs.tolist() for c in a] == [c.logprobs.tolist() for c in b]
    assert with_copy.quantised is not None and with_copy.quantised.nbytes > 0
    with_copy.release()
    assert with_copy.quantised.nbytes == with_copy.weights_bytes == 0


def settings(**sections):
    raw = {"model": {"path": "-"}, "data": {"train": "-"}, "grpo": {"truncated_importance": 2.0}}
    return config.parse(raw | {"rollout": {"quantization": "fp8"}} | sections, "test")


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"grpo": {}}, "rollout.quantization=fp8 samples by other probabilities .*: set grpo.truncated_importance"),
        ({"method": "sft"}, "rollout.quantization=fp8 changes nothing: method=sft samples no completions"),
        ({"rollout": {"quantization": "int8"}}, "rollout.quantization: Input should be 'none' or 'fp8'"),
    ],
)
def test_what_does_not_go_together(sections, says):
    with pytest.raises(ValueError, match=says):
        settings(**sections)


def test_sides_that_do_not_fit():
    """72B at TP16 has 1,848 feed-forward units on a rank; the layout that generates is the one that counts."""
    text = read_shape(recipes.published("72b")).text
    wide = {"tensor_model_parallel_size": 16}
    says = (
        "rollout.quantization=fp8 at {}.tensor_model_parallel_size=16: .*8192 x 1848.* multiples of 16; .*: 1, 2, 4, 8"
    )
    with pytest.raises(ValueError, match=says.format("parallel")):
        fp8.check(settings(parallel=wide), text)
    narrow = {"quantization": "fp8", "tensor_model_parallel_size": 8}
    fp8.check(settings(parallel=wide, rollout=narrow), text)
    with pytest.raises(ValueError, match=says.format("rollout")):
        fp8.check(settings(parallel=wide, rollout=narrow | wide), text)
    fp8.check(settings(parallel=wide, rollout={"quantization": "none"}), text)


@pytest.mark.parametrize("rollout", [{}, {"tensor_model_parallel_size": 1}])
def test_the_plan_counts_the_copy(mesh, directory, rollout):
    shape = read_plan_shape(str(directory))
    cfg = settings(rollout={"quantization": "fp8", "max_new_tokens": 8, **rollout})
    plain_cfg = settings(rollout={"max_new_tokens": 8, **rollout})
    (on,), (off,) = (rank_memory(each, shape, 1, "cuda") for each in (cfg, plain_cfg))
    weights = quantised.QuantisedWeights(work.load_policy(directory, mesh))
    weights.refresh()
    assert on.phases["rollout"]["FP8 copy"] == weights.nbytes
    captured = 16 * 8 * 96 * (4 + 1)  # inputs on their way in a tick, which has memory of its own as a CUDA graph
    assert on.peak("rollout") - off.peak("rollout") == weights.nbytes + captured
    assert all(on.peak(phase) == off.peak(phase) for phase in ("logprobs", "update", "save"))
    (emulated,) = rank_memory(cfg, shape, 1, "cpu")
    assert emulated.phases["rollout"]["emulated products"] == 2 * 96 * 64 * 4


def test_the_plan_counts_inputs_on_their_way():
    """The widest input of a product, in fp32 and in e4m3, beside what it was, in place of gate and product in bf16."""
    layout = ParallelConfig(tensor_model_parallel_size=4, pipeline_model_parallel_size=2)  # two lanes of four prompts
    shape, load = read_plan_shape("qwen2.5-vl-7b"), []
    for each in ("fp8", "none"):
        made = Generation(
            settings(rollout={"quantization": each}), shape, layout, 0, Load(8, 2, 1000, 100, ()), 2, cuda=False
        )
        load.append((made._prefill(made.size())[0]["prefill"], made._tick(made.size())["decoding"]))
    (prefill, tick), (before, tick_before) = load
    assert prefill - before == 4000 * 18944 // 4 * (2 + 4 + 1 - 2 * 2)
    assert tick - tick_before == 8 * 18944 // 4 * (4 + 1)
