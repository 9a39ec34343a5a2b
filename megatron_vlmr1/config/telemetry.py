"""Settings of what is checked before the first step and watched during the run; none changes what is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from megatron_vlmr1.config.section import NonNegativeFloat, NonNegativeInt, Section


def _off(value: Any) -> Any:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


class LaunchConfig(Section):
    """What the ranks do before the first step."""

    preflight: Annotated[Literal["off", "quick", "full"], BeforeValidator(_off)] = "quick"
    """Check versions, GPUs, network, disks and clocks of all nodes. quick: seconds, with a few pairs of nodes; full
    measures every pair. A bad node is named in logs/attempt_K/bad_nodes; a broken job ends with exit code 2."""


class TelemetryConfig(Section):
    """Where numbers go besides the run directory's metrics.jsonl and tensorboard."""

    wandb_project: str | None = None
    """Log metrics to this Weights & Biases project too, which needs the extra `wandb`; steps never wait for it."""
    sample_s: Annotated[NonNegativeFloat, Field(le=3600)] = 5.0
    """On each node, read GPUs (NVML) and host every so many seconds, beside the training, into
    run_dir/telemetry/node_NAME.jsonl; 0 reads them once a step, for the metrics only."""
    prometheus_port: Annotated[NonNegativeInt | None, Field(le=65535)] = None
    """Serve the last step's metrics at http://HOST:PORT/metrics on the first rank's node; 0 takes a free port, which
    the log names."""
    prometheus_host: str = "127.0.0.1"
    """Address to serve at; 0.0.0.0 lets everybody read who can reach the node."""
    trace_steps: list[NonNegativeInt] = []
    """Write run_dir/traces/step_N.json for these steps (counted from 0): phases of all ranks, for Perfetto or
    chrome://tracing."""
    profile_steps: list[NonNegativeInt] = []
    """Record these steps with torch's profiler into run_dir/profiles/rank_R_step_N.json.gz; they are slower."""
    profile_ranks: list[NonNegativeInt] = [0]
    """Ranks that are profiled."""
