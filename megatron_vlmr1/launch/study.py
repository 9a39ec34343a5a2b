"""Runs the cells of a scaling study as jobs, and keeps what became of each in ``OUT/cells.json``.

A study can be interrupted at any time and started again: cells that are done stay done, jobs that SLURM still has are
found again, and a run that was cut short goes on from its checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_vlmr1 import config, errors
from megatron_vlmr1.config import Config
from megatron_vlmr1.plan.study import CELLS, DONE, FAILED, REFUSED, RUNNING, WAITING, Cell
from megatron_vlmr1.runtime import attempts
from megatron_vlmr1.telemetry.files import json_line, readable_text, write_atomic
from megatron_vlmr1.telemetry.metrics import read_metrics
from megatron_vlmr1.train.check import check_data, check_inputs


class Jobs(Protocol):
    """Where runs are started."""

    at_once: int
    poll_s: float
    outlive: bool
    """Whether jobs go on when this process has ended."""

    def start(self, cell: Cell, run_dir: Path, retry: bool) -> str:
        """Start a cell and return the job's name.

        Raises:
            ValueError: it is refused; one line.
        """

    def alive(self, job: str) -> bool:
        """Whether a job that this or an earlier process started waits or runs."""

    def stop(self) -> None:
        """End what would not outlive this process."""

    def log(self, run_dir: Path) -> Path:
        """Return the file with a job's last words."""


@dataclass
class State:
    """A cell and what became of it."""

    cell: Cell
    run_dir: Path
    state: str = WAITING
    reason: str = ""
    job: str = ""

    def document(self) -> dict[str, Any]:
        """Return what `CELLS` keeps of it."""
        cell = self.cell
        kept = {"name": cell.name, "nodes": cell.nodes, "ranks": cell.ranks, "point": cell.point}
        kept |= {"scaling": cell.scaling, "run_dir": str(self.run_dir), "overrides": cell.overrides}
        return kept | {"state": self.state, "reason": self.reason, "job": self.job}


class Study:
    """The cells of a study in a directory.

    Args:
        name: of the study, for its report.
        cells: its grid.
        config_file: YAML file of the runs.
        out: the study's directory.
        jobs: where runs are started.
        warmup_steps: first steps of each run that are not measured.
        say: takes a line of progress.
    """

    def __init__(
        self,
        name: str,
        cells: Sequence[Cell],
        config_file: Path,
        out: Path,
        jobs: Jobs,
        warmup_steps: int,
        say: Callable[[str], None],
    ) -> None:
        self._name, self._config_file, self._out, self._jobs, self._say = name, config_file, out, jobs, say
        self._warmup_steps = warmup_steps
        self.states = [State(cell, out / "cells" / cell.name) for cell in cells]
        self._former = _former(out)
        for state in self.states:
            state.job = str(self._former.get(state.cell.name, {}).get("job", ""))

    def run(self, retry_failed: bool) -> None:
        """Run every cell that is not done, one that failed before only with `retry_failed`, until no job is left.

        Raises:
            ValueError: a cell is done with other settings than the study has now; one line, nothing is started.
            OSError: the study's directory cannot be written.
        """
        waiting = [state for state in self.states if self._look(state, retry_failed)]
        running = [state for state in self.states if state.state == RUNNING]
        self._keep()
        for state in self.states:
            if state.state in (FAILED, REFUSED) and state not in waiting:
                self._tell(state)
        try:
            while waiting or running:
                while waiting and len(running) < self._jobs.at_once:
                    running += self._started(waiting.pop(0), retry_failed)
                time.sleep(self._jobs.poll_s)
                ended = [state for state in running if not self._jobs.alive(state.job)]
                running = [state for state in running if state not in ended]
                for state in ended:
                    self._conclude(state)
        finally:
            self._jobs.stop()
            for state in self.states:
                if state.state == RUNNING and not self._jobs.outlive:
                    self._conclude(state)

    def _look(self, state: State, retry_failed: bool) -> bool:
        """Find out what an earlier call left of a cell; return whether it has to be started."""
        try:
            cfg = self._config(state)
            check_inputs(cfg, state.cell.ranks)
        except ValueError as error:
            state.state, state.reason = REFUSED, str(error)
            return False
        if state.job and self._jobs.alive(state.job):
            state.state = RUNNING
            return False
        state.state, state.reason = _outcome(state.run_dir, cfg.train.steps, self._jobs.log(state.run_dir))
        if state.state == DONE:
            self._check_same(state, cfg)
        elif state.state == FAILED and not self._jobs.outlive and _was_cut_short(state, self._former):
            state.state, state.reason = WAITING, "cut short with the study"
        return state.state == WAITING or (state.state == FAILED and retry_failed)

    def _check_same(self, state: State, cfg: Config) -> None:
        """Refuse to show numbers of former settings as those of the study's present ones.

        Raises:
            ValueError: a cell that is done had others.
        """
        ran = state.run_dir / "config.yaml"
        same = not ran.is_file() or config.load(ran) == cfg
        if not same or self._former.get(state.cell.name, {}).get("ranks", state.cell.ranks) != state.cell.ranks:
            raise ValueError(
                f"{state.run_dir}: this cell is done, with other settings than the study has now; name another --out, "
                "or remove that directory"
            )

    def _started(self, state: State, retry: bool) -> list[State]:
        """Start a cell; return it, or nothing if it is refused."""
        try:
            check_data(self._config(state))
            state.job = self._jobs.start(state.cell, state.run_dir, retry)
        except ValueError as error:
            state.state, state.reason = REFUSED, str(error)
        else:
            state.state, state.reason = RUNNING, ""
        self._tell(state)
        return [state] if state.state == RUNNING else []

    def _conclude(self, state: State) -> None:
        steps = self._config(state).train.steps
        state.state, state.reason = _outcome(state.run_dir, steps, self._jobs.log(state.run_dir))
        if state.state == WAITING and not state.reason:
            state.state, state.reason = FAILED, f"the job {state.job} ended without a trace in {state.run_dir}"
        self._tell(state)

    def _config(self, state: State) -> Config:
        return config.load(self._config_file, list(state.cell.overrides))

    def _tell(self, state: State) -> None:
        self._keep()
        done = sum(state.state not in (WAITING, RUNNING) for state in self.states)
        why = f": {state.reason}" if state.reason else ""
        self._say(f"{done} of {len(self.states)} cells over; {state.cell.name} {state.state}{why}")

    def _keep(self) -> None:
        cells = [state.document() for state in self.states]
        document = {"name": self._name, "warmup_steps": self._warmup_steps, "cells": cells}
        write_atomic(self._out / CELLS, json_line(document))


def _former(out: Path) -> dict[str, dict[str, Any]]:
    """What an earlier call kept, by cell."""
    try:
        document = json.loads((out / CELLS).read_bytes())
        return {str(cell["name"]): dict(cell) for cell in document["cells"]}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{out / CELLS}: not what a study writes ({error!r}); name another directory") from error


def _was_cut_short(state: State, former: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a job that an earlier call saw running ended with that call, without a word."""
    attempt = attempts.newest(state.run_dir)
    silent = attempt is None or not (attempt / attempts.OUTCOME).exists()
    return silent and former.get(state.cell.name, {}).get("state") == RUNNING


def _outcome(run_dir: Path, steps: int, log: Path) -> tuple[str, str]:
    """What a run that has ended came to, and why."""
    attempt = attempts.newest(run_dir)
    if attempt is None:
        words = readable_text(log)
        return (FAILED, _last_line(words)) if words else (WAITING, "")
    try:
        outcome = attempts.read_outcome(attempt)
    except (OSError, ValueError) as error:
        return FAILED, f"{attempt}: {error}"
    if outcome is None:
        return FAILED, _last_line(readable_text(log)) or f"no outcome in {attempt}"
    if outcome["code"] == errors.REQUEUE:
        return WAITING, str(outcome["reason"])
    trained = max((step + 1 for step, _ in read_metrics(run_dir)), default=0)
    done = outcome["code"] == errors.DONE and trained >= steps
    return (DONE, "") if done else (FAILED, str(outcome["reason"]))


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
