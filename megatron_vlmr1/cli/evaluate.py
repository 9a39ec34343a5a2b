"""`vlmr1 evaluate`: the task's own metric on the config's splits."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlmr1.cli.common import add_overrides, load_config, log_directory, print_json, rank_count, run_here
from megatron_vlmr1.errors import DONE
from megatron_vlmr1.runtime.ranks import identity
from megatron_vlmr1.telemetry.files import write_atomic

if TYPE_CHECKING:
    from megatron_vlmr1.config import Config

_EPILOG = """\
example:
  vlmr1 evaluate configs/quickstart.yaml --nproc 2 --label after model.path=runs/quickstart

Every answer goes to RUN_DIR/evaluations/LABEL_SPLIT.jsonl, the figures to RUN_DIR/evaluations/LABEL.json.
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser("evaluate", help="measure a model on held-out data", epilog=_EPILOG)
    parser.add_argument("config", help="YAML file, or the name of one that came with the package")
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks to start here (default: tensor x pipeline)")
    parser.add_argument("--label", default="now", help="name of the results (default: now)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    add_overrides(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Start the ranks and print their result, or be one."""
    from megatron_vlmr1.launch.local import new_attempt
    from megatron_vlmr1.train.check import check_data, check_inputs

    cfg = load_config(args.config, args.overrides)
    if not args.label.isidentifier():
        raise ValueError(f"--label {args.label}: letters, digits and underscores only")
    if not cfg.data.evaluate:
        raise ValueError(f"{args.config}: data.evaluate names no split; nothing to evaluate")
    if identity() is not None:
        return _be_a_rank(cfg, args.label)
    check_inputs(cfg, rank_count(cfg, args.nproc), trains=False)
    check_data(cfg, trains=False)
    words = ["evaluate", args.config, "--label", args.label, *args.overrides]
    code = run_here(cfg, args.nproc, words, new_attempt(cfg.run_dir))
    if code == DONE:
        _print(json.loads((_folder(cfg) / f"{args.label}.json").read_bytes()), args.json)
    return code


def _folder(cfg: Config) -> Path:
    return Path(cfg.run_dir) / "evaluations"


def _be_a_rank(cfg: Config, label: str) -> int:
    from megatron_vlmr1.checkpoint.locate import hf_directory
    from megatron_vlmr1.data.index import ShardSet
    from megatron_vlmr1.evaluate import split
    from megatron_vlmr1.parallel.job import joined
    from megatron_vlmr1.rewards.judges import judges
    from megatron_vlmr1.rollout.actor import Actor

    splits = {name: ShardSet.open(path) for name, path in cfg.data.evaluate.items()}
    with joined(cfg.parallel, cfg.seed) as mesh:
        log_dir = log_directory(cfg.run_dir)
        actor = Actor(hf_directory(cfg.model.path, check=mesh.rank == 0), cfg, mesh)
        results: dict[str, Any] = {}
        with judges(cfg.rewards, cfg.task, mesh, actor.engine.speaks, log_dir, cfg.parallel.timeout_s) as asked:
            for name, shards in splits.items():
                result = split.evaluate(actor, asked, shards, cfg, mesh)
                split.write(result, f"{label}_{name}", Path(cfg.run_dir), mesh)
                results[name] = result.figures
        if mesh.rank == 0:
            write_atomic(_folder(cfg) / f"{label}.json", (json.dumps(results, indent=1) + "\n").encode())
    return DONE


def _print(results: dict[str, dict[str, float]], as_json: bool) -> None:
    if as_json:
        print_json(results)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", *results)
    for figure in next(iter(results.values())):
        table.add_row(figure, *(f"{values[figure]:.4g}" for values in results.values()))
    Console().print(table)
