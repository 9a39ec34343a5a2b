"""A run's checkpoints: the Hugging Face directory and the state, through the store."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from megatron.core.optimizer import MegatronOptimizer

from megatron_vlmr1 import config
from megatron_vlmr1.checkpoint import state, writer
from megatron_vlmr1.checkpoint.store import Store, flush_tree
from megatron_vlmr1.config import Config
from megatron_vlmr1.errors import STOPPED, RunStopped
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.rollout.actor import Actor
from megatron_vlmr1.runtime import distributed
from megatron_vlmr1.runtime.ranks import identity

logger = logging.getLogger(__name__)

_FAILURES = 3  # failed saves in a row, before the run stops itself
# What may differ when a run goes on: it does not change what a step computes.
_FREE_SECTIONS = ("parallel.", "recompute.", "evaluate.", "data.evaluate.", "telemetry.")
_FREE_KEYS = {
    "run_dir",
    "rollout.max_cache_tokens",
    "rollout.max_prefill_tokens",
    "rollout.tensor_model_parallel_size",
    "rollout.pipeline_model_parallel_size",
    "rewards.workers",
    "rewards.deadline_s",
    "train.steps",
    "train.micro_batch_tokens",
    "train.micro_batches",
    "train.balance",
    "train.replica_check_every",
    "train.spike_factor",
    "train.spike_window",
    "train.save_every",
    "train.keep_checkpoints",
    "train.evaluate_every",
    "train.sample_every",
    "debug.save_rollouts",
    "data.workers",
    "data.prefetch",
    "data.prefetch_bytes",
    "data.worker_timeout_s",
    "data.cache_dir",
    "data.cache_bytes",
    "data.fetch_timeout_s",
}


class Checkpoints:
    """Saves and finds the checkpoints of one run; all ranks call every method."""

    def __init__(self, cfg: Config, mesh: Mesh) -> None:
        self.cfg, self.mesh = cfg, mesh
        self.store = Store(Path(cfg.run_dir) / "checkpoints", cfg.train.keep_checkpoints)
        self._failed = 0

    def newest(self) -> Path | None:
        """Let rank 0 clean up and verify; all ranks take the newest valid checkpoint, or None."""
        found = ""
        if self.mesh.rank == 0:
            self.store.clean()
            newest = self.store.newest_valid()
            found = str(newest[0]) if newest else ""
        found = distributed.broadcast_text(found)
        if not found:
            return None
        logger.info("resuming from %s", self.store.path(int(found)))
        return self.store.path(int(found))

    def restore(self, actor: Actor, optimizer: MegatronOptimizer, path: Path) -> dict[str, Any]:
        """Restore the state beside weights that are loaded already, and return the run's progress.

        Raises:
            ValueError: the run was started with a config that means something else; names the first such key.
        """
        progress = state.load(actor.policy, optimizer, path / "state")
        check_config(self.cfg, progress["config"])
        return progress

    def save(self, actor: Actor, optimizer: MegatronOptimizer, progress: dict[str, Any]) -> bool:
        """Write and publish the checkpoint of ``progress["step"]``; a failing disk is survived twice in a row.

        Returns:
            Whether it was published.

        Raises:
            RunStopped: the third save in a row failed (exit code 17).
        """
        step = int(progress["step"])
        try:
            temporary = self._begin(step)
            try:
                self._write(actor, optimizer, progress, temporary)
            except OSError:
                if self.mesh.rank == 0:
                    self.store.discard(temporary)
                raise
            distributed.agree(self._publish(step, temporary) if self.mesh.rank == 0 else "")
        except OSError as error:  # the same on all ranks
            self._failed += 1
            logger.error("checkpoint of step %d failed (%d in a row): %s", step, self._failed, error)
            if self._failed >= _FAILURES:
                raise RunStopped(STOPPED, f"{_FAILURES} checkpoints in a row could not be saved: {error}") from error
            return False
        self._failed = 0
        logger.info("checkpoint of step %d: %s", step, self.store.path(step))
        return True

    def _begin(self, step: int) -> Path:
        name = problem = ""
        if self.mesh.rank == 0:
            try:
                temporary = self.store.begin(step)
                name = temporary.name
                (temporary / "hf").mkdir()
                (temporary / "state").mkdir()
            except OSError as error:
                problem = str(error)
                if name:
                    self.store.discard(temporary)
        distributed.agree(problem)
        return self.store.directory / distributed.broadcast_text(name)

    def _write(self, actor: Actor, optimizer: MegatronOptimizer, progress: dict[str, Any], temporary: Path) -> None:
        """Write all files.

        Raises:
            OSError: some rank could not; the same line on every rank.
        """
        writer.save(actor.policy.chunks, actor.directory, temporary / "hf")
        state.save(actor.policy, optimizer, progress, temporary / "state")
        me, problem = identity(), ""
        if me is not None and me.local_rank == 0 and self.mesh.rank != 0:
            try:
                flush_tree(temporary)  # rank 0 flushes what its own node wrote as it publishes
            except OSError as error:
                problem = str(error)
        distributed.agree(problem)

    def _publish(self, step: int, temporary: Path) -> str:
        facts = {
            "layout": self.mesh.describe(),
            "config_sha256": hashlib.sha256(json.dumps(self.cfg.model_dump(mode="json")).encode()).hexdigest(),
            "optimizer": state.SHARDING,
        }
        try:
            self.store.publish(step, temporary, facts)
        except OSError as error:
            return str(error)
        return ""


def check_config(cfg: Config, saved: dict[str, Any]) -> None:
    """Compare a config with the one that its run directory was started with, perhaps by another version.

    Raises:
        ValueError: they mean different runs; names the first key.
    """
    started, left_out = config.parse_saved(saved, f"{cfg.run_dir}: its config")
    if left_out:
        logger.warning("%s was started with keys that are not known here: %s", cfg.run_dir, ", ".join(left_out))
    mine, theirs = _flat(cfg.model_dump(mode="json")), _flat(started.model_dump(mode="json"))
    for key in sorted(mine.keys() | theirs.keys()):
        free = key.startswith(_FREE_SECTIONS) or key in _FREE_KEYS
        if key == "train.steps":  # a decaying learning rate depends on it
            free = cfg.optimizer.decay == "constant"
        if not free and mine.get(key) != theirs.get(key):
            raise ValueError(
                f"{cfg.run_dir} was started with {key}={theirs.get(key)}, not {mine.get(key)}; "
                "use another run_dir, or the old value to go on"
            )


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in nested.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out
