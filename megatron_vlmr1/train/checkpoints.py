"""A run's checkpoints: the Hugging Face directory and the state, through the store."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.optimizer import MegatronOptimizer

from megatron_vlmr1.checkpoint import state
from megatron_vlmr1.checkpoint.save import Save
from megatron_vlmr1.checkpoint.staging import Staging
from megatron_vlmr1.checkpoint.store import Keep, Store, summary, verify
from megatron_vlmr1.config import Config
from megatron_vlmr1.errors import STOPPED, RunStopped
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.rollout.actor import Actor
from megatron_vlmr1.runtime import distributed
from megatron_vlmr1.train.changes import check_config

logger = logging.getLogger(__name__)

_FAILURES = 3  # failed saves in a row, before the run stops itself


@dataclass(frozen=True)
class _Flight:
    """A save whose files threads are writing."""

    step: int
    save: Save
    facts: dict[str, Any]


class Checkpoints:
    """Saves and finds the checkpoints of one run; all ranks call every method.

    With `train.async_save` a periodic save only copies what is to be written; threads write it. Nothing is published,
    and nothing older removed, before all ranks have met after their last write: `poll` looks after each step whether
    they have. At most one save is under way.

    Attributes:
        failures: failed saves in a row.
        save_s: seconds that the last save took to reach the disk, whoever waited for it; 0 before the first.
    """

    def __init__(self, cfg: Config, mesh: Mesh, allow_config_change: bool = False) -> None:
        self.cfg, self.mesh = cfg, mesh
        best = cfg.train.keep_best
        keep = Keep(
            cfg.train.keep_checkpoints,
            cfg.train.keep_every,
            (best.metric, best.better == "higher") if best is not None else None,
        )
        self.store = Store(Path(cfg.run_dir) / "checkpoints", keep)
        self.failures = 0
        self.save_s = 0.0
        self._staging = Staging()
        self._flight: _Flight | None = None
        self._allow_config_change = allow_config_change
        self._changes: list[str] = []

    def newest(self) -> Path | None:
        """Let rank 0 clean up; all ranks verify a share each and take the newest valid checkpoint, or None.

        Raises:
            OSError: the directory cannot be read, or what a dead attempt left not be removed; on all ranks.
        """
        steps: list[int] = []

        def look() -> None:
            self.store.clean()
            steps.extend(self.store.steps())

        distributed.together(look, only_first=True)
        listed = [int(text) for text in distributed.broadcast_text(" ".join(map(str, steps))).split()]
        log = logger.warning if self.mesh.rank == 0 else logger.debug
        share = self.mesh.rank, self.mesh.world
        newest = self.store.newest_valid(log, listed, lambda path: distributed.first_told(summary(verify(path, share))))
        if newest is None:
            return None
        logger.info("resuming from %s", newest[1])
        return newest[1]

    def restore(self, actor: Actor, optimizer: MegatronOptimizer, path: Path) -> dict[str, Any]:
        """Restore the state beside weights that are loaded already, and return the run's progress.

        Raises:
            ValueError: the run was started with a config that means something else, or in a layout that the
                checkpoint's optimizer format ties it to.
        """
        progress = state.load(actor.policy, optimizer, path / "state")
        changes = check_config(self.cfg, progress["config"], self._allow_config_change)
        self._changes = [*progress.get("config_changes", []), *(f"step {progress['step']}: {c}" for c in changes)]
        return progress

    @property
    def config_changes(self) -> list[str]:
        """What `--allow-config-change` has let pass since the run was started, a line for each key."""
        return list(self._changes)

    def save(
        self,
        actor: Actor,
        optimizer: MegatronOptimizer,
        progress: dict[str, Any],
        metrics: Mapping[str, float],
        last: bool = False,
        wait: bool = False,
    ) -> bool:
        """Save the checkpoint of ``progress["step"]``, once the one before it is done; two failures in a row are borne.

        Args:
            actor: whose policy it is.
            optimizer: of the policy.
            progress: what `restore` returns again.
            metrics: of this step, among which is the one of `train.keep_best`.
            last: save in the format that any layout can go on from.
            wait: return only when it is published, or has failed.

        Returns:
            Whether it is published, or under way.

        Raises:
            RunStopped: the third save in a row failed (exit code 17).
        """
        self._settle()
        step = int(progress["step"])
        kind = "fully_reshardable" if last else self.cfg.train.optimizer_format
        later = self.cfg.train.async_save and not wait
        if not later:
            self._staging.clear()
        facts = {
            "layout": self.mesh.describe(),
            "config_sha256": hashlib.sha256(json.dumps(self.cfg.model_dump(mode="json")).encode()).hexdigest(),
            "optimizer": state.sharding(kind),
            "figures": self._figures(step, metrics),
        }
        try:
            save = Save(self._begin(step), actor.policy, self._staging if later else None)
        except OSError as error:  # the same on all ranks
            return self._failed(step, error)
        self._flight = _Flight(step, save, facts)
        try:
            save.stage(optimizer, actor.directory, {**progress, "config_changes": self._changes}, kind)
        except OSError as error:
            return self._failed(step, error)
        return True if later else self._settle()

    def poll(self) -> None:
        """Publish the save that is under way if all ranks have written it.

        Raises:
            RunStopped: the third save in a row failed (exit code 17).
        """
        if self._flight is not None and self._flight.save.done():
            self._settle()

    @property
    def under_way(self) -> bool:
        """Whether threads are writing; the same on all ranks."""
        return self._flight is not None

    def close(self) -> None:
        """Wait for the save that is under way; all ranks call it where a run stops itself."""
        try:
            self._settle()
        except RunStopped as stopped:
            logger.error("%s", stopped)

    def _settle(self) -> bool:
        """Wait for the save that is under way and publish it; return whether that went well."""
        if self._flight is None:
            return True
        step, save, facts = self._flight.step, self._flight.save, self._flight.facts
        try:
            files = save.finish()
            distributed.together(lambda: self.store.publish(step, save.temporary, facts, files), only_first=True)
        except OSError as error:  # the same on all ranks
            return self._failed(step, error)
        self._flight = None
        self.failures = 0
        self.save_s = save.seconds
        logger.info("checkpoint of step %d: %s", step, self.store.path(step))
        return True

    def _failed(self, step: int, error: OSError) -> bool:
        if self._flight is not None and self.mesh.rank == 0:
            self.store.discard(self._flight.save.temporary)
        self._flight = None
        self.failures += 1
        logger.error("checkpoint of step %d failed (%d in a row): %s", step, self.failures, error)
        if self.failures >= _FAILURES:
            raise RunStopped(STOPPED, f"{_FAILURES} checkpoints in a row could not be saved: {error}") from error
        return False

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

    def _figures(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return what `train.keep_best` will ask for."""
        best = self.cfg.train.keep_best
        if best is None:
            return {}
        value = metrics.get(best.metric, math.nan)
        if not math.isfinite(value):
            logger.warning("checkpoint of step %d has no %s: it cannot be the best", step, best.metric)
            return {}
        return {best.metric: float(value)}
