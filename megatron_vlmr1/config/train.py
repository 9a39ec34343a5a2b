"""Settings of a run's length, its steps and its checkpoints."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from megatron_vlmr1.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


def _seconds(value: Any) -> Any:
    """Read "[DAYS-]HOURS:MINUTES:SECONDS" as seconds, and leave other values to pydantic."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d?):(\d\d?)", value, re.ASCII) if isinstance(value, str) else None
    if found is None:
        return value
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


class KeepBestConfig(Section):
    """Which checkpoint is the best one."""

    metric: str
    """A metric of the checkpoint's own step, such as evaluate/val/accuracy; without it a checkpoint cannot be best."""
    better: Literal["higher", "lower"]
    """Which values of it are better."""


class TrainConfig(Section):
    """Length of the run and size of a step."""

    steps: PositiveInt = 100
    prompts_per_step: PositiveInt = 16
    """Prompts (grpo) or samples (sft) of one optimizer step, over all data-parallel ranks."""
    micro_batch_tokens: PositiveInt = 8192
    """Packed tokens of one micro-batch per rank, at most. A longer group is cut between completions, its prompt
    repeated; only a single completion that is too long together with its prompt gets more."""
    micro_batches: PositiveInt | None = None
    """At least this many micro-batches a step; the pipeline size when empty."""
    balance: bool = True
    """Exchange groups between data-parallel ranks before the update, so that each has about as much to compute."""
    replica_check_every: NonNegativeInt = 1
    """Compare parameters that several ranks hold, and the optimizer's state with what the last step left, at every so
    many optimizer steps before anything is trained on them or saved; 0 never. A difference ends the run with exit code
    17. A damaged copy heals at the next step, so what is left out is not seen later."""
    spike_factor: NonNegativeFloat = 10.0
    """A loss or gradient norm is flagged (train/loss_spike, train/grad_spike) that lies so many times the median
    deviation above the median of the last train.spike_window steps; 0 never. Nothing else changes."""
    spike_window: Annotated[PositiveInt, Field(ge=10)] = 100
    save_every: NonNegativeInt = 100
    """Checkpoint after every so many steps, and after the last; 0 saves only the last."""
    async_save: bool = True
    """Let threads write periodic checkpoints while training goes on; costs host memory for a copy of one."""
    optimizer_format: Literal["dp_reshardable", "fully_reshardable"] = "dp_reshardable"
    """Of periodic and signals' checkpoints. dp_reshardable: quick, but only the data-parallel size may change on
    resume; fully_reshardable: any layout can go on from it, as from the last one of a run, which always is."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that are kept."""
    keep_every: NonNegativeInt = 0
    """Never remove the checkpoint of a step that is a multiple of this; 0 spares none."""
    keep_best: KeepBestConfig | None = None
    """Never remove the best checkpoint by this metric, either."""
    evaluate_every: NonNegativeInt = 0
    """Evaluate on data.evaluate after every so many steps; 0 never."""
    exit_before: Annotated[PositiveFloat | None, BeforeValidator(_seconds)] = None
    """Time after the start of an attempt, such as "3:50:00" or in seconds, before which it saves and exits with code
    85: after the last step behind which another one and a save would not fit. The end of a SLURM job
    (SLURM_JOB_END_TIME) counts in any case, less a minute."""
    sample_every: NonNegativeInt = 10
    """Write samples/step_N.jsonl after every so many steps; 0 never."""
