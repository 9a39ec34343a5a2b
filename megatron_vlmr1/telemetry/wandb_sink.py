"""Weights & Biases, at arm's length: a training step hands its numbers over and never waits for the network."""

from __future__ import annotations

import importlib.util
import logging
import queue
import secrets
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from megatron_vlmr1.telemetry.files import write_or_warn

log = logging.getLogger(__name__)

_MAX_WAITING = 1000  # steps
_RETRY_S = 60.0  # between attempts to begin
_LEAVE_S = 10.0  # for the last numbers to get out at the end of training


def check_installed(project: str) -> None:
    """Refuse a project where the wandb package is missing.

    Raises:
        ValueError: one line that says how to get it.
    """
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # without an origin: a mere folder of that name, as wandb leaves behind
        raise ValueError(
            f"telemetry.wandb_project={project}: wandb is not installed; pip install 'megatron-vlmr1[wandb]', or leave "
            "the setting empty"
        )


def _run_id(path: Path) -> str:
    """Return the id that a run directory has kept since it began, so that another one in its place is another run."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        found = secrets.token_hex(8)
        write_or_warn(path, found.encode())
        return found


def _end_service() -> None:
    """Kill W&B's own process, for whose uploads wandb would wait for ever as this process ends."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.name().startswith("wandb"):
                process.kill()
    wandb = sys.modules.get("wandb")
    with suppress(Exception):  # it finds nobody to talk to
        wandb.teardown()  # type: ignore[union-attr]


class WandbSink:
    """One W&B run for a run directory, fed by a thread of its own from a bounded queue; what does not fit is dropped.

    Attributes:
        dropped: steps that W&B did not get.
    """

    def __init__(self, project: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Begin in the background; a run that is resumed goes on in the same W&B run."""
        self.dropped = 0
        self._settings: dict[str, Any] = {
            "project": project,
            "name": run_dir.name,
            "id": _run_id(run_dir / "wandb_id"),
            "resume": "allow",
            "dir": str(run_dir),
            "config": dict(config),
        }
        self._waiting: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(_MAX_WAITING)
        self._leaving = threading.Event()
        self._finished = False
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand a step's numbers over; returns at once."""
        try:
            self._waiting.put_nowait((step, dict(metrics)))
        except queue.Full:
            self._lost("it is too slow")

    def close(self) -> None:
        """Give the rest some seconds to get out."""
        self._leaving.set()
        with suppress(queue.Full):
            self._waiting.put_nowait(None)  # wakes the thread, which a full queue would not let sleep
        self._thread.join(_LEAVE_S)
        if not self._finished:
            _end_service()

    def _work(self) -> None:
        run = self._begin()
        while run is not None and not (self._leaving.is_set() and self._waiting.empty()):
            if (item := self._waiting.get()) is None:
                continue
            step, metrics = item
            try:
                run.log(metrics, step=step)
            except Exception as error:  # whatever a service or its library does is no reason to lose a training run
                self._lost(error)
        if run is not None:
            with suppress(Exception):
                run.finish()
                self._finished = True

    def _begin(self) -> Any:
        """Return the W&B run, trying again until the end of training."""
        while True:
            try:
                import wandb

                return wandb.init(**self._settings)
            except Exception as error:  # as above
                self._warn(f"{type(error).__name__} {error}")
            if self._leaving.wait(_RETRY_S):
                return None

    def _lost(self, reason: object) -> None:
        self.dropped += 1
        self._warn(reason)

    def _warn(self, reason: object) -> None:
        if not self._warned:
            log.error("Weights & Biases does not get all metrics, and the run goes on without: %s", reason)
        self._warned = True
