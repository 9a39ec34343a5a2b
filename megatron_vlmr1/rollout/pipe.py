"""A lane on one pipeline stage: forward passes, and the way of hidden states and tokens between stages."""

from __future__ import annotations

import numpy as np
import torch

from megatron_vlmr1.parallel import schedule
from megatron_vlmr1.rollout.forward import Forward
from megatron_vlmr1.rollout.kv_cache import Decode, KvCache
from megatron_vlmr1.rollout.lane import Lane
from megatron_vlmr1.rollout.prefill import Job, PromptEnds, prefill_job, tensor
from megatron_vlmr1.rollout.sampling import choose, seen_tokens
from megatron_vlmr1.runtime import device


class Pipe:
    """One lane's ticks on this stage."""

    def __init__(self, lane: Lane, cache: KvCache, forward: Forward) -> None:
        self.lane, self.cache, self.forward = lane, cache, forward
        self._jobs: list[Job] = []
        self._open = False  # a tick has begun and its tokens are not taken yet
        self._chosen: torch.Tensor | None = None  # [3, n] float64 on the host: tokens and log-probs; last stage only
        self._sends: list[schedule.Sending] = []
        self._prompt_ends = PromptEnds()  # last stage only

    def work(self, chunk: int) -> None:
        """Do this stage's part of a tick: one chunk of its layers."""
        if chunk == 0:
            self.settle()
            if not self.lane.busy:
                return
            self.lane.admit()
            self._jobs = [self._decode_job()] if self.lane.decoding else []
            if self.lane.entering:
                self._jobs.append(prefill_job(self.lane, self.cache, self.forward))
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

    def _decode_job(self) -> Job:
        lane = self.lane
        tokens, positions = lane.inputs()
        attend = Decode(self.cache, lane.occupancy(self.cache), lane.tick)
        return Job(tensor(tokens), self.forward.rotation_of_text(tensor(positions)), attend)

    def _input(self, chunk: int, job: Job) -> torch.Tensor:
        mesh, forward = self.forward.mesh, self.forward
        if mesh.is_first_stage and chunk == 0:
            return job.embedded(forward)
        size = (len(job.token_ids), forward.text.hidden_size)
        return schedule.receive_from_previous(size, forward.policy.chunks[0].dtype, device.device(), mesh)

    def _wanted(self, ends: list[torch.Tensor]) -> torch.Tensor:
        """Return the hidden states [n, hidden] that all rows' tokens are sampled from."""
        lane = self.lane
        wanted = ends[:1] if lane.decoding else []
        return torch.cat(wanted + self._prompt_ends.of_new_rows(lane, ends[-1] if lane.entering else ()))

    def _sample(self, hidden: torch.Tensor) -> None:
        """Sample a token for every row, and tell the other stages."""
        policy, sampling = self.forward.policy, self.lane.sampling
        random = None if sampling.greedy else tensor(self.lane.uniforms())
        logits = policy.vocabulary.logits(hidden, policy.output_weight())
        seen = seen_tokens(self.lane.history(), policy.vocabulary) if sampling.penalises else None
        choice = choose(logits, policy.vocabulary, sampling, random, seen)
        self._chosen = choice.table().cpu()
        self._sends += schedule.send_to_others(self._chosen, self.forward.mesh)
