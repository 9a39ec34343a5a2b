"""What the verbs share: logging, JSON output, overrides, finding a config."""

from __future__ import annotations

import argparse
import importlib.resources
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from megatron_vlmr1.telemetry.console import duration
from megatron_vlmr1.telemetry.files import json_line

if TYPE_CHECKING:
    from megatron_vlmr1.config import Config
    from megatron_vlmr1.plan.hardware import Hardware

_OVERRIDE = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=.*", re.ASCII | re.DOTALL)
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SAY_EVERY_S = 10.0
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


class _Stderr(logging.StreamHandler[TextIO]):
    """Our handler, told from those of others."""


def configure_logging() -> None:
    """Send this package's log to stderr, one line a record, from the level in VLMR1_LOG on (INFO by default).

    Ranks other than 0 say warnings and errors only, so that a job's output is not N times the same. Other libraries
    are heard from WARNING on. Python's warnings about megatron-core are left out: each start would repeat which
    optional packages it does without, and each step which names of torch it still uses.

    Raises:
        ValueError: VLMR1_LOG is not a level.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron\.core|torch\.distributed")
    level = os.environ.get("VLMR1_LOG", "INFO").upper()
    if level not in _LEVELS:
        raise ValueError(f"VLMR1_LOG={level}: expected one of {', '.join(_LEVELS)}")
    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
    where = f" rank {rank}" if rank else ""
    handler = _Stderr(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s{where} %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger()
    for former in [handler for handler in root.handlers if isinstance(handler, _Stderr)]:
        root.removeHandler(former)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)  # 0.19 warns each run of its future
    logging.getLogger("megatron_vlmr1").setLevel(level if rank == 0 else max(logging.WARNING, getattr(logging, level)))


def print_json(row: Mapping[str, Any]) -> None:
    """Print `row` on stdout as one line of strict JSON."""
    sys.stdout.write(json_line(row).decode("ascii"))
    sys.stdout.flush()


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Let `parser` take any number of overrides, which `checked_overrides` reads from the result."""
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="such as train.steps=20")


def checked_overrides(words: Sequence[str]) -> list[str]:
    """Return `words` if each is an override ``a.b=c``.

    Raises:
        ValueError: one is not; names it.
    """
    for word in words:
        if not _OVERRIDE.fullmatch(word):
            raise ValueError(f"{word!r} is not an override; expected KEY=VALUE, such as train.steps=20")
    return list(words)


def load_config(name: str, overrides: Sequence[str]) -> Config:
    """Read a config by name with overrides, as `find_config` finds it.

    Raises:
        ValueError: one line naming the file and the key.
    """
    from megatron_vlmr1 import config

    return config.load(find_config(name), checked_overrides(overrides))


def rank_count(cfg: Config, nproc: int | None) -> int:
    """Return how many ranks to start on this machine: `nproc`, or as many as one copy of the model takes.

    Raises:
        ValueError: fewer than one rank.
    """
    if nproc is not None and nproc < 1:
        raise ValueError(f"--nproc {nproc}: at least one rank")
    return nproc or cfg.parallel.ranks_of_a_copy


def run_here(cfg: Config, nproc: int | None, words: Sequence[str], log_dir: Path) -> int:
    """Start the verb `words` as ranks on this machine, as many as `rank_count` says.

    Raises:
        ValueError: fewer than one rank.
    """
    from megatron_vlmr1.launch.local import rank_command, run_ranks

    return run_ranks(rank_count(cfg, nproc), rank_command(words), log_dir)


def log_directory(run_dir: str) -> Path:
    """Return where this attempt's logs and its outcome go, the same on all ranks, which all call it.

    That is the launcher's VLMR1_LOG_DIR; where srun or torchrun started the ranks, a new attempt's directory, which is
    then in VLMR1_LOG_DIR too.

    Raises:
        ValueError: it cannot be made; one line, on all ranks.
    """
    from megatron_vlmr1.launch.local import new_attempt
    from megatron_vlmr1.runtime import distributed

    if "VLMR1_LOG_DIR" not in os.environ:
        path = problem = ""
        if distributed.is_first():
            try:
                path = str(new_attempt(run_dir).resolve())
            except OSError as error:
                problem = f"{run_dir}: {error.strerror}"
        if problem := distributed.broadcast_text(problem):
            raise ValueError(problem)
        os.environ["VLMR1_LOG_DIR"] = distributed.broadcast_text(path)
    return Path(os.environ["VLMR1_LOG_DIR"])


def find_config(name: str) -> Path:
    """Return the path of a config file: `name` itself, or the one of that name that came with the package.

    Raises:
        ValueError: neither is there; lists what came with the package.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = _shipped_configs()
    inside = shipped / name.removeprefix("configs/")
    if inside.is_file() and inside.resolve().is_relative_to(shipped.resolve()):
        return inside
    names = ", ".join(sorted(f"configs/{path.relative_to(shipped)}" for path in shipped.rglob("*.yaml")))
    raise ValueError(f"{name}: no such config file; the package has {names or 'none'}")


def load_hardware(file: str | None, name: str) -> Hardware:
    """Read a hardware file: `file`, or the package's own of that name.

    Raises:
        ValueError: it is not there, or damaged; one line.
    """
    from megatron_vlmr1.plan.hardware import read

    if file:
        return read(Path(file))
    try:
        path = find_config(f"configs/hardware/{name}.yaml")
    except ValueError as error:
        known = ", ".join(sorted(p.stem for p in find_config("configs/hardware/cpu.yaml").parent.glob("*.yaml")))
        raise ValueError(f"--gpu {name}: not known; known: {known}; others with --hardware FILE") from error
    return read(path)


def find_model(name: str) -> Path:
    """Return a Hugging Face directory: `name` itself, or the package's own ``asset:NAME`` or ``configs/model/NAME``."""
    if name.startswith("asset:"):
        from megatron_vlmr1.checkpoint.locate import hf_directory

        return hf_directory(name)
    model = re.fullmatch(r"configs/model/([\w.-]+)/?", name, re.ASCII)
    return _shipped_configs() / "model" / model[1] if model and not Path(name).is_dir() else Path(name)


def _shipped_configs() -> Path:
    return Path(str(importlib.resources.files("megatron_vlmr1"))) / "configs"


def byte_size(text: str) -> int:
    """Read a size such as 64MB or 1GiB, for argparse."""
    match = re.fullmatch(r"(\d{1,15})\s*([KMG]?i?B?)", text.strip(), re.IGNORECASE)
    unit = match[2].upper() if match else ""
    scale = _UNITS.get(unit, _UNITS.get(f"{unit}B"))
    if not match or scale is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 64MB or 1GiB")
    return int(match[1]) * scale


def size_text(count: float) -> str:
    """Return bytes as "1.5 GB"."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


@contextmanager
def slow_progress(what: str, text: Callable[[float], str] = "{:.0f}".format) -> Iterator[Callable[[int, int], None]]:
    """Show how much is done: a bar on a terminal, else a line every ten seconds, and none of what is quicker.

    What is yielded is told how much is done and how much there is; `text` says how that is written.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    begun = said = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= _SAY_EVERY_S and done:
            said = now
            left = duration((total - done) * (now - begun) / done)
            print(f"{what}: {text(done)} of {text(total)}, {left} left", file=sys.stderr, flush=True)

    yield say


@contextmanager
def byte_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show bytes done, bytes a second and the time left: a bar on a terminal, else a line every ten seconds.

    What is yielded is told the bytes done and the bytes in all.
    """
    if sys.stderr.isatty():
        from rich import progress
        from rich.console import Console

        columns = (progress.DownloadColumn(), progress.TransferSpeedColumn(), progress.TimeRemainingColumn())
        with progress.Progress(
            *progress.Progress.get_default_columns()[:2], *columns, console=Console(stderr=True)
        ) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    started: list[tuple[float, int]] = []  # when and with how many bytes the first piece was told of
    said = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if not started:
            started.append((now, done))
        if now - said < _SAY_EVERY_S and done < total:
            return
        said = now
        speed = (done - started[0][1]) / max(1e-9, now - started[0][0])
        left = duration((total - done) / speed) if speed else "?"
        print(f"{what} {size_text(done)} of {size_text(total)}  {size_text(speed)}/s  {left} left", file=sys.stderr)

    yield say
