"""Whether jobs can be submitted from here."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

from megatron_vlmr1.launch.doctor_line import Line

_COMMANDS = ("sbatch", "srun", "scontrol", "scancel", "squeue")
_PING_S = 10.0


def lines() -> Iterator[Line]:
    """Look for SLURM's commands, its controller, and the job that this process is in."""
    lacking = [name for name in _COMMANDS if shutil.which(name) is None]
    if lacking:
        yield Line("SLURM", "missing", f"no {', '.join(lacking)}", "nothing, to run on this machine alone")
        return
    yield _controller()
    if "SLURM_JOB_ID" in os.environ:
        nodes = os.environ.get("SLURM_JOB_NODELIST") or "?"
        yield Line("SLURM job", "ok", f"{os.environ['SLURM_JOB_ID']} on {nodes}")


def _controller() -> Line:
    program = shutil.which("scontrol")
    assert program is not None
    try:
        done = subprocess.run(  # noqa: S603 - the system's own program, as a list
            [program, "ping"], capture_output=True, text=True, timeout=_PING_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Line("SLURM", "missing", f"scontrol ping: no answer in {_PING_S:.0f} s", "ask who runs the cluster")
    said = " ".join((done.stdout or done.stderr).split())[:200]
    if done.returncode == 0 and " UP" in said:
        return Line("SLURM", "ok", said)
    do = "nothing, to run on this machine alone; else look at SLURM_CONF, or ask who runs the cluster"
    return Line("SLURM", "missing", f"no controller answers: {said}", do)
