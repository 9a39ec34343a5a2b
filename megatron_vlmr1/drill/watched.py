"""The rows about what the run itself has to notice, or to live with: a stopped rank, flipped bits, lost telemetry."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from megatron_vlmr1.drill import digests
from megatron_vlmr1.drill.disk import mounted
from megatron_vlmr1.drill.faults import Fault
from megatron_vlmr1.drill.field import RANKS, Field
from megatron_vlmr1.drill.jobs import need, run, succeed
from megatron_vlmr1.errors import DONE, STOPPED
from megatron_vlmr1.telemetry.metrics import read_metrics

_TIMEOUT_S = 15
_ALLOWED_S = 2.0
_VOTERS = 3  # copies of the model, so that one that differs is in the minority
_SLOWER = 1.02
_TIMED_STEPS = 30


def stopped_rank(field: Field) -> str:
    """SIGSTOP the second rank in the middle of a forward pass."""
    config = field.config("sigstop", parallel={"timeout_s": _TIMEOUT_S}, train={"steps": 20})
    ended = run(config, RANKS, Fault(1, 3, "forward", "stop"))
    logs = field.root / "sigstop" / "logs" / "attempt_0"
    outcome, reason = logs / "outcome.json", _reason(logs)
    after = outcome.stat().st_mtime - ended.fired[0]["unix_s"]
    need(ended.code != DONE, "exit code 0 with a stopped rank")
    need("rank 1 (" in reason and "'update'" in reason, f"it does not name rank 1 and its phase: {reason}")
    need("attention.py" in (logs / "hang" / "rank_1.txt").read_text(), "no stacks of rank 1")
    need(after <= _TIMEOUT_S + _ALLOWED_S, f"named {after:.1f} s after it stopped, with a timeout of {_TIMEOUT_S} s")
    return f"named after {after:.1f} s (timeout {_TIMEOUT_S} s): {reason}; job over after {ended.survived_s:.1f} s"


def flipped_copy(field: Field) -> str:
    """Flip a bit in one data-parallel rank's parameters right after the gather."""
    return _flipped(field, "flip", "fp32")


def flipped_master(field: Field) -> str:
    """Flip a bit in one rank's fp32 masters."""
    return _flipped(field, "flip-master", "bf16")


def _flipped(field: Field, action: str, precision: str) -> str:
    name = action.replace("-", "_")
    config = field.config(name, precision=precision, train={"steps": 8, "prompts_per_step": 6, "save_every": 1})
    ended = run(config, _VOTERS, Fault(1, 2, "after-step", action)).expect(STOPPED)
    reason = _reason(field.root / name / "logs" / "attempt_0")
    need("rank 1" in reason and "rank 0" not in reason, f"it does not name rank 1 alone: {reason}")
    trained = [step for step, _ in read_metrics(field.root / name)]
    need(max(trained) <= 2, f"step {max(trained)} was trained on it")
    need(not digests.checkpoint_path(field.root / name, 3).exists(), "it was saved")
    return f"exit {ended.code} before the next step: {reason}"


def unreachable_wandb(field: Field) -> str:
    """Log to a W&B server that refuses connections."""
    with _environment(WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="0" * 40, WANDB_MODE="online"):
        return _unaffected(field, "wandb", telemetry={"wandb_project": "drill"})


def full_log_disk(field: Field) -> str:
    """Leave no room for logs, samples and TensorBoard."""
    with ExitStack() as stack:
        for folder in ("logs", "samples", "tensorboard"):
            directory = stack.enter_context(mounted(field.root / "full_logs" / folder, "64k"))
            need(directory is not None, "nothing may be mounted here")
            filler = field.root / "full_logs" / folder / "filler"
            filler.write_bytes(bytes(60 << 10))
        measured = _unaffected(field, "full_logs")
        written = len(list((field.root / "full_logs" / "samples").glob("step_*.jsonl")))
        need(written < _TIMED_STEPS, "there was room for everything")
        return measured


def _unaffected(field: Field, name: str, **sections: Any) -> str:
    """Compare with a run without the fault: same bits, step time within 2 %."""
    train = {"steps": _TIMED_STEPS, "save_every": 0, "sample_every": 1}
    plain = field.config(f"{name}_plain", train=train)
    succeed(plain, RANKS)
    succeed(field.config(name, train=train, **sections), RANKS)
    expected, found = (field.root / run_name for run_name in (f"{name}_plain", name))
    before, after = (digests.weights(digests.checkpoint_path(path, _TIMED_STEPS)) for path in (expected, found))
    need(digests.digest(before) == digests.digest(after), "other parameters than without the fault")
    seconds = [statistics.median(row["perf/step_s"] for _, row in read_metrics(p)[2:]) for p in (expected, found)]
    ratio = seconds[1] / seconds[0]
    need(ratio <= _SLOWER, f"same parameters, but a step takes {ratio:.3f} times as long")
    return f"same parameters; a step takes {ratio:.3f} times as long"


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    former = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _reason(logs: Path) -> str:
    return str(json.loads((logs / "outcome.json").read_text())["reason"])
