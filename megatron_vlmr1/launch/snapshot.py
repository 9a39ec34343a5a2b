"""What a job runs, frozen at its submission: ``run_dir/snapshots/K`` with code, config, script and facts."""

from __future__ import annotations

import errno
import getpass
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import megatron_vlmr1
from megatron_vlmr1.rewards import functions

SCRIPT = "job.sbatch"
_PACKAGES = ("megatron-core", "torch", "transformers", "transformer-engine")
_GIT_S = 20.0


def next_path(run_dir: Path) -> Path:
    """Return the directory of the run's next snapshot, which does not exist; K counts from 0."""
    folder = run_dir / "snapshots"
    names = (path.name for path in folder.glob("*"))
    return folder / str(max((int(name) for name in names if name.isdecimal()), default=-1) + 1)


def write(path: Path, config: str, script: str, facts: Mapping[str, Any], files: Sequence[str] = ()) -> None:
    """Write a snapshot: the package as it is now, ``config.yaml``, ``job.sbatch``, ``facts.json`` and ``files/``.

    It has another name until it is whole.

    Raises:
        OSError: the disk is full, the directory cannot be written, or somebody took the same number just now.
    """
    made = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        package = Path(megatron_vlmr1.__file__).parent
        shutil.copytree(package, made / "code" / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        (made / "config.yaml").write_text(config)
        (made / SCRIPT).write_text(script)
        (made / "facts.json").write_text(json.dumps({**_surroundings(package), **facts}, indent=1) + "\n")
        for file in files:
            _freeze(file, made / "files")
        _take_number(made, path)
    except shutil.Error as error:  # a list of every file that it could not copy
        raise OSError(f"{path}: {error.args[0][0][2]}") from error
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _freeze(file: str, folder: Path) -> None:
    copy = functions.copy_in(folder, file)
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(functions.source(file).read_bytes())


def _take_number(made: Path, path: Path) -> None:
    try:
        made.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise OSError(f"{path}: another submission took this number just now: submit again") from error


def _surroundings(package: Path) -> dict[str, Any]:
    return {
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "by": getpass.getuser(),
        "from": platform.node(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "vlmr1": megatron_vlmr1.__version__,
        "git": _git(package),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(package: Path) -> str | None:
    """Return the checkout's commit, with "-dirty" where files were changed since; None outside a checkout."""
    command = ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        done = subprocess.run(  # noqa: S603 - a list, and no shell
            command, capture_output=True, text=True, check=False, timeout=_GIT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
