"""The policy update: groups to packed micro-batches, through the schedule, a finite check, a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megatron_vlmr1.config import Config
from megatron_vlmr1.config.rules import token_multiple
from megatron_vlmr1.data.costs import update_cost
from megatron_vlmr1.data.packing import MicroBatch, PackedGroup, model_input, pack, split_by_tokens
from megatron_vlmr1.errors import STOPPED, RunStopped
from megatron_vlmr1.grpo.algorithms import ALGORITHMS
from megatron_vlmr1.grpo.losses import Counts, Tokens, k3, mean_of_means, truncated_importance
from megatron_vlmr1.grpo.reference import Reference
from megatron_vlmr1.models.policy import Policy
from megatron_vlmr1.parallel import optimizer as parallel_optimizer
from megatron_vlmr1.parallel import reduce, schedule
from megatron_vlmr1.parallel.offload import Offload
from megatron_vlmr1.parallel.replicas import Replicas
from megatron_vlmr1.runtime import device
from megatron_vlmr1.telemetry.timers import PhaseTimers
from megatron_vlmr1.types import FloatArray, Group

Metrics = dict[str, float]
Loss = Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, schedule.Result]]


@dataclass(frozen=True)
class _Tables:
    """Numbers of this rank's completions; a row is a slot of `PackedGroup`, a column a token's position."""

    advantages: torch.Tensor  # [n]
    lengths: torch.Tensor  # [n]
    rollout_logprobs: torch.Tensor  # [n, L], at T=1
    drawn_logprobs: torch.Tensor  # [n, L], under the distribution that tokens were drawn from
    old_logprobs: torch.Tensor | None  # [n, L]
    reference_logprobs: torch.Tensor | None  # [n, L]
    counts: Counts


class Updater:
    """Turns micro-batches and a loss into optimizer steps; shared by grpo and sft."""

    def __init__(self, policy: Policy, optimizer: MegatronOptimizer, cfg: Config) -> None:
        self.policy, self.optimizer, self.cfg = policy, optimizer, cfg
        self.bad_steps = 0  # in a row
        self.not_finite = 0  # since the start
        self.replicas = Replicas(policy.chunks, optimizer, policy.mesh, cfg.train.replica_check_every)
        self.offload = Offload(policy.ddp, optimizer, cfg.optimizer.offload)

    def micro_batches(self, groups: Sequence[PackedGroup]) -> list[MicroBatch]:
        """Pack this rank's groups; at least one micro-batch, an empty one where there is no group."""
        mesh, train = self.policy.mesh, self.cfg.train
        multiple = token_multiple(self.cfg.precision, mesh.layout)
        budget = train.micro_batch_tokens // multiple * multiple  # with its padding a micro-batch still fits
        parts = split_by_tokens(groups, budget, train.micro_batches or mesh.pp_size, self._cost) or [[]]
        if mesh.vp_size > 1:  # the interleaved schedule goes round the stages in whole turns
            parts += [[] for _ in range(-len(parts) % mesh.pp_size)]
        return [pack(part, self.policy.shape.image_token_id, multiple) for part in parts]

    def _cost(self, group: PackedGroup) -> int:
        lengths = [len(tokens) for tokens in group.completions]
        return update_cost(self.policy.shape, group.prompt, lengths, self.policy.freeze_vision)

    def logprobs(self, batches: Sequence[MicroBatch], size: tuple[int, int]) -> torch.Tensor:
        """Compute log-probs without gradients into a table [slots, positions]; filled on the last stage only."""
        table = torch.zeros(size, device=device.device())

        def collect(hidden: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, schedule.Result]:
            values, _ = self.policy.logprobs(hidden, *label_tensors(batch))
            table[_cells(batch)] = values
            return values.new_zeros(()), {}

        with torch.no_grad():
            self._run(self.policy.chunks, batches, collect, forward_only=True)
        return table

    def step(self, batches: Sequence[MicroBatch], loss: Loss, lr: float) -> tuple[list[schedule.Result], Metrics]:
        """One optimizer step: forward, backward, finite check, update.

        Returns:
            The last stage's results of each micro-batch, and `train/*` metrics.

        Raises:
            RunStopped: loss or gradients were not finite three times in a row, or copies of the parameters differ; exit
                code 17.
        """
        assert self.policy.ddp
        if self.offload.when == "always":
            self.replicas.check()
        else:
            self.check_state()
        self.offload.before_backward()
        for chunk in self.policy.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = self._run(self.policy.ddp, batches, loss)
        losses = [result["loss"] for result in results if "loss" in result]
        if not parallel_optimizer.gradients_finite(self.policy.ddp, losses):
            self.bad_steps += 1
            self.not_finite += 1
            if self.bad_steps >= 3:
                raise RunStopped(STOPPED, "loss or gradients were not finite in three steps in a row")
            return results, {"train/grad_norm": float("nan"), "train/lr": lr, "train/skipped": 1.0}
        self.bad_steps = 0
        parallel_optimizer.set_learning_rate(self.optimizer, lr)
        if self.offload.when == "always":
            self.check_state()
        _, grad_norm, _ = self.optimizer.step()
        self.policy.gather_parameters()
        self.replicas.remember()
        self.offload.after_step()
        self.policy.weights_changed(tower=not self.policy.freeze_vision)
        return results, {"train/grad_norm": float(grad_norm or 0.0), "train/lr": lr, "train/skipped": 0.0}

    def check_state(self, always: bool = False) -> None:
        """Bring the optimizer's state back if it is away, and compare it and the parameters, as `Replicas.check` does.

        Raises:
            RunStopped: something differs (exit code 17); on all ranks.
        """
        self.offload.before_step()
        self.replicas.check(state=True, always=always)

    def _run(
        self, chunks: Sequence[torch.nn.Module], batches: Sequence[MicroBatch], loss: Loss, forward_only: bool = False
    ) -> list[schedule.Result]:
        self.policy.settle()

        def forward(chunk: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
            return chunk(model_input(batch, self.policy))

        return schedule.run(chunks, batches, forward, loss, self.policy.mesh, forward_only)


def label_tensors(batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows that predict labels and the labels [R], on the device."""
    where = device.device()
    return torch.from_numpy(batch.label_rows).to(where), torch.from_numpy(batch.label_ids).to(where)


def _cells(batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    where = device.device()
    return torch.from_numpy(batch.label_slots).to(where), torch.from_numpy(batch.label_index).to(where)


def _table(rows: Sequence[FloatArray]) -> torch.Tensor:
    """Return rows [n] of unlike lengths as one table [n, longest], zeros behind them."""
    table = np.zeros((len(rows), max(map(len, rows), default=0)), dtype=np.float32)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(table).to(device.device())


_SUMS = ("loss", "kl", "clipped", "capped", "entropy", "tokens")
_MAXIMA = ("ratio_max", "gap")


class GrpoUpdate:
    """Optimizer steps on groups with advantages, by the loss and the average of `grpo.algorithm`.

    Everything is divided by counts over all data-parallel ranks, so the gradient depends neither on how the batch is
    cut into micro-batches nor on which rank has which groups.
    """

    def __init__(self, updater: Updater, reference: Reference | None, timers: PhaseTimers | None = None) -> None:
        self.updater, self.reference = updater, reference
        self.timers = timers or PhaseTimers()
        self.cfg = updater.cfg.grpo
        self.algorithm = ALGORITHMS[self.cfg.algorithm]

    def __call__(self, groups: Sequence[Group], lr: float) -> Metrics:
        """Take `grpo.num_iterations` optimizer steps. A completion without an advantage takes no part.

        Where none has one that says anything, on any rank, there is no gradient: the optimizer does not step, not even
        by its momentum. After a step whose gradients are not finite, the same batch is not tried again.

        Returns:
            `grpo/*`, `train/*` and `rollout/logprob_gap`, over all ranks. `train/skipped` counts optimizer steps that
            were not taken, the gap is that of the first iteration, all else is of the last. `grpo/kl` is the mean over
            completions of each one's mean over tokens, whatever the algorithm's own average. What was not computed is
            not there.
        """
        packed, tables = self._prepare(groups)
        iterations = self.cfg.num_iterations
        if not self._says_anything(tables):
            return {"train/tokens": 0.0, "train/grad_norm": 0.0, "train/lr": lr, "train/skipped": float(iterations)}
        batches = self.updater.micro_batches(packed)
        tables = self._with_passes(tables, batches)
        metrics: Metrics = {}
        for iteration in range(iterations):
            results, train = self.updater.step(batches, self._loss(tables), lr)
            metrics |= train | self._report(results, first=iteration == 0)
            if train["train/skipped"]:
                metrics["train/skipped"] = float(iterations - iteration)
                break
        return metrics

    def _says_anything(self, tables: _Tables) -> bool:
        """Whether there is a gradient: an advantage that is not zero, or completions to hold near the reference."""
        said = tables.advantages if self.reference is None else torch.ones_like(tables.advantages)
        number = said.count_nonzero()
        dist.all_reduce(number, group=self.updater.policy.mesh.dp_group)
        return bool(number)

    def _prepare(self, groups: Sequence[Group]) -> tuple[list[PackedGroup], _Tables]:
        packed: list[PackedGroup] = []
        advantages: list[float] = []
        logprobs: list[FloatArray] = []
        drawn: list[FloatArray] = []
        for group in groups:
            assert group.advantages is not None
            kept = [i for i, a in enumerate(group.advantages) if np.isfinite(a)]
            if kept:
                slots = tuple(range(len(advantages), len(advantages) + len(kept)))
                completions = tuple(group.completions[i].token_ids for i in kept)
                packed.append(PackedGroup(group.prompt, completions, slots))
                advantages += [float(group.advantages[i]) for i in kept]
                made = [group.completions[i] for i in kept]
                logprobs += [c.logprobs for c in made]
                drawn += [c.logprobs if c.drawn_logprobs is None else c.drawn_logprobs for c in made]
        where = device.device()
        return packed, _Tables(
            advantages=torch.tensor(advantages, dtype=torch.float32, device=where),
            lengths=torch.tensor([len(v) for v in logprobs], dtype=torch.float32, device=where),
            rollout_logprobs=_table(logprobs),
            drawn_logprobs=_table(drawn),
            old_logprobs=None,
            reference_logprobs=None,
            counts=self._counts(len(logprobs), sum(map(len, logprobs))),
        )

    def _counts(self, completions: int, tokens: int) -> Counts:
        both = torch.tensor([completions, tokens], device=device.device())
        dist.all_reduce(both, group=self.updater.policy.mesh.dp_group)
        return Counts(int(both[0]), int(both[1]), self.updater.cfg.rollout.max_new_tokens)

    def _with_passes(self, tables: _Tables, batches: list[MicroBatch]) -> _Tables:
        """Add what needs a forward pass: reference log-probs, and old ones where there are several steps."""
        n, length = tables.rollout_logprobs.shape
        reference = old = None
        with self.timers("logprobs"):
            # First the old ones: the reference may have another tower, and the embeddings kept from rollout go.
            if self.cfg.num_iterations > 1:
                old = self.updater.logprobs(batches, (n, length))
            if self.reference is not None:
                with self.reference.swapped_in():
                    reference = self.updater.logprobs(batches, (n, length))
        return replace(tables, old_logprobs=old, reference_logprobs=reference)

    def _loss(self, tables: _Tables) -> Loss:
        cfg, policy = self.cfg, self.updater.policy
        weights = self.algorithm.weights(tables.lengths, tables.counts)
        kl_weights = mean_of_means(tables.lengths, tables.counts)

        def loss(hidden: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, schedule.Result]:
            logprobs, entropy = policy.logprobs(hidden, *label_tensors(batch))
            cells = _cells(batch)
            completions = cells[0]
            # One step per rollout: the policy that generated is the current one, and the ratio exactly one. Both are
            # at T=1 over all tokens, as published; what sampling made of them is for truncated importance to weigh.
            old = logprobs.detach() if tables.old_logprobs is None else tables.old_logprobs[cells]
            tokens = Tokens(logprobs, old, tables.advantages[completions], completions, tables.lengths)
            per_token, ratio, clipped = self.algorithm.loss(tokens, cfg.epsilon_low, cfg.epsilon_high)
            rollout = tables.rollout_logprobs[cells]
            capped = torch.zeros_like(clipped)
            if cfg.truncated_importance is not None:
                importance, capped = truncated_importance(old, tables.drawn_logprobs[cells], cfg.truncated_importance)
                per_token = importance * per_token
            kl = torch.zeros_like(logprobs)
            if tables.reference_logprobs is not None:
                kl = k3(logprobs, tables.reference_logprobs[cells])
                per_token = per_token + cfg.beta * kl
            value = (per_token * weights[completions]).sum()
            gap = (logprobs.detach() - rollout).abs()
            return value, {
                "loss": value.detach(),
                "kl": (kl.detach() * kl_weights[completions]).sum(),
                "clipped": clipped.sum(),
                "capped": capped.sum(),
                "entropy": entropy.sum(),
                "tokens": torch.tensor(float(len(entropy))),
                "ratio_max": ratio.max() if len(ratio) else torch.zeros(()),
                "gap": gap.max() if len(gap) else torch.zeros(()),
            }

        return loss

    def _report(self, results: list[schedule.Result], first: bool) -> Metrics:
        sums = {k: sum(float(r[k]) for r in results) for k in _SUMS}
        tops = {k: float(np.max([float(r[k]) for r in results], initial=0.0)) for k in _MAXIMA}  # NaN stays NaN
        mesh = self.updater.policy.mesh
        speaks = mesh.is_last_stage and mesh.tp_rank == 0
        m = reduce.sums(sums, speaks) | reduce.maxima(tops, speaks)
        tokens = max(1.0, m["tokens"])
        out = {
            "train/loss": m["loss"],
            "grpo/clip_frac": m["clipped"] / tokens,
            "grpo/entropy": m["entropy"] / tokens,
            "grpo/ratio_max": m["ratio_max"],
            "train/tokens": m["tokens"],
        }
        if self.reference is not None:
            out["grpo/kl"] = m["kl"]
        if self.cfg.truncated_importance is not None:
            out["grpo/tis_capped_frac"] = m["capped"] / tokens
        return out | ({"rollout/logprob_gap": m["gap"]} if first else {})
