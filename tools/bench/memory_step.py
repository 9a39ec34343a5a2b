"""One rank of a measured GRPO step: random weights, drawn prompts and completions, everything else as in a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from megatron_vlmr1.config import Config, decoding_layout
from megatron_vlmr1.models.families import read_shape
from megatron_vlmr1.models.mrope import mrope_positions
from megatron_vlmr1.models.shape import VlmShape
from megatron_vlmr1.parallel import job
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.plan.load import Load
from megatron_vlmr1.plan.memory import PHASES
from megatron_vlmr1.types import Group, ImagePatches, Prompt
from tools.bench.checkpoint import resident
from tools.bench.memory_cases import Case, settings, step_load, write_model
from tools.bench.storages import LiveStorages

BANNED_BELOW = 16  # token ids that are not drawn, images' among them
STD = 0.02
MB = 1e6


def be_a_rank(case: Case, folder: Path, explain: bool) -> None:
    """Join the other ranks, measure, and write ``rank_R.json``."""
    cfg = settings(case, folder)
    with job.joined(cfg.parallel, 0) as mesh:
        torch.set_num_threads(1)
        found = measure(case, folder, mesh, explain)
        (folder / f"rank_{mesh.rank}.json").write_text(json.dumps(found))


def measure(case: Case, folder: Path, mesh: Mesh, explain: bool = False) -> dict[str, Any]:
    """Run two steps; return of the second one the peaks of memory, in bytes.

    Returns:
        ``stage``; ``peaks``, of the device, and ``rss``, growth of the process from before the models were made, by
        phase; ``host`` and ``resident`` (weights, gradients, optimizer), by part, as the tensors
        themselves have it; ``process``, resident memory before anything of this.
    """
    from megatron_vlmr1.runtime import distributed

    distributed.together(lambda: _ignored(write_model(case, folder)), only_first=True)
    directory, cfg = write_model(case, folder), settings(case, folder)
    before = resident("VmRSS")
    live = LiveStorages(explain)
    with live, _host_memory_marked(live):
        step = _Step(cfg, directory, mesh, step_load(case), live, before)
        step.run(1)
        step.run(2)
        step.last_save()
    return {
        "stage": mesh.pp_rank,
        "peaks": step.peaks,
        "rss": step.rss,
        "host": step.host,
        "resident": step.resident(),
        "process": before * MB,
    }


@contextmanager
def _host_memory_marked(live: LiveStorages) -> Iterator[None]:
    """Let the reference, saves that wait, and what is offloaded count as the host's."""
    from megatron_vlmr1.runtime import device

    make = device.host_empty
    device.host_empty = lambda *args: live.mark_host(make(*args))
    try:
        yield
    finally:
        device.host_empty = make


def _ignored(_: object) -> None:
    """Take a result that nobody needs."""


class _Step:
    """The parts of a run that hold memory."""

    def __init__(self, cfg: Config, directory: Path, mesh: Mesh, load: Load, live: LiveStorages, before: float) -> None:
        from megatron_vlmr1.grpo.reference import Reference
        from megatron_vlmr1.grpo.update import GrpoUpdate, Updater
        from megatron_vlmr1.models.policy import Policy
        from megatron_vlmr1.parallel import optimizer as parallel_optimizer
        from megatron_vlmr1.rollout.decoding_copy import CopyEngine
        from megatron_vlmr1.rollout.engine import Engine
        from megatron_vlmr1.runtime import device
        from megatron_vlmr1.train.checkpoints import Checkpoints

        self.cfg, self.mesh, self.load, self.live, self.before = cfg, mesh, load, live, before
        self.peaks: dict[str, int] = dict.fromkeys(PHASES, 0)
        self.rss: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.host: dict[str, int] = {}
        shape = read_shape(directory)
        banned = [*range(BANNED_BELOW), shape.image_token_id, shape.video_token_id, shape.vision_start_token_id]
        self.policy = Policy(
            shape, mesh, device.DTYPES[cfg.precision.dtype], banned, cfg.model.freeze_vision, cfg.recompute
        )
        with torch.no_grad():
            for name, parameter in (pair for chunk in self.policy.chunks for pair in chunk.named_parameters()):
                parameter.normal_(1.0 if "norm" in name or "ln_q" in name else 0.0, STD)
        reference = Reference(self.policy) if cfg.grpo.beta else None
        if reference is not None:
            self.host["reference"] = sum(value.nbytes for value in reference._values)
        self.optimizer = parallel_optimizer.build(cfg.optimizer, self.policy.wrap_for_training())
        self.update = GrpoUpdate(Updater(self.policy, self.optimizer, cfg), reference, _Phases(self))
        limits = cfg.rollout.max_cache_tokens, cfg.rollout.max_prefill_tokens
        decoding = decoding_layout(cfg)
        self.engine = (
            Engine(self.policy, _silent, *limits)
            if decoding is None
            else CopyEngine(self.policy, decoding, banned, _silent, *limits)
        )
        self.checkpoints = Checkpoints(cfg, mesh)
        self.actor: Any = SimpleNamespace(policy=self.policy, directory=directory)
        self.prompts = prompts(shape, load, mesh.dp_rank * load.prompts)
        live.ignore(image.patches.ctypes.data for prompt in self.prompts for image in prompt.images)

    def resident(self) -> dict[str, int]:
        """Bytes of weights, gradients and optimizer state on this rank."""
        buffers = [buffer for chunk in self.policy.ddp for buffer in chunk.buffers]
        weights = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in self.policy.parameters()}
        state: dict[int, int] = {}
        for tensor in (t for _, t in self.update.updater.replicas._optimizer_state()):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                state[storage._cdata] = storage.nbytes()
        gradients = sum(buffer.grad_data.untyped_storage().nbytes() for buffer in buffers)
        return {"weights": sum(weights.values()), "gradients": gradients, "optimizer": sum(state.values())}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note the peaks of a block; within another phase, of that one only until here."""
        self.live.begin()
        Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory begins anew
        yield
        self.end(name)

    def end(self, name: str) -> None:
        """Note the peaks since the phase began, and begin the next."""
        if self.live.peak > self.peaks[name] and self.live.at_peak:
            print(f"--- {name}: {self.live.peak / MB:.2f} MB")
            for place, size in self.live.at_peak.most_common(25):
                print(f"{size / MB:9.3f}  {place}")
        self.peaks[name] = max(self.peaks[name], self.live.peak)
        self.rss[name] = max(self.rss[name], (resident("VmHWM") - self.before) * MB)
        self.live.begin()
        Path("/proc/self/clear_refs").write_text("5")

    def run(self, number: int) -> None:
        """Take one step; peaks of the one before are forgotten."""
        from megatron_vlmr1.rollout.sampling import Sampling

        self.peaks = dict.fromkeys(PHASES, 0)
        self.rss = dict.fromkeys(PHASES, 0.0)
        load, updater = self.load, self.update.updater
        updater.offload.before_generation()
        with self.phase("rollout"):
            cfg = self.cfg.rollout
            sampling = Sampling(
                load.new_tokens, frozenset(), cfg.temperature, seed=number, top_k=cfg.top_k, top_p=cfg.top_p
            )
            completions = self.engine.generate(self.prompts, load.generations, sampling)
        rng = np.random.default_rng(number)
        groups = [
            Group(prompt, row, (), rng.standard_normal(len(row)).astype(np.float32))
            for prompt, row in zip(self.prompts, completions, strict=True)
        ]
        assert all(len(c.token_ids) == load.new_tokens for row in completions for c in row)
        self.engine.release()
        with self.phase("update"):
            metrics = self.update(groups, 1e-5)
        assert not metrics["train/skipped"], metrics
        self.policy.forget_features()
        updater.replicas.check()
        progress = {"step": number, "consumed_samples": 0, "config": self.cfg.model_dump(mode="json")}
        with self.phase("save"):
            updater.offload.before_step()
            assert self.checkpoints.save(self.actor, self.optimizer, progress, {})
        updater.offload.after_step()
        self.host["staged save"] = self.checkpoints._staging.nbytes
        if updater.offload.host_bytes:
            self.host["offloaded optimizer"] = updater.offload.host_bytes
        while self.checkpoints.under_way:
            self.checkpoints.poll()

    def last_save(self) -> None:
        """Save as a run does at its end; note what that takes of the host's memory."""
        self.checkpoints._staging.clear()
        self.update.updater.offload.before_step()
        self.live.begin()
        before = self.live.peak
        progress = {"step": 3, "consumed_samples": 0, "config": self.cfg.model_dump(mode="json")}
        assert self.checkpoints.save(self.actor, self.optimizer, progress, {}, last=True, wait=True)
        self.host["last save"] = self.live.peak - before


class _Phases:
    """In place of the run's timers: log-probs are a phase within the update."""

    def __init__(self, step: _Step) -> None:
        self._step = step

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._step.end("update")
        yield
        self._step.end(name)


def _silent(_: object) -> str:
    """Decode nothing: there is no tokenizer."""
    return ""


def prompts(shape: VlmShape, load: Load, first: int) -> list[Prompt]:
    """Draw the prompts of a load; their positions count from `first`, and every image is another one."""
    out = []
    for position in range(first, first + load.prompts):
        rng = np.random.default_rng(position)
        ids: list[int] = []
        images = []
        for number, grid in enumerate(load.grids):
            images.append(_image(shape, grid, position * len(load.grids) + number))
            count = grid[1] * grid[2] // shape.vision.merge_unit
            ids += [shape.vision_start_token_id, *[shape.image_token_id] * count]
        ids += rng.integers(BANNED_BELOW, 400, load.prompt_tokens - len(ids)).tolist()
        assert len(ids) == load.prompt_tokens, "the image does not fit the prompt"
        tokens = np.array(ids, dtype=np.int64)
        places = mrope_positions(tokens, load.grids, shape.image_token_id, shape.vision.spatial_merge_size)
        out.append(Prompt(position, str(position), tokens, places, tuple(images), "", ""))
    return out


def _image(shape: VlmShape, grid: Sequence[int], seed: int) -> ImagePatches:
    v = shape.vision
    size = grid[1] * grid[2], v.in_channels, v.patch_size**2
    patches = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    pixels = grid[2] * v.patch_size, grid[1] * v.patch_size
    return ImagePatches(patches, (1, grid[1], grid[2]), pixels, hashlib.sha256(patches.tobytes()).digest())
