"""Decoding in bursts: some ticks in a row on the device, after which the host takes all their tokens at once.

For one pipeline stage and one lane. Prompts enter, and rows leave, between bursts only; what a row draws after its end
is thrown away. Shapes are padded to a few buckets, so that a tick can be recorded once and repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from megatron_vlmr1.rollout.cache_size import CacheSize
from megatron_vlmr1.rollout.forward import Forward
from megatron_vlmr1.rollout.graphs import Recorder
from megatron_vlmr1.rollout.kv_cache import KvCache
from megatron_vlmr1.rollout.lane import Burst, Lane
from megatron_vlmr1.rollout.prefill import PromptEnds, prefill_job, tensor
from megatron_vlmr1.rollout.sampling import Sampling, choose, seen_tokens
from megatron_vlmr1.rollout.step import Bucket, Step
from megatron_vlmr1.runtime import device


class Steps:
    """The recorded ticks of one cache, by their shapes and by how tokens are drawn."""

    def __init__(self, forward: Forward, cache: KvCache, recorder: Recorder, most_ticks: int) -> None:
        """At most `most_ticks` follow one another."""
        self.forward, self.cache, self.most_ticks = forward, cache, most_ticks
        self._recorder = recorder
        self._steps: dict[tuple[Bucket, Sampling], tuple[Step, Callable[[], object]]] = {}
        self.addresses = forward.addresses()
        self._seen: torch.Tensor | None = None  # bool [rows of the cache, vocabulary / tp], where that matters

    def serves(self, forward: Forward, size: CacheSize) -> bool:
        """Whether recordings can do the work of a new `forward`, which reads the weights where they are now."""
        fits = self.cache.size.holds(size) and self.forward.positions >= forward.positions
        return fits and self.addresses == forward.addresses()

    @property
    def recorded(self) -> int:
        """How many ticks have been recorded."""
        return len(self._steps)

    def run(
        self, burst: Burst, sampling: Sampling, first: torch.Tensor | None, seen: torch.Tensor | None
    ) -> npt.NDArray[np.float64]:
        """Return [ticks + 1, 3, n] of a burst that has ticks: tokens and both log-probs; see `Step.load`."""
        bucket = Bucket.of(burst, self.cache)
        # Seeds, stops and limits are the lane's business.
        key = bucket, replace(sampling, seed=0, stop_ids=frozenset(), max_new_tokens=0)
        known = self._steps.get(key)
        step = known[0] if known else self._new(bucket, sampling)
        step.load(burst, first, seen)
        if known is None:
            known = self._steps[key] = step, self._recorder.record(step, step.reset)
        for _ in range(burst.ticks):
            known[1]()
        return step.drawn(burst.ticks)

    def _new(self, bucket: Bucket, sampling: Sampling) -> Step:
        if sampling.penalises and self._seen is None:
            shape = self.cache.size.rows, self.forward.policy.vocabulary.rows
            self._seen = torch.zeros(shape, dtype=torch.bool, device=device.device())
        seen = self._seen if sampling.penalises else None
        return Step(bucket, self.forward, self.cache, sampling, self.most_ticks, seen)


class Bursts:
    """One lane's bursts."""

    def __init__(self, lane: Lane, steps: Steps) -> None:
        self.lane, self._steps = lane, steps
        self._prompt_ends = PromptEnds()

    def work(self) -> None:
        """Let in whoever fits, and go on by a burst."""
        lane, sampling = self.lane, self.lane.sampling
        lane.let_in()
        vocabulary = self._steps.forward.policy.vocabulary
        seen = seen_tokens(lane.history(), vocabulary) if sampling.penalises else None
        first = self._first_tokens(seen)
        burst = lane.begin_burst(self._steps.most_ticks)
        if burst.ticks:
            table = self._steps.run(burst, sampling, first, seen)
        else:  # nobody but rows of one token, which have just entered
            assert first is not None
            table = first.cpu().numpy()[None]
        lane.take_burst(table[:, 0].astype(np.int64), table[:, 1:].astype(np.float32), self._steps.cache)

    def _first_tokens(self, seen: torch.Tensor | None) -> torch.Tensor | None:
        """Return [3, new]: the first tokens of rows that enter and both log-probs, on the device; None without any."""
        lane, forward, cache = self.lane, self._steps.forward, self._steps.cache
        ends: torch.Tensor | tuple[()] = ()
        if lane.entering:
            job = prefill_job(lane, cache, forward)
            ends = forward.run(0, job.embedded(forward), job.rotation, job.attend)[job.ends]
        wanted = self._prompt_ends.of_new_rows(lane, ends)
        if not wanted:
            return None
        new = slice(lane.decoding, lane.n)
        random = None if lane.sampling.greedy else tensor(lane.uniforms()[new])
        logits = forward.policy.vocabulary.logits(wanted[0], forward.policy.output_weight())
        seen = None if seen is None else seen[new]
        return choose(logits, forward.policy.vocabulary, lane.sampling, random, seen).table()
