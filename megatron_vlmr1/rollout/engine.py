"""Generation on the training weights: one prefill per prompt for all its completions, then decoding together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_vlmr1.data.packing import PackedGroup, model_input, pack
from megatron_vlmr1.models.attention import AttentionPlan
from megatron_vlmr1.models.policy import Policy
from megatron_vlmr1.models.vlm import ModelInput
from megatron_vlmr1.parallel.schedule import broadcast_from_last, receive_from_previous, send_to_next
from megatron_vlmr1.rollout.kv_cache import GroupCache
from megatron_vlmr1.rollout.sampling import Sampling, choose, uniforms
from megatron_vlmr1.runtime import device
from megatron_vlmr1.types import Completion, FloatArray, IntArray, Prompt

OnFinish = Callable[[int, int, Completion], None]  # prompt index, completion index, completion


class Engine:
    """Samples completions. All ranks that hold one copy of the model call it with the same prompts."""

    def __init__(self, policy: Policy, decode_text: Callable[[IntArray], str], max_cache_tokens: int) -> None:
        """`decode_text` turns token ids (without the stop token) into text; `max_cache_tokens` bounds the cache."""
        self.policy = policy
        self.decode_text = decode_text
        self.max_cache_tokens = max_cache_tokens

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        generations: int,
        sampling: Sampling,
        on_finish: OnFinish | None = None,
    ) -> list[tuple[Completion, ...]]:
        """Sample `generations` completions of each prompt.

        `on_finish` is called as each completion ends, in the middle of generation, on every rank.

        Raises:
            ValueError: one prompt with its completions does not fit the cache.
        """
        out: list[tuple[Completion, ...]] = []
        for wave in self._waves(prompts, generations, sampling.max_new_tokens):
            run = _Wave(self, [prompts[i] for i in wave], generations, sampling)
            offset = wave[0]
            finish = None if on_finish is None else lambda i, j, c, o=offset: on_finish(o + i, j, c)
            out += run.generate(finish)
        return out

    def _waves(self, prompts: Sequence[Prompt], generations: int, max_new_tokens: int) -> list[list[int]]:
        waves: list[list[int]] = []
        room = 0
        for i, prompt in enumerate(prompts):
            need = len(prompt.token_ids) + generations * max_new_tokens
            if need > self.max_cache_tokens:
                raise ValueError(
                    f"rollout.max_cache_tokens={self.max_cache_tokens} is too small: {prompt.key} with "
                    f"{generations} completions of {max_new_tokens} tokens needs {need}"
                )
            if need > room:
                waves.append([])
                room = self.max_cache_tokens
            waves[-1].append(i)
            room -= need
        return waves

    def hidden(self, inputs: ModelInput) -> torch.Tensor | None:
        """Run all stages; the last stage's hidden states, or None on the others."""
        mesh = self.policy.mesh
        rows = inputs.token_ids.shape[0] // (mesh.tp_size if mesh.sequence_parallel else 1)
        shape = (rows, 1, self.policy.shape.text.hidden_size)
        for chunk in self.policy.chunks:
            if not chunk.pre_process:
                chunk.set_input_tensor(receive_from_previous(shape, chunk.dtype, inputs.token_ids.device, mesh))
            out = chunk(inputs)
            chunk.set_input_tensor(None)
            if chunk.post_process:
                return out
            send_to_next(out, mesh)
        return None


class _Wave:
    """Prompts whose keys are in the cache together, until the last of their completions ends."""

    def __init__(self, engine: Engine, prompts: list[Prompt], generations: int, sampling: Sampling) -> None:
        self.engine, self.policy, self.prompts, self.sampling = engine, engine.policy, prompts, sampling
        self.g = generations
        n, steps = len(prompts) * generations, sampling.max_new_tokens
        self.tokens = np.zeros((n, steps), dtype=np.int64)
        self.logprobs = np.zeros((n, steps), dtype=np.float32)
        self.done = np.zeros(n, dtype=bool)
        self.finished: list[Completion | None] = [None] * n
        self.live = np.arange(len(prompts))  # groups still in the cache
        self.stop = np.array(sorted(sampling.stop_ids), dtype=np.int64)
        self.cache = GroupCache([len(p.token_ids) for p in prompts], generations, steps)
        mesh = self.policy.mesh
        self.multiple = mesh.tp_size if mesh.sequence_parallel else 1

    def generate(self, on_finish: OnFinish | None) -> list[tuple[Completion, ...]]:
        hidden, rows = self._prefill()
        for step in range(self.sampling.max_new_tokens):
            self._sample(step, hidden, rows, on_finish)
            self._drop_finished_groups()
            if not len(self.live) or step + 1 == self.sampling.max_new_tokens:
                break
            hidden, rows = self._decode(step)
        completions = [c for c in self.finished if c is not None]
        return [tuple(completions[i : i + self.g]) for i in range(0, len(completions), self.g)]

    def _prefill(self) -> tuple[torch.Tensor | None, torch.Tensor]:
        batch = pack([PackedGroup(p, (), ()) for p in self.prompts], self.policy.shape.image_token_id, self.multiple)
        inputs = model_input(batch, self.policy)
        assert isinstance(inputs.attend, AttentionPlan)
        hidden = self.engine.hidden(replace(inputs, attend=self.cache.prefill(inputs.attend)))
        ends = np.cumsum([len(p.token_ids) for p in self.prompts]) - 1
        return hidden, torch.from_numpy(np.repeat(ends, self.g)).to(device.device())

    def _decode(self, step: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        rows = self._rows()
        n = len(rows)
        padding = -n % self.multiple
        token_ids = np.concatenate((self.tokens[rows, step], np.zeros(padding, dtype=np.int64)))
        starts = np.repeat([self.prompts[i].next_position for i in self.live], self.g) + step
        positions = np.broadcast_to(np.concatenate((starts, np.zeros(padding, dtype=np.int64))), (3, n + padding))
        self.cache.length = step
        where = device.device()
        inputs = ModelInput(
            torch.from_numpy(token_ids).to(where), torch.from_numpy(positions.copy()).to(where), self.cache.decode()
        )
        return self.engine.hidden(inputs), torch.arange(n, device=where)

    def _rows(self) -> IntArray:
        return (self.live[:, None] * self.g + np.arange(self.g)).reshape(-1)

    def _sample(
        self, step: int, hidden: torch.Tensor | None, hidden_rows: torch.Tensor, on_finish: OnFinish | None
    ) -> None:
        rows = self._rows()
        tokens, logprobs = self._choose(step, rows, hidden, hidden_rows)
        fresh = ~self.done[rows]
        self.tokens[rows, step] = tokens
        self.logprobs[rows, step] = logprobs
        stopped = np.isin(tokens, self.stop)
        last = step + 1 == self.sampling.max_new_tokens
        for i in np.flatnonzero(fresh & (stopped | last)):
            row = rows[i]
            self.done[row] = True
            ids = self.tokens[row, : step + 1].copy()
            text = self.engine.decode_text(ids[:-1] if stopped[i] else ids)
            reason = "stop" if stopped[i] else "length"
            completion = Completion(ids, self.logprobs[row, : step + 1].copy(), reason, text)  # type: ignore[arg-type]
            self.finished[row] = completion
            if on_finish is not None:
                on_finish(int(row) // self.g, int(row) % self.g, completion)

    def _choose(
        self, step: int, rows: IntArray, hidden: torch.Tensor | None, hidden_rows: torch.Tensor
    ) -> tuple[IntArray, FloatArray]:
        where = device.device()
        both = torch.empty(2, len(rows), dtype=torch.float64, device=where)  # token ids are exact in float64
        if hidden is not None:
            random = None
            if not self.sampling.greedy:
                ids = np.array([self.prompts[row // self.g].position for row in rows], dtype=np.int64)
                random = torch.from_numpy(uniforms(self.sampling.seed, ids, rows % self.g, step)).to(where)
            logits = self.policy.logits(hidden, hidden_rows)
            both[0], both[1] = choose(logits, self.policy.vocabulary, self.sampling, random)
        broadcast_from_last(both, self.policy.mesh)
        values = both.cpu().numpy()
        return values[0].astype(np.int64), values[1].astype(np.float32)

    def _drop_finished_groups(self) -> None:
        open_ = ~np.all(self.done.reshape(-1, self.g)[self.live], axis=1)
        if not open_.all():
            self.cache.keep(torch.from_numpy(np.flatnonzero(open_)).to(device.device()))
            self.live = self.live[open_]
