"""One step as a trace of phases, for Perfetto (ui.perfetto.dev) or chrome://tracing.

Format: the JSON object of Google's "Trace Event Format"; complete events "X", counters "C" and names "M", times in
microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vlmr1.telemetry.files import write_or_warn

_GPU_COUNTERS: tuple[str, ...] = ("util", "mem_bytes", "power_w")
_HOST_COUNTERS: tuple[str, ...] = ("cpu_util", "rss_bytes")


@dataclass(frozen=True)
class Track:
    """What one rank has of a step.

    Attributes:
        rank: in the world.
        node: name of its node.
        spans: (phase, begin, end) in seconds of the rank's own wall clock; phases within phases overlap them.
        samples: of the node (`telemetry.sampler`), on the rank that has them.
        ahead_s: seconds by which this wall clock is ahead of rank 0's.
    """

    rank: int
    node: str
    spans: Sequence[tuple[str, float, float]]
    samples: Sequence[Mapping[str, Any]] = field(default=())
    ahead_s: float = 0.0


def write_trace(run_dir: Path, step: int, tracks: Sequence[Track]) -> bool:
    """Write ``traces/step_N.json``; return whether it is there, after a warning if not."""
    data = json.dumps(trace(step, tracks), separators=(",", ":")).encode()
    return write_or_warn(run_dir / "traces" / f"step_{step}.json", data)


def trace(step: int, tracks: Sequence[Track]) -> dict[str, Any]:
    """Return the step as a JSON object: a process for each node, a thread for each rank, on rank 0's clock.

    Time 0 is when the first phase began; ``otherData.unix_s`` says when that was.
    """
    start = min((begin - track.ahead_s for track in tracks for _, begin, _ in track.spans), default=0.0)
    nodes = sorted({track.node for track in tracks})
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": f"node {node}"}}
        for pid, node in enumerate(nodes)
    ]
    for track in tracks:
        pid, zero = nodes.index(track.node), start + track.ahead_s
        name = {"name": f"rank {track.rank}"}
        events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": track.rank, "args": name})
        events += [
            {
                "ph": "X",
                "name": phase,
                "cat": "phase",
                "pid": pid,
                "tid": track.rank,
                "ts": 1e6 * (begin - zero),
                "dur": 1e6 * (end - begin),
                "args": {"step": step},
            }
            for phase, begin, end in sorted(track.spans, key=lambda span: (span[1], -span[2]))
        ]
        events += [{**counter, "pid": pid} for sample in track.samples for counter in _counters(sample, zero)]
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "step": step,
            "unix_s": start,
            "clock_ahead_s": {str(track.rank): track.ahead_s for track in tracks},
        },
    }


def _counters(sample: Mapping[str, Any], zero: float) -> Iterator[dict[str, Any]]:
    groups = [("host", sample["host"], _HOST_COUNTERS)]
    groups += [(f"gpu {index}", gpu, _GPU_COUNTERS) for index, gpu in enumerate(sample["gpus"])]
    for who, readings, names in groups:
        for name in names:
            if name in readings:
                args = {"value": readings[name]}
                yield {"ph": "C", "name": f"{who} {name}", "ts": 1e6 * (sample["unix_s"] - zero), "args": args}
