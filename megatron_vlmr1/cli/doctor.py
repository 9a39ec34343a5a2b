"""``vlmr1 doctor``: what this machine, or the job that it is in, can do."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlmr1 import errors
from megatron_vlmr1.cli.common import add_overrides, load_config, print_json
from megatron_vlmr1.runtime.ranks import identity

if TYPE_CHECKING:
    from megatron_vlmr1.config import Config
    from megatron_vlmr1.launch.doctor_line import Line
    from megatron_vlmr1.launch.preflight import Examination

_JOB_TIMEOUT_S = 120
_EPILOG = """\
examples:
  vlmr1 doctor                                     # this machine
  vlmr1 doctor configs/rec.yaml --run-dir /scratch/me/rec
  srun --ntasks-per-node=8 vlmr1 doctor configs/rec.yaml    # all nodes of a job: network, clocks, versions, GPUs

ok: as it should be. missing: something does without it. bad: mend it first, exit code 2.
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "doctor", help="say what this machine or job can do, what is missing, and what to do about it", epilog=_EPILOG
    )
    parser.add_argument("config", nargs="?", help="check what this config names, too")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="where runs will write (default: the config's)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    add_overrides(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Look, and print a line for each thing.

    Raises:
        ValueError: the config is wrong.
    """
    from megatron_vlmr1.launch import doctor_packages
    from megatron_vlmr1.launch.doctor_line import all_well

    packages = doctor_packages.lines()
    if not all_well(packages):  # the rest could not even be imported
        return _said(packages, None, args.json)
    from megatron_vlmr1.launch.doctor import job_lines, machine_lines

    overrides = [*args.overrides, *([f"run_dir={args.run_dir}"] if args.run_dir and args.config else [])]
    cfg = load_config(args.config, overrides) if args.config else None
    run_dir = Path(cfg.run_dir) if cfg else args.run_dir or Path.cwd()
    found = _examined(cfg, run_dir) if identity() is not None else None
    me = identity()
    if me is not None and me.rank:
        return errors.BAD_INPUT if found and not all_well(job_lines(found)) else errors.DONE
    lines = [*packages, *machine_lines(cfg, run_dir), *(job_lines(found) if found else [])]
    return _said(lines, found, args.json)


def _said(lines: Sequence[Line], found: Examination | None, as_json: bool) -> int:
    """Print the lines; return the exit code."""
    from megatron_vlmr1.launch.doctor_line import all_well

    well = all_well(lines)
    if as_json:
        job = found.document() if found else None
        print_json({"ok": well, "lines": [asdict(line) for line in lines], "job": job})
    else:
        _print_table(lines)
    return errors.DONE if well else errors.BAD_INPUT


def _examined(cfg: Config | None, run_dir: Path) -> Examination:
    """Join the job's other ranks, and look at all nodes.

    Raises:
        ValueError: they do not come: packages are wrong on their node, or the network does not let them.
    """
    import torch.distributed as dist

    from megatron_vlmr1.launch.disk import existing_parent
    from megatron_vlmr1.launch.preflight import examine
    from megatron_vlmr1.runtime import distributed

    try:
        distributed.start(_JOB_TIMEOUT_S)
    except dist.DistError as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"not all ranks met in {_JOB_TIMEOUT_S} s, see what the others say: {said}") from error
    where = distributed.broadcast_text(str(existing_parent(run_dir)))  # of rank 0: another node may lack it
    found = examine("full", Path(where), cfg)
    distributed.stop()
    return found


def _print_table(lines: Sequence[Line]) -> None:
    if importlib.util.find_spec("rich") is None:  # it may be what is missing
        for line in lines:
            print(f"{line.name}: {line.state}: {line.found}{line.do and f' -> {line.do}'}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "missing": "yellow", "bad": "bold red"}
    table = Table("", "state", "found", "what to do", box=None, pad_edge=False)
    for line in lines:
        table.add_row(Text(line.name), Text(line.state, styles[line.state]), Text(line.found), Text(line.do))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
