"""Peaks of the GPUs' memory by phase, beside what the plan says of the largest step that the config allows."""

from __future__ import annotations

from pathlib import Path

from megatron_vlmr1.config import Config
from megatron_vlmr1.parallel import reduce
from megatron_vlmr1.plan.memory import PHASES as PLANNED
from megatron_vlmr1.plan.memory import rank_memory
from megatron_vlmr1.plan.shapes import read_plan_shape
from megatron_vlmr1.telemetry.timers import PHASES, PhaseTimers

_TIMED = {"save": "save_exposed"}  # what the timers call a phase of the plan


class Peaks:
    """Takes the peaks that `timers` have counted; there are none on a CPU, where only resident memory is known."""

    def __init__(self, cfg: Config, directory: Path, world: int, timers: PhaseTimers) -> None:
        self._timers = timers
        self._planned = planned(cfg, directory, world) if timers.counts_memory else {}

    def take(self) -> dict[str, float]:
        """Return ``memory/peak_<phase>_bytes`` of a step, the most of all ranks, and ``memory/plan_<phase>_bytes``."""
        if not self._timers.counts_memory:
            return {}
        mine = self._timers.take_peaks()
        most = reduce.maxima({phase: mine.get(phase, 0) for phase in PHASES}, True)
        return {f"memory/peak_{phase}_bytes": size for phase, size in most.items() if size} | self._planned


def planned(cfg: Config, directory: Path, world: int) -> dict[str, float]:
    """Return ``memory/plan_<phase>_bytes`` of the dearest pipeline stage: tensors alone, as torch counts them."""
    ranks = rank_memory(cfg, read_plan_shape(directory), world)
    most = {phase: max(rank.peak(phase) - rank.phases[phase].get("runtime", 0) for rank in ranks) for phase in PLANNED}
    return {f"memory/plan_{_TIMED.get(phase, phase)}_bytes": float(size) for phase, size in most.items()}
