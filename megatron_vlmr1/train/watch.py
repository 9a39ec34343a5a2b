"""What is watched of each step beside its metrics: samples of the nodes, traces, profiles."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from pathlib import Path

from torch import profiler

from megatron_vlmr1.config import Config
from megatron_vlmr1.runtime import clocks, distributed
from megatron_vlmr1.runtime.device import has_cuda
from megatron_vlmr1.runtime.ranks import leads_node, node_name
from megatron_vlmr1.telemetry.host import own_rss_bytes
from megatron_vlmr1.telemetry.sampler import Sampler
from megatron_vlmr1.telemetry.timers import PhaseTimers
from megatron_vlmr1.telemetry.trace import Track, write_trace

logger = logging.getLogger(__name__)


class Watch:
    """Watches this rank, and its node if it is the first there; `stack` ends it."""

    def __init__(self, cfg: Config, rank: int, timers: PhaseTimers, stack: ExitStack) -> None:
        self._run_dir, self._cfg, self._rank, self._timers = Path(cfg.run_dir), cfg.telemetry, rank, timers
        self._sampler: Sampler | None = None
        if leads_node() and (rank == 0 or cfg.telemetry.sample_s):
            self._sampler = Sampler(self._run_dir, node_name(), cfg.telemetry.sample_s)
            stack.callback(self._sampler.close)
        self._profile: profiler.profile | None = None
        stack.callback(self._end_profile)

    def begin(self, step: int) -> None:
        """A step begins."""
        if step in self._cfg.profile_steps and self._rank in self._cfg.profile_ranks:
            kinds = [profiler.ProfilerActivity.CPU] + [profiler.ProfilerActivity.CUDA] * has_cuda()
            self._profile = profiler.profile(activities=kinds)
            self._profile.start()

    def end(self, step: int) -> dict[str, float]:
        """The phases of a step were just taken: write what is asked of it; all ranks call it.

        Returns:
            ``gpu/*`` and ``host/*`` of this rank's node where it is the first there, ``host/rss_bytes`` of this rank.
        """
        if (profile := self._end_profile()) is not None:
            self._write_profile(profile, step)
        samples = self._sampler.take() if self._sampler else []
        if step in self._cfg.trace_steps:
            ahead_s = clocks.ahead_s()[self._rank]
            track = Track(self._rank, node_name(), self._timers.wall_spans(), samples, ahead_s)
            if tracks := distributed.gathered(track):
                write_trace(self._run_dir, step, tracks)
        metrics = self._sampler.step_metrics(samples) if self._sampler else {}
        return metrics | {"host/rss_bytes": own_rss_bytes()}

    def _end_profile(self) -> profiler.profile | None:
        profile, self._profile = self._profile, None
        if profile is not None:
            profile.stop()
        return profile

    def _write_profile(self, profile: profiler.profile, step: int) -> None:
        path = self._run_dir / "profiles" / f"rank_{self._rank}_step_{step}.json.gz"
        temporary = path.with_name(f".{path.name}")  # its end says that it is to be compressed
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(temporary))
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:
            logger.warning("%s is not written: %s", path, error)
