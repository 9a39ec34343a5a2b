"""A lane on one pipeline stage: forward passes, and the way of hidden states and tokens between stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_vlmr1.data.packing import PackedGroup, pack
from megatron_vlmr1.models.attention import AttentionPlan
from megatron_vlmr1.parallel import schedule
from megatron_vlmr1.rollout.forward import Forward, FusedAttend, Rotation
from megatron_vlmr1.rollout.kv_cache import Decode, KvCache, Prefill
from megatron_vlmr1.rollout.lane import Lane
from megatron_vlmr1.rollout.sampling import Choice, choose
from megatron_vlmr1.runtime import device
from megatron_vlmr1.types import ImagePatches, IntArray


@dataclass(frozen=True)
class _Job:
    """One forward pass over rows of tokens."""

    token_ids: torch.Tensor  # [T]
    rotation: Rotation
    attend: FusedAttend
    ends: torch.Tensor | None = None  # [P], rows that a token is sampled from; None: all
    images: tuple[ImagePatches, ...] = ()
    image_order: tuple[int, ...] = ()
    image_rows: torch.Tensor | None = None


class Pipe:
    """One lane's ticks on this stage."""

    def __init__(self, lane: Lane, cache: KvCache, forward: Forward) -> None:
        self.lane, self.cache, self.forward = lane, cache, forward
        self._jobs: list[_Job] = []
        self._open = False  # a tick has begun and its tokens are not taken yet
        self._chosen: torch.Tensor | None = None  # [3, n] float64 on the host: tokens and log-probs; last stage only
        self._sends: list[schedule.Sending] = []
        self._prompt_ends: dict[int, torch.Tensor] = {}  # last hidden states of prompts in the cache; last stage only

    def work(self, chunk: int) -> None:
        """Do this stage's part of a tick: one chunk of its layers."""
        if chunk == 0:
            self.settle()
            if not self.lane.busy:
                return
            self.lane.admit()
            self._jobs = ([self._decode_job()] if self.lane.decoding else []) + self._prefill_jobs()
            self._open = True
        if not self._open:
            return
        last = self.forward.policy.chunks[chunk].post_process
        ends = []
        for job in self._jobs:
            x = self.forward.run(chunk, self._input(chunk, job), job.rotation, job.attend)
            if last:
                ends.append(x if job.ends is None else x[job.ends])
            else:
                self._sends.append(schedule.send_to_next(x, self.forward.mesh))
        if last:
            self._sample(self._wanted(ends))

    def settle(self) -> None:
        """Take the tokens of the tick that is open, if one is."""
        if not self._open:
            return
        mesh = self.forward.mesh
        table = self._chosen
        if table is None:
            table = schedule.receive_from_last((3, self.lane.n), torch.float64, mesh)
        for sending in self._sends:
            sending.wait()
        self._open, self._chosen, self._sends = False, None, []
        values = table.numpy()
        self.lane.take(values[0].astype(np.int64), values[1:].astype(np.float32), self.cache)

    def _decode_job(self) -> _Job:
        lane = self.lane
        tokens, positions = lane.inputs()
        attend = Decode(self.cache, lane.occupancy(self.cache), lane.tick)
        return _Job(_tensor(tokens), self.forward.rotation_of_text(_tensor(positions)), attend)

    def _prefill_jobs(self) -> list[_Job]:
        lane, policy = self.lane, self.forward.policy
        if not lane.entering:
            return []
        prompts = [lane.prompts[i] for i in lane.entering]
        batch = pack([PackedGroup(prompt, (), ()) for prompt in prompts], policy.shape.image_token_id, 1)
        lengths = np.array([len(prompt.token_ids) for prompt in prompts])
        return [
            _Job(
                token_ids=_tensor(batch.token_ids),
                rotation=self.forward.rotation(_tensor(batch.positions)),
                attend=Prefill(self.cache, AttentionPlan(batch.segments), lane.entering_slots(), lengths),
                ends=_tensor(np.cumsum(lengths) - 1),
                images=batch.images,
                image_order=batch.image_order,
                image_rows=_tensor(batch.image_rows),
            )
        ]

    def _input(self, chunk: int, job: _Job) -> torch.Tensor:
        mesh, forward = self.forward.mesh, self.forward
        if mesh.is_first_stage and chunk == 0:
            x = forward.embed(job.token_ids)
            if job.images:
                assert job.image_rows is not None
                x = forward.embed_images(x, job.images, job.image_order, job.image_rows)
            return x
        size = (len(job.token_ids), forward.text.hidden_size)
        return schedule.receive_from_previous(size, forward.policy.chunks[0].dtype, device.device(), mesh)

    def _wanted(self, ends: list[torch.Tensor]) -> torch.Tensor:
        """Return the hidden states [n, hidden] that all rows' tokens are sampled from."""
        lane = self.lane
        wanted = ends[:1] if lane.decoding else []
        if lane.n > lane.decoding:
            self._prompt_ends |= dict(zip(lane.entering, ends[-1], strict=True)) if lane.entering else {}
            wanted.append(torch.stack([self._prompt_ends[i] for i in lane.new_rows_prompts()]))
        waits = lane.next_prompt()
        self._prompt_ends = {i: end for i, end in self._prompt_ends.items() if i == waits}
        return torch.cat(wanted)

    def _sample(self, hidden: torch.Tensor) -> None:
        """Sample a token for every row, and tell the other stages."""
        policy, sampling = self.forward.policy, self.lane.sampling
        random = None if sampling.greedy else _tensor(self.lane.uniforms())
        logits = policy.vocabulary.logits(hidden, policy.output_weight())
        seen = None
        if sampling.repetition_penalty != 1.0:
            seen = _seen(self.lane.history(), policy.vocabulary.start, logits)
        choice: Choice = choose(logits, policy.vocabulary, sampling, random, seen)
        self._chosen = torch.stack(
            (choice.tokens.double(), choice.logprobs, choice.drawn_logprobs)
        ).cpu()  # token ids are exact in float64
        self._sends += schedule.send_to_others(self._chosen, self.forward.mesh)


def _seen(history: list[IntArray], start: int, logits: torch.Tensor) -> torch.Tensor:
    """Return which of this rank's tokens [n, rows] occur in each row's history."""
    rows = np.repeat(np.arange(len(history)), [len(ids) for ids in history])
    local = np.concatenate(history) - start
    mine = (local >= 0) & (local < logits.shape[1])
    seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    seen[_tensor(rows[mine]), _tensor(local[mine])] = True
    return seen


def _tensor(values: npt.NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device.device())
