"""SLURM's commands: give it a script, ask how a job is, cancel it. No accounting database is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

_PATIENCE_S = 60.0
_ABSENT = "not found; this must run where SLURM's commands are"


def check_installed() -> None:
    """Refuse to go on without SLURM.

    Raises:
        ValueError: its commands are not here.
    """
    if shutil.which("sbatch") is None:
        raise ValueError(f"sbatch: {_ABSENT}")


def sbatch(script: Path, after: str | None = None) -> str:
    """Submit a script and return its job's id.

    Args:
        script: with its options in #SBATCH lines.
        after: id of a job that has to end first, however it ends.

    Raises:
        ValueError: SLURM is not here, or refuses the script; its own words.
    """
    dependency = [f"--dependency=afterany:{after}"] if after else []
    return _run(["sbatch", "--parsable", *dependency, str(script)]).partition(";")[0].strip()


def job_state(job_id: str) -> str | None:
    """Return PENDING, RUNNING, COMPLETED, FAILED … of a job; None once the controller has forgotten it.

    Raises:
        ValueError: SLURM is not here, or does not answer.
    """
    return job_facts(job_id).get("JobState")


def job_facts(job_id: str) -> dict[str, str]:
    """Return what ``scontrol show job`` says of a job (of a heterogeneous one's first part), {} once it is forgotten.

    Raises:
        ValueError: SLURM is not here, or does not answer.
    """
    text = _run(["scontrol", "show", "job", "--oneliner", job_id], forgotten="Invalid job id")
    first = text.partition("\n")[0]
    return dict(re.findall(r"(?:^| )([A-Z][\w:/]*)=(\S*)", first))


def cancel(job_id: str) -> None:
    """End a job, running or not; one that has ended stays as it is.

    Raises:
        ValueError: SLURM is not here, does not answer, or the job is somebody else's.
    """
    _run(["scancel", job_id], forgotten="Invalid job id")


def _run(command: Sequence[str], forgotten: str = "") -> str:
    """Return what a command prints; nothing where it fails because of a job that is `forgotten`."""
    try:
        done = subprocess.run(  # noqa: S603 - a list, and no shell
            command, capture_output=True, text=True, check=False, timeout=_PATIENCE_S
        )
    except FileNotFoundError as error:
        raise ValueError(f"{command[0]}: {_ABSENT}") from error
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{command[0]}: SLURM does not answer within {_PATIENCE_S:g} s") from error
    words = " ".join(done.stderr.split())
    if done.returncode and not (forgotten and forgotten in words):
        raise ValueError(f"{command[0]}: {words or f'exit code {done.returncode}'}")
    return done.stdout if not done.returncode else ""
