"""Decoding in bursts against decoding tick by tick, and recorded ticks."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_vlmr1 import config
from megatron_vlmr1.checkpoint.locate import hf_directory
from megatron_vlmr1.config.rules import ticks_in_a_row
from megatron_vlmr1.models.logprobs import Vocabulary
from megatron_vlmr1.rollout.actor import Actor
from megatron_vlmr1.rollout.engine import Engine
from megatron_vlmr1.rollout.forward import Forward
from megatron_vlmr1.rollout.graphs import CudaGraphs, Eager, recorder, side_stream
from megatron_vlmr1.rollout.sampling import Sampling, choose
from megatron_vlmr1.runtime import device
from tests.capture import Capturable, Tape
from tests.checkpoints import mixed_prompts, write_random_checkpoint
from tests.distributed import work
from tests.distributed.plain import within

STEPS = 12
PLAIN = Sampling(STEPS, work.STOPS, seed=3)
WAYS = {
    "plain": PLAIN,
    "greedy": Sampling(STEPS, work.STOPS, greedy=True),
    "temperature": replace(PLAIN, temperature=0.7),
    "filters": replace(PLAIN, temperature=1.4, top_k=40, top_p=0.9, min_p=0.01),
    "penalty": replace(PLAIN, repetition_penalty=1.5),
    "long": Sampling(3 * STEPS, frozenset({5}), seed=4),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("bursts") / "model", seed=7)


@pytest.fixture(scope="module")
def policy(mesh, directory):
    return work.load_policy(directory, mesh)


@pytest.fixture(scope="module")
def prompts(directory):
    return mixed_prompts(directory)


def engine(policy, burst: int, budget: int = 10_000, make=None) -> Engine:
    return Engine(policy, lambda ids: " ".join(map(str, ids)), budget, 100, burst, make)


def words(rows) -> list:
    return [[(c.token_ids.tolist(), c.finish_reason, c.text) for c in row] for row in rows]


def gap(rows, others) -> float:
    pairs = [pair for row, other in zip(rows, others, strict=True) for pair in zip(row, other, strict=True)]
    return max(
        float(np.abs(x - y).max())
        for a, b in pairs
        for x, y in ((a.logprobs, b.logprobs), (a.drawn_logprobs, b.drawn_logprobs))
        if x is not None
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("budget", [150, 330, 10_000])
def test_completions_are_those_of_ticks_one_by_one(policy, prompts, way, budget, record_property):
    """Whatever the burst, and however few fit at once: places are then taken in other ticks, by other rows."""
    rng = np.random.default_rng(budget)
    limits = rng.integers(1, WAYS[way].max_new_tokens + 1, (len(prompts), 4)).tolist() if budget == 330 else None
    expected = engine(policy, 1, budget).generate(prompts, 4, WAYS[way], limits=limits)
    worst = 0.0
    for burst in (3, 64):
        found = engine(policy, burst, budget).generate(prompts, 4, WAYS[way], limits=limits)
        assert words(found) == words(expected)
        worst = max(worst, gap(found, expected))
    within(record_property, "log-probs", worst, 1e-5)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=str)
def test_heads_that_share_keys(mesh, tmp_path, heads):
    text = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "num_hidden_layers": 2}
    policy = work.load_policy(write_random_checkpoint(tmp_path / "model", seed=1, **text), mesh)
    prompts = mixed_prompts(tmp_path / "model")
    expected = engine(policy, 1).generate(prompts, 3, PLAIN)
    found = engine(policy, 4).generate(prompts, 3, PLAIN)
    assert words(found) == words(expected) and gap(found, expected) <= 1e-5


def test_one_token_each_needs_no_tick(policy, prompts):
    one = replace(PLAIN, max_new_tokens=1)
    engine_ = engine(policy, 4, make=Tape)
    assert words(engine_.generate(prompts, 2, one)) == words(engine(policy, 1).generate(prompts, 2, one))
    assert engine_.steps.recorded == 0
    assert engine_.generate([], 2, one) == []


def test_they_are_told_as_they_end(policy, prompts):
    """Within a burst by the tick in which they end, although the host sees all of it at once."""
    lengths: list[int] = []
    everyone_at_once = Engine(policy, str, 10_000, decode_burst=64)
    everyone_at_once.generate(prompts, 6, PLAIN, lambda i, j, c: lengths.append(len(c.token_ids)))
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]


@pytest.mark.parametrize("way", WAYS)
def test_recorded_ticks_give_the_same_and_are_kept_from_call_to_call(policy, prompts, way):
    expected = engine(policy, 1).generate(prompts, 4, WAYS[way])
    recorded = engine(policy, 4, make=Tape)
    for seed in (WAYS[way].seed, 9):  # seeds and stops are not recorded
        other = replace(WAYS[way], seed=seed, stop_ids=frozenset({seed, 7}))
        assert words(recorded.generate(prompts, 4, other)) == words(engine(policy, 1).generate(prompts, 4, other))
    tape, captures, replays = Tape.made[-1], Tape.made[-1].captures, Tape.made[-1].replays
    found = recorded.generate(prompts, 4, WAYS[way])
    assert words(found) == words(expected) and gap(found, expected) <= 1e-5
    assert Tape.made[-1] is tape and recorded.steps.recorded == tape.captures
    assert captures <= tape.captures < 12 and tape.replays > replays


def test_a_smaller_call_takes_over_what_a_larger_one_left(policy, prompts):
    """Such as a batch of an evaluation without the longest prompt, or its last one: nothing is captured anew for it."""
    recorded = engine(policy, 4, make=Tape)
    recorded.generate(prompts, 4, PLAIN)
    tape, size = Tape.made[-1], recorded.steps.cache.size
    shorter = replace(PLAIN, max_new_tokens=STEPS - 3)
    for fewer, sampling in ((prompts[:3], PLAIN), (prompts, shorter), (prompts[1:], PLAIN)):
        expected = engine(policy, 1).generate(fewer, 3, sampling)
        found = recorded.generate(fewer, 3, sampling)
        assert words(found) == words(expected) and gap(found, expected) <= 1e-5
        assert Tape.made[-1] is tape and recorded.steps.cache.size == size


def test_bursts_are_no_longer_than_completions(policy, prompts):
    """However many ticks a config asks for, tables are for those that can be."""
    endless = engine(policy, 1 << 60, make=Tape)
    assert words(endless.generate(prompts, 2, PLAIN)) == words(engine(policy, 1).generate(prompts, 2, PLAIN))
    assert endless.steps.most_ticks == STEPS


@pytest.mark.parametrize("way", WAYS)
def test_drawing_from_a_large_vocabulary_can_be_captured(mesh, way):
    """Which takes other ways than one of 512 tokens."""
    hidden, weight = (torch.randn(n, 16, generator=torch.Generator().manual_seed(n)) for n in (8, 5000))
    vocabulary = Vocabulary(5000, 4990, [3, 7], mesh.tp_group, torch.device("cpu"))
    random = None if WAYS[way].greedy else torch.linspace(0, 0.99, 8).double()
    seen = hidden @ weight.t() > 1 if WAYS[way].penalises else None
    with Capturable():
        found = choose(vocabulary.logits(hidden, weight), vocabulary, WAYS[way], random, seen)
    assert found.tokens.max() < 4990 and found.logprobs.isfinite().all()


def test_recorded_ticks_in_a_small_cache(policy, prompts):
    expected = engine(policy, 1, 330).generate(prompts, 4, PLAIN)
    assert words(engine(policy, 4, 330, Tape).generate(prompts, 4, PLAIN)) == words(expected)


def test_a_recording_sees_weights_that_change_where_they_lie(mesh, directory, prompts):
    policy = work.load_policy(directory, mesh)
    recorded = engine(policy, 4, make=Tape)
    before = recorded.generate(prompts, 2, PLAIN)
    tape = Tape.made[-1]
    captures = tape.captures
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.8)
    policy.weights_changed(tower=True)
    expected = engine(policy, 1).generate(prompts, 2, PLAIN)
    found = recorded.generate(prompts, 2, PLAIN)
    assert words(found) == words(expected) != words(before)
    assert Tape.made[-1] is tape and captures <= tape.captures == recorded.steps.recorded


def test_all_that_a_tick_reads_is_watched(policy):
    """Whichever weight of the language model moves, a tick must not be replayed."""
    forward = Forward(policy, 8)
    names = {p.data_ptr(): name for name, p in policy.model.language.named_parameters()}
    assert {names[address] for address in forward.addresses()} == set(names.values())


def test_the_norm_of_cuda_is_that_of_the_cpu_but_for_rounding(policy):
    """One kernel, which rounds to bf16 once: nearer to fp32 than what training's own norm rounds twice."""
    forward, x = Forward(policy, 8), torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).double() * 3
    weight = 1 + 0.1 * torch.randn(64, generator=torch.Generator().manual_seed(1)).double()
    exact = weight * x / (x.square().mean(-1, keepdim=True) + policy.shape.text.norm_eps).sqrt()
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2.0**-8)):
        seen = x.to(dtype), weight.to(dtype)
        own = forward._normed(*seen)
        fused = torch.nn.functional.rms_norm(seen[0], seen[1].shape, seen[1], policy.shape.text.norm_eps)
        assert (own - fused).abs().max() <= bound * 4 * exact.abs().max()
        assert dtype is torch.float32 or (fused - exact).abs().mean() <= (own - exact).abs().mean()


@pytest.mark.parametrize("what", ["moved", "released", "larger cache"])
def test_recordings_are_dropped_with_what_they_point_to(mesh, directory, prompts, what):
    policy = work.load_policy(directory, mesh)
    recorded = engine(policy, 4, make=Tape)
    recorded.generate(prompts, 2, PLAIN)
    tape, steps = Tape.made[-1], weakref.ref(recorded.steps)
    if what == "moved":  # as a decoding copy's weights between rollouts
        weight = policy.model.language.decoder.layers[1].mlp.linear_fc2.weight
        weight.data = weight.data * 0.8
    elif what == "released":
        recorded.release()
        assert steps() is None  # at once, not when garbage is collected: the update needs the memory
    sampling = replace(PLAIN, max_new_tokens=STEPS + 4 if what == "larger cache" else STEPS)
    expected = engine(policy, 1).generate(prompts, 2, sampling)
    assert words(recorded.generate(prompts, 2, sampling)) == words(expected)
    assert Tape.made[-1] is not tape and steps() is None
    assert Tape.made[-1].captures == recorded.steps.recorded > 0


def test_without_cuda_nothing_is_captured(monkeypatch):
    assert recorder("auto") is recorder("none") is Eager
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    assert recorder("auto") is CudaGraphs and recorder("none") is Eager


def test_what_cuda_is_asked_for(monkeypatch):
    """In which order, on which streams, and with the arguments that torch's own classes take."""
    events: list[tuple] = []
    signature = inspect.signature(torch.cuda.graph.__init__)

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            events.append((self.name, "waits for", other.name))

    @contextlib.contextmanager
    def entered(*what: str):
        events.append(("enter", *what))
        yield
        events.append(("leave", *what))

    def graph(*args, **kwargs):
        given = signature.bind(None, *args, **kwargs).arguments
        assert isinstance(given["cuda_graph"], SimpleNamespace)
        return entered("capture", given["pool"], given["stream"].name, given["capture_error_mode"])

    for name, value in {
        "Stream": Stream,
        "current_stream": lambda: Stream("main"),
        "stream": lambda stream: entered(stream.name),
        "graph_pool_handle": lambda: "pool",
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: events.append(("replay",))),
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    side_stream.cache_clear()
    replay = CudaGraphs().record(lambda: events.append(("tick",)), lambda: events.append(("reset",)))
    replay()
    assert CudaGraphs()._stream is CudaGraphs()._stream  # for each stream that it has seen cuBLAS keeps a workspace
    side_stream.cache_clear()
    capture = ("capture", "pool", "side", "thread_local")
    assert events == [
        *[("side", "waits for", "main"), ("enter", "side"), ("tick",), ("leave", "side")],
        *[("main", "waits for", "side"), ("reset",)],
        *[("enter", *capture), ("tick",), ("leave", *capture), ("replay",)],
    ]


def settings(**sections) -> config.Config:
    raw = {"model": {"path": "asset:tiny_vlm"}, "data": {"train": "-"}, "precision": "fp32", **sections}
    return config.parse(raw, "test")


def test_how_many_ticks(mesh, policy):
    assert [ticks_in_a_row(None, 1, cuda) for cuda in (False, True)] == [1, 8]
    assert [ticks_in_a_row(given, 2, True) for given in (None, 1)] == [1, 1]
    assert ticks_in_a_row(3, 1, True) == ticks_in_a_row(3, 1, False) == 3
    assert Engine(policy, str, 100).decode_burst == 1
    actor = Actor(hf_directory("asset:tiny_vlm"), settings(rollout={"decode_burst": 5, "cuda_graphs": "auto"}), mesh)
    assert actor.engine.decode_burst == 5 and actor.engine.recorder is Eager


def test_a_burst_is_for_one_stage():
    piped = {"pipeline_model_parallel_size": 2}
    with pytest.raises(ValueError, match="rollout.decode_burst=4 is for one stage; 2 generate"):
        settings(parallel=piped, rollout={"decode_burst": 4})
    settings(parallel=piped, rollout={"decode_burst": 1})
    settings(parallel=piped, rollout={"decode_burst": 4, "tensor_model_parallel_size": 2})  # a copy of one stage
