"""Generation on the training weights: one prefill per prompt for all its completions, then continuous batching.

With several pipeline stages there are as many lanes of completions, so that every stage has one to work on while the
others hold theirs. Stages hand hidden states forward; the last one samples and tells the others which tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch

from megatron_vlmr1.config.rules import ticks_in_a_row
from megatron_vlmr1.models.policy import Policy
from megatron_vlmr1.rollout import graphs
from megatron_vlmr1.rollout.bursts import Bursts, Steps
from megatron_vlmr1.rollout.cache_size import CacheSize, fit
from megatron_vlmr1.rollout.forward import Forward
from megatron_vlmr1.rollout.kv_cache import KvCache
from megatron_vlmr1.rollout.lane import Lane, OnFinish, Request
from megatron_vlmr1.rollout.pipe import Pipe
from megatron_vlmr1.rollout.quantised import QuantisedWeights
from megatron_vlmr1.rollout.sampling import Sampling
from megatron_vlmr1.runtime import device
from megatron_vlmr1.telemetry.progress import mark
from megatron_vlmr1.types import Completion, IntArray, Prompt

Limits = Sequence[Sequence[int]]  # most tokens of each completion of each prompt

_ROUND = 64  # tokens that caches which are kept from call to call are rounded up to, to fit the next call as well


class Engine:
    """Samples completions. All ranks that hold one copy of the model call it with the same prompts.

    Attributes:
        cache_bytes: key/value cache of the last call on this rank.
        decode_burst: ticks in a row.
        steps: cache and recorded ticks of the last call with bursts, which the next one takes over if they fit.
    """

    def __init__(
        self,
        policy: Policy,
        decode_text: Callable[[IntArray], str],
        max_cache_tokens: int,
        max_prefill_tokens: int = 1 << 62,
        decode_burst: int | None = None,
        recorder: Callable[[], graphs.Recorder] | None = None,
        quantization: Literal["none", "fp8"] = "none",
    ) -> None:
        """`decode_text` turns token ids (without the stop token) into text.

        `max_cache_tokens` bounds the cache of a rank, `max_prefill_tokens` the packed prompts of one forward pass.
        `decode_burst`, what makes a `recorder` of ticks, and `quantization` of the layers' matrices are as
        `rollout.decode_burst`, `rollout.cuda_graphs` and `rollout.quantization` say; None is their default.
        """
        self.policy = policy
        self.decode_text = decode_text
        self.max_cache_tokens, self.max_prefill_tokens = max_cache_tokens, max_prefill_tokens
        self.cache_bytes = 0
        self.decode_burst = ticks_in_a_row(decode_burst, policy.mesh.pp_size, device.has_cuda())
        self.recorder = recorder or graphs.recorder("auto")
        self.steps: Steps | None = None
        self.quantised = QuantisedWeights(policy) if quantization == "fp8" else None

    @property
    def speaks(self) -> bool:
        """Whether this rank is the one to tell others of what its ranks generate together."""
        return self.policy.mesh.is_model_leader

    def release(self) -> None:
        """Give back what is needed between rollout and update only. Before the process group is left, call it too."""
        self.steps = None
        if self.quantised is not None:
            self.quantised.release()

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Generate with the weights as they are, whatever they are quantised to in rollouts."""
        quantised, self.quantised = self.quantised, None
        try:
            yield
        finally:
            self.quantised = quantised

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Prompt],
        generations: int,
        sampling: Sampling,
        on_finish: OnFinish | None = None,
        limits: Limits | None = None,
    ) -> list[tuple[Completion, ...]]:
        """Sample `generations` completions of each prompt.

        `on_finish` is called as each completion ends, in the middle of generation, on every rank. `limits` (from 1 to
        `sampling.max_new_tokens`) end completions earlier.

        Raises:
            ValueError: not even one completion fits the cache.
        """
        policy, mesh = self.policy, self.policy.mesh
        finished: dict[tuple[int, int], Completion] = {}

        def finish(i: int, j: int, completion: Completion) -> None:
            finished[i, j] = completion
            if on_finish is not None:
                on_finish(i, j, completion)

        ends = [prompt.next_position + sampling.max_new_tokens for prompt in prompts]
        positions = max(ends, default=0)
        # Between virtual stages hidden states go round the ring: one lane, or two ranks could wait for each other.
        lanes = min(mesh.pp_size, len(prompts)) if len(policy.chunks) == 1 else min(1, len(prompts))
        made: list[tuple[Lane, CacheSize]] = []
        for first in range(lanes):
            mine = range(first, len(prompts), lanes)
            size = self._size([prompts[i] for i in mine], generations, sampling.max_new_tokens, lanes)
            requests = [
                Request(i, j, sampling.max_new_tokens if limits is None else limits[i][j])
                for i in mine
                for j in range(generations)
            ]
            lane = Lane(prompts, requests, size, sampling, self.max_prefill_tokens, finish, self.decode_text)
            made.append((lane, size))
        if self.decode_burst > 1:
            self._in_bursts(made, positions, min(self.decode_burst, sampling.max_new_tokens))
        else:
            self._tick_by_tick(made, positions)
        return [tuple(finished[i, j] for j in range(generations)) for i in range(len(prompts))]

    def _tick_by_tick(self, lanes: Sequence[tuple[Lane, CacheSize]], positions: int) -> None:
        forward, chunks = Forward(self.policy, positions, self.quantised), range(len(self.policy.chunks))
        pipes = [Pipe(lane, self._cache(forward, size), forward) for lane, size in lanes]
        self.cache_bytes = sum(pipe.cache.bytes for pipe in pipes)
        while any(pipe.lane.busy for pipe in pipes):
            mark()
            for chunk in chunks:
                for pipe in pipes:
                    pipe.work(chunk)

    def _in_bursts(self, lanes: Sequence[tuple[Lane, CacheSize]], positions: int, burst: int) -> None:
        for lane, size in lanes:  # one, or none
            steps = self._steps_for(size, positions + burst, burst)  # rows go on behind their ends
            self.cache_bytes = steps.cache.bytes
            bursts = Bursts(lane, steps)
            while lane.busy:
                mark()
                bursts.work()

    def _steps_for(self, size: CacheSize, positions: int, burst: int) -> Steps:
        """Return what the last call left, if it fits."""
        forward = Forward(self.policy, -(-positions // _ROUND) * _ROUND, self.quantised)
        if self.steps is None or not self.steps.serves(forward, size):
            self.steps = None  # before there is another cache
            self.steps = Steps(forward, self._cache(forward, size), self.recorder(), burst)
        return self.steps

    def _cache(self, forward: Forward, size: CacheSize) -> KvCache:
        dtype, text = self.policy.chunks[0].dtype, self.policy.shape.text
        return KvCache(size, forward.layers, forward.kv_heads, text.head_dim, dtype)

    def _size(self, prompts: Sequence[Prompt], generations: int, new_tokens: int, lanes: int) -> CacheSize:
        longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
        length = len(longest.token_ids)
        budget = self.max_cache_tokens // lanes
        size = fit(length, len(prompts), generations, new_tokens, budget)
        if size is not None and self.decode_burst > 1:
            roomy = fit(-(-length // _ROUND) * _ROUND, len(prompts), generations, new_tokens, budget)
            if roomy is not None and (roomy.rows, roomy.prompts) == (size.rows, size.prompts):
                size = roomy
        if size is None:
            each = f" for each of {lanes} pipeline stages" if lanes > 1 else ""
            raise ValueError(
                f"rollout.max_cache_tokens={self.max_cache_tokens} is too small: {longest.key} with one completion of "
                f"{new_tokens} tokens needs {length + new_tokens}{each}"
            )
        return size
