"""Seconds of a rollout: prefill, and ticks of continuous batching as `rollout.engine` runs them. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from megatron_vlmr1.models.shape import padded
from megatron_vlmr1.plan import passes
from megatron_vlmr1.plan.costs import NOTHING, Cost, Device, total
from megatron_vlmr1.plan.hardware import Link
from megatron_vlmr1.plan.layout import Layout, decoding_links
from megatron_vlmr1.plan.shapes import PlanShape
from megatron_vlmr1.plan.workload import Packed, Workload
from megatron_vlmr1.rollout.cache_size import CacheSize, fit
from megatron_vlmr1.telemetry.flops import causal_pairs

LAYER_KERNELS = 35  # of a layer in a tick, and of sampling: counted with a TorchDispatchMode, views left out
SAMPLING_KERNELS = 37
_SAMPLING_BYTES = 40  # of one logit: to fp32, banned, maximum, exponentials, sums, cumulative sums
_TAIL_POINTS = 8  # moments at which the draining of the cache is looked at


@dataclass(frozen=True)
class Engine:
    """A model that generates: the training layout's own, or the copies that `rollout.decoding_copy` makes of it."""

    place: Layout
    tp_link: Link
    pp_link: Link
    copies: int  # of the decoding model on the ranks of one training copy; they share out its prompts
    is_copy: bool
    lanes: int  # of completions in flight; one behind virtual stages
    max_cache_tokens: int
    max_prefill_tokens: int
    burst: int = 1  # ticks in a row, after which the host takes tokens


def engine(
    training: Layout, decoding: tuple[int, int] | None, cache: int, prefill: int, num_layers: int, burst: int = 1
) -> Engine:
    """Return what generates in a training layout; `decoding` is (tensor, pipeline) of a copy, if there is one."""
    if decoding is None:
        lanes = training.pp if training.vp == 1 else 1
        return Engine(training, training.tp_link, training.pp_link, 1, False, lanes, cache, prefill, burst)
    tp, pp = decoding
    copies = training.tp * training.pp // (tp * pp)
    place = Layout(tp, pp, 1, training.dp * copies, False, (num_layers // pp,) * pp, training.per_node)
    tp_link, pp_link = decoding_links(training, tp, pp)
    return Engine(place, tp_link, pp_link, copies, True, pp, cache, prefill, burst)


@dataclass(frozen=True)
class Tail:
    """Lengths of completions: all the longest, or exponential and cut at the longest, with the wanted mean."""

    longest: int
    scale: float  # tokens; infinite where all are the longest

    def alive(self, tokens: float) -> float:
        """Return the share of completions that are longer."""
        if tokens >= self.longest:
            return 0.0
        return 1.0 if math.isinf(self.scale) else math.exp(-tokens / self.scale)

    def last(self, completions: int) -> float:
        """Return the expected length of the longest of so many."""
        if math.isinf(self.scale):
            return float(self.longest)
        return min(float(self.longest), self.scale * (math.log(completions) + 0.577))


@lru_cache(maxsize=1024)
def tail(mean: float, longest: int) -> Tail:
    """Return the distribution of that mean: scale * (1 - exp(-longest / scale)) = mean."""
    if mean > 0.99 * longest:
        return Tail(longest, math.inf)
    low, high = mean / 2, 1e3 * longest
    for _ in range(100):
        scale = math.sqrt(low * high)
        low, high = (scale, high) if scale * (1 - math.exp(-longest / scale)) < mean else (low, scale)
    return Tail(longest, scale)


@lru_cache(maxsize=4096)
def cache_size(prompt: int, prompts: int, generations: int, longest: int, budget: int) -> CacheSize:
    """Return the slots of one lane's cache.

    Raises:
        ValueError: not even one completion fits.
    """
    size = fit(prompt, prompts, generations, longest, budget)
    if size is None:
        raise ValueError(f"rollout.max_cache_tokens: {budget} tokens of a lane hold no completion")
    return size


def rollout(device: Device, shape: PlanShape, which: Engine, work: Workload, training: Layout) -> dict[str, Cost]:
    """Return what a rollout is made of: the copy of the weights, prefill, decoding."""
    prompts = -(-work.prompts // training.dp)
    prompts = -(-prompts // which.copies)
    lanes = min(which.lanes, prompts)
    each = -(-prompts // lanes)
    out = {"copy": _copy(device, shape, which, training), "prefill": _prefill(device, shape, which, work, each, lanes)}
    out["decode"] = _decode(device, shape, which, work, each, lanes)
    return out


def _copy(device: Device, shape: PlanShape, which: Engine, training: Layout) -> Cost:
    """Return the copy of the weights into the decoding layout.

    A rank lacks what other stages hold, and what its own slices lack. `rollout.reshard` serves targets one after
    another: those that want the same slices wait for each other.
    """
    if not which.is_copy:
        return NOTHING
    place = which.place
    held = sum(passes.stage_parameters(shape, place, 0))
    own = min(1.0, place.pp / training.pp) if place.tp == training.tp else 0.0
    received = held * device.item * (1.0 - own)
    crosses = training.tp * training.dp * training.pp > training.per_node and training.pp > 1
    sent = device.send("network" if crosses else "nvlink", received, "weights")
    return Cost({"weights": sent.seconds * which.copies}, sent.sent_bytes)


def _prefill(device: Device, shape: PlanShape, which: Engine, work: Workload, prompts: int, lanes: int) -> Cost:
    """Return the forward pass over all prompts, packed, with their images; lanes follow each other through stages."""
    tokens = prompts * work.prompt_tokens
    rounds = max(1, math.ceil(tokens / which.max_prefill_tokens))
    batch = Packed(
        count=rounds * lanes,
        images=prompts / rounds if work.grid else 0.0,
        tokens=math.ceil(tokens / rounds),
        pairs=prompts / rounds * causal_pairs(round(work.prompt_tokens)),
        labels=1.0,
    )
    place = which.place
    if not which.is_copy:
        place = Layout(place.tp, place.pp, place.vp, place.dp, False, place.layers, place.per_node)
    return passes.through(passes.Task(device, shape, place, work, batch), train=False, tower=True)


def _decode(device: Device, shape: PlanShape, which: Engine, work: Workload, prompts: int, lanes: int) -> Cost:
    """Return the ticks: full ones while completions wait, then fewer and fewer rows until the longest ends."""
    lengths = tail(work.completion_tokens, work.longest_completion)
    size = cache_size(
        math.ceil(work.prompt_tokens),
        prompts,
        work.generations,
        work.longest_completion,
        which.max_cache_tokens // lanes,
    )
    costs = [
        _round(device, shape, which, lanes, rows, min(size.prompts, math.ceil(rows)), work.prompt_tokens, own) * ticks
        for ticks, rows, own in ticks_of(lengths, prompts * work.generations, size.rows, work)
    ]
    return total(costs)


def ticks_of(lengths: Tail, requests: int, rows: int, work: Workload) -> Iterator[tuple[float, float, float]]:
    """Yield (ticks, rows decoded in each, own keys that each row reads) of one lane.

    The first token of a completion comes from its prompt: it is fed one token less than it has.
    """
    mean, last = work.completion_tokens - 1, lengths.last(min(rows, requests)) - 1
    if requests > rows:
        yield (requests - rows) * mean / rows, float(rows), float(work.longest_completion)
    for i in range(_TAIL_POINTS):
        at = last * (i + 0.5) / _TAIL_POINTS
        yield last / _TAIL_POINTS, max(1.0, min(rows, requests) * lengths.alive(at)), max(1.0, at)


def _round(
    device: Device, shape: PlanShape, which: Engine, lanes: int, rows: float, prompts: int, prompt: float, own: float
) -> Cost:
    """Return one tick of all lanes: stages work on one lane each, or wait for the only one to come round."""
    place, text = which.place, shape.text
    layer = _layer_tick(device, shape, which, rows, prompts, prompt, own)
    stages = [layer * place.stage_layers(stage) for stage in range(place.pp)]
    vocabulary = padded(text.vocab_size, place.tp) // place.tp
    sampling = device.with_launches(
        {
            "matmul": device.products([(math.ceil(rows), vocabulary, text.hidden_size)], "decode"),
            "memory": device.moved(_SAMPLING_BYTES * rows * vocabulary),
        },
        SAMPLING_KERNELS,
        device.graphs,
    )
    tick = Cost({"tick": device.hardware.overheads.tick_s.value / which.burst})
    stages[-1] = stages[-1] + Cost(sampling) + tick
    if place.tp > 1:
        stages[-1] += device.all_reduce(which.tp_link, place.tp, 32.0 * rows, "tensor parallel")
        stages[0] += device.all_reduce(
            which.tp_link, place.tp, rows * text.hidden_size * device.item, "tensor parallel"
        )
    if place.pp > 1:
        hop = device.send(which.pp_link, rows * text.hidden_size * device.item, "pipeline")
        stages = [stage + hop * place.vp for stage in stages]
    trip = total(stages)
    longest = max(stages, key=lambda stage: stage.seconds)
    if lanes * longest.seconds <= trip.seconds:
        return trip
    return longest * lanes


def _layer_tick(
    device: Device, shape: PlanShape, which: Engine, rows: float, prompts: int, prompt: float, own: float
) -> Cost:
    """Return one layer of one tick: weights and cached keys are read, each prompt's once for all its rows."""
    text, tp = shape.text, which.place.tp
    width, kv_width = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    ffn, m = padded(text.ffn_hidden_size, tp) // tp, math.ceil(rows)
    cached = (prompts * prompt + rows * own) * 2 * max(text.head_dim, kv_width // tp) * device.item
    parts = {
        "matmul": device.products(
            [
                (m, (width + 2 * kv_width) // tp, text.hidden_size),
                (m, text.hidden_size, width // tp),
                (m, 2 * ffn, text.hidden_size),
                (m, text.hidden_size, ffn),
            ],
            "decode",
        ),
        "cache": device.moved(cached, "decode"),
    }
    compute = Cost(device.with_launches(parts, LAYER_KERNELS, device.graphs))
    if tp == 1:
        return compute
    traffic = device.all_reduce(which.tp_link, tp, rows * text.hidden_size * device.item, "tensor parallel") * 2
    if text.num_kv_heads < tp:
        fused = rows * (width + 2 * kv_width) * device.item
        traffic += device.all_gather(which.tp_link, tp, fused, "tensor parallel")
    return compute + traffic
