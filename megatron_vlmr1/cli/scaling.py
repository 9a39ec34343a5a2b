"""``vlmr1 scaling``: a grid of runs, and what it shows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlmr1 import errors
from megatron_vlmr1.cli.common import find_config, load_hardware, print_json

if TYPE_CHECKING:
    from megatron_vlmr1.plan.study import Cell, StudyConfig

_EPILOG = """\
examples:
  vlmr1 scaling run configs/scaling/tiny.yaml --dry-run
  vlmr1 scaling run configs/scaling/tiny.yaml --out runs/scaling/tiny
  vlmr1 scaling report runs/scaling/tiny

A study is a grid: every number of nodes x every point of each axis (layouts, models, batches …). `run` starts each cell
as a job, through SLURM or here, and goes on where it was interrupted when it is given again; `report` shows what is
there so far. Keys of a study: megatron_vlmr1/plan/study.py.
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb to the program's parser."""
    parser = subparsers.add_parser("scaling", help="run a grid of jobs, and report how they scale", epilog=_EPILOG)
    verbs = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    run_parser = verbs.add_parser("run", help="run the cells that are not done", epilog=_EPILOG)
    run_parser.add_argument("study", metavar="STUDY.yaml", help="YAML file, or the name of one that came along")
    run_parser.add_argument(
        "--out", type=Path, metavar="DIR", help="the study's directory (default: runs/scaling/STUDY)"
    )
    run_parser.add_argument("--retry-failed", action="store_true", help="run cells again that failed before")
    run_parser.add_argument("--dry-run", action="store_true", help="print the cells and stop")
    run_parser.add_argument("--json", action="store_true", help="print one JSON document")
    run_parser.set_defaults(run=run)
    report_parser = verbs.add_parser("report", help="tables and plots of a study", epilog=_EPILOG)
    report_parser.add_argument("out", type=Path, metavar="DIR", help="a study's directory")
    report_parser.add_argument(
        "--gpu", default="h100-80gb", metavar="NAME", help="what ran it, to compare with the plan"
    )
    report_parser.add_argument("--hardware", metavar="FILE", help="a file of `vlmr1 plan --fit`, instead")
    report_parser.add_argument("--json", action="store_true", help="print the table as one JSON document")
    report_parser.set_defaults(run=report)


def run(args: argparse.Namespace) -> int:
    """Run a study; exit code 1 if a cell is not done in the end.

    Raises:
        ValueError: the study is refused; one line.
    """
    from megatron_vlmr1.launch import cluster as clusters
    from megatron_vlmr1.launch import slurm
    from megatron_vlmr1.launch.study import DONE, Study
    from megatron_vlmr1.launch.study_jobs import LocalJobs, SlurmJobs
    from megatron_vlmr1.plan import study as studies
    from megatron_vlmr1.runtime.lock import held

    path = find_config(args.study)
    study = studies.read(path)
    out = (args.out or Path("runs", "scaling", path.stem)).absolute()
    config_file = _config_of(study, path)
    cluster = clusters.load(_beside(path, study.cluster) or study.cluster) if study.cluster else None
    ranks_per_node = cluster.ranks_per_node if cluster else study.ranks_per_node or 1
    cells = studies.cells(study, ranks_per_node, config_file, out)
    if args.dry_run:
        return _print_cells(cells, args.json)
    if cluster:
        slurm.check_installed()
    try:
        with held(out):
            jobs = SlurmJobs(config_file, cluster, study.at_once, study.time) if cluster else LocalJobs(config_file)
            whole = Study(path.stem, cells, config_file, out, jobs, study.warmup_steps, _say)
            whole.run(args.retry_failed)
    except OSError as error:
        raise ValueError(f"{out}: {error.strerror or error}; the same command goes on once that is mended") from error
    if args.json:
        print_json({"out": str(out), "cells": [state.document() for state in whole.states]})
    else:
        print(f"vlmr1 scaling report {out}")
    return errors.DONE if all(state.state == DONE for state in whole.states) else errors.DIFFERS


def report(args: argparse.Namespace) -> int:
    """Write the report of a study and print its path and its table.

    Raises:
        ValueError: DIR is no study; one line.
    """
    from megatron_vlmr1.report import scaling, scaling_rows

    rows = scaling_rows.read(args.out, load_hardware(args.hardware, args.gpu))
    page = scaling.write(args.out, rows)
    if args.json:
        print_json({"report": str(page), "cells": [row.document() for row in rows]})
    else:
        sys.stdout.write(scaling.markdown_table(rows) + f"\n{page}\n")
    return errors.DONE


def _config_of(study: StudyConfig, path: Path) -> Path:
    """The runs' config: beside the study, from here, or one that came with the package."""
    return Path(_beside(path, study.config) or find_config(study.config)).absolute()


def _beside(path: Path, name: str) -> str:
    """A file that a study names, if it is beside the study; else nothing."""
    beside = path.parent / name
    return str(beside) if beside.is_file() else ""


def _print_cells(cells: Sequence[Cell], as_json: bool) -> int:
    if as_json:
        print_json({"cells": [{"name": cell.name, "ranks": cell.ranks, "overrides": cell.overrides} for cell in cells]})
    else:
        for cell in cells:
            print(f"{cell.name}: {cell.ranks} ranks, {'/'.join(cell.scaling)}: {' '.join(cell.overrides)}")
    return errors.DONE


def _say(line: str) -> None:
    print(f"scaling: {line}", file=sys.stderr, flush=True)
