"""The row that dies at each file operation of a save; as a program, the process that all of its saves are forked from.

``python -m megatron_vlmr1.drill.operations CONFIG`` imports what a rank needs once, and for k = 1, 2, … forks a rank
that resumes a copy of the config's run, takes a step and dies at the k-th operation of the save after it.
"""

from __future__ import annotations

import itertools
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from megatron_vlmr1 import config
from megatron_vlmr1.checkpoint.store import Keep, Store
from megatron_vlmr1.drill import inject
from megatron_vlmr1.drill.faults import Fault
from megatron_vlmr1.drill.field import Field
from megatron_vlmr1.drill.jobs import Job, need, succeed
from megatron_vlmr1.errors import DIFFERS, DONE

_FOUND = "operations: "


def each(field: Field) -> str:
    """Kill a save at its first, second, … file operation; after each, a valid checkpoint must be there."""
    settings: dict[str, Any] = {"method": "sft", "data": {"workers": 0}}
    succeed(field.config("operations", train={"steps": 1, "keep_checkpoints": 1}, **settings), 1)
    longer = field.config("operations", train={"steps": 2, "keep_checkpoints": 1}, **settings)
    with Job(["megatron_vlmr1.drill.operations", str(longer)], longer.with_suffix("")) as job:
        ended = job.finish()
    said = [line.removeprefix(_FOUND) for line in ended.output.splitlines() if line.startswith(_FOUND)]
    need(ended.code == DONE and len(said) == 1, f"{said}; {ended.last_words}")
    return said[0]


def main() -> NoReturn:
    """Fork a rank for each operation until one gets through; print what was found."""
    path = sys.argv[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    from megatron_vlmr1.train import grpo, sft  # noqa: F401 - seconds, which each rank would take

    base = Path(config.load(path).run_dir)
    published = 0
    for k in itertools.count(1):
        run_dir = base.with_name(f"{base.name}_{k}")
        shutil.copytree(base / "checkpoints", run_dir / "checkpoints", symlinks=True)
        status = _forked(partial(_rank, k, path, run_dir))
        if status == DONE:
            break
        problem = _problem(status, run_dir)
        if problem:
            print(f"{_FOUND}killed at operation {k}: {problem}")
            sys.exit(DIFFERS)
        published += (run_dir / "checkpoints" / "step_2").exists()
        shutil.rmtree(run_dir)
    if not 0 < published < k - 1:
        print(f"{_FOUND}{published} of {k - 1} kills came after the new checkpoint was published: not all of the save")
        sys.exit(DIFFERS)
    print(f"{_FOUND}{k - 1}/{k - 1} recoverable (K = {k - 1}), of which {published} had published the new checkpoint")
    sys.exit(DONE)


def _forked(child: Callable[[], None]) -> int:
    """Run `child` in a fork of this process; return its exit code, -n for signal n."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = DIFFERS
    try:
        child()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else DIFFERS
    finally:
        os._exit(code)


def _rank(k: int, path: str, run_dir: Path) -> None:
    """Be the rank that dies. Its rewards, which SFT does not ask for, are left out."""
    inject.wrap("megatron_vlmr1.train.run:judges", lambda judges, args, _: judges(*args[:-1], False))
    inject.install([Fault(0, 2, "save", f"kill-at:{k}")])
    sys.argv = ["vlmr1", "train", path, f"run_dir={run_dir}"]
    runpy.run_module("megatron_vlmr1.cli", run_name="__main__", alter_sys=True)


def _problem(status: int, run_dir: Path) -> str:
    if status != -signal.SIGKILL:
        return f"it left with {status}"
    told: list[str] = []
    store = Store(run_dir / "checkpoints", Keep(1))
    store.clean()  # as a run that resumes does
    found = store.newest_valid(told.append)
    if found is None:
        return f"no valid checkpoint is left: {told}"
    return f"something that is not valid was published: {told}" if told else ""


if __name__ == "__main__":
    main()
