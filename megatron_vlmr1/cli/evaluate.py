"""`vlmr1 evaluate`: the task's own metric on the config's splits."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlmr1.cli.common import add_overrides, load_config, log_directory, print_json, rank_count, run_here
from megatron_vlmr1.errors import DONE
from megatron_vlmr1.runtime.ranks import identity
from megatron_vlmr1.telemetry.files import write_atomic

if TYPE_CHECKING:
    from megatron_vlmr1.config import Config
    from megatron_vlmr1.data.index import ShardSet

_EPILOG = """\
example:
  vlmr1 evaluate configs/quickstart.yaml --nproc 2 --label after model.path=runs/quickstart

RUN_DIR/evaluations gets LABEL_SPLIT.jsonl (every answer), LABEL_SPLIT_worst.png (the worst ones), and LABEL.json and
LABEL.md: the task's figures with 95 % intervals, by category where rows have a `category` or `class`.
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
    from megatron_vlmr1.config.rules import for_answers
    from megatron_vlmr1.evaluate import results
    from megatron_vlmr1.launch.local import new_attempt
    from megatron_vlmr1.rewards import tasks
    from megatron_vlmr1.train.check import check_data, check_inputs, check_machine

    cfg = for_answers(load_config(args.config, args.overrides))
    if not args.label.isidentifier():
        raise ValueError(f"--label {args.label}: letters, digits and underscores only")
    if not cfg.data.evaluate:
        raise ValueError(f"{args.config}: data.evaluate names no split; nothing to evaluate")
    if identity() is not None:
        return _be_a_rank(cfg, args.label)
    check_inputs(cfg, rank_count(cfg, args.nproc), trains=False)
    check_machine(cfg)
    check_data(cfg, trains=False)
    results.check(tasks.get(cfg.task))
    words = ["evaluate", args.config, "--label", args.label, *args.overrides]
    code = run_here(cfg, args.nproc, words, new_attempt(cfg.run_dir))
    if code == DONE:
        _print(json.loads((_folder(cfg) / f"{args.label}.json").read_bytes()), args.json)
    return code


def _folder(cfg: Config) -> Path:
    return Path(cfg.run_dir) / "evaluations"


def _be_a_rank(cfg: Config, label: str) -> int:
    from megatron_vlmr1.runtime import device

    device.prepare_megatron()  # before megatron-core is imported
    from megatron_vlmr1.checkpoint.locate import hf_directory
    from megatron_vlmr1.data.cache import open_cache
    from megatron_vlmr1.data.index import ShardSet
    from megatron_vlmr1.evaluate import split
    from megatron_vlmr1.parallel.job import joined
    from megatron_vlmr1.rewards.judges import judges
    from megatron_vlmr1.rollout.actor import Actor

    remote = open_cache(cfg.data)
    splits = {name: ShardSet.open(path, remote) for name, path in cfg.data.evaluate.items()}
    with joined(cfg.parallel, cfg.seed) as mesh:
        log_dir = log_directory(cfg.run_dir)
        actor = Actor(hf_directory(cfg.model.path, check=mesh.rank == 0), cfg, mesh)
        figures: dict[str, dict[str, float]] = {}
        speaks, model_type = actor.engine.speaks, actor.policy.shape.family
        with judges(cfg.rewards, cfg.task, mesh, speaks, log_dir, cfg.parallel.timeout_s, model_type) as asked:
            for name, shards in splits.items():
                result = split.evaluate(actor, asked, shards, cfg, mesh)
                split.write(result, f"{label}_{name}", Path(cfg.run_dir), mesh)
                figures[name] = result.figures
        actor.engine.release()
    # After the other ranks have left: resampling a large split may take longer than a collective may.
    if mesh.rank == 0:
        _write_results(cfg, label, figures, splits)
    return DONE


def _write_results(
    cfg: Config, label: str, figures: dict[str, dict[str, float]], splits: Mapping[str, ShardSet]
) -> None:
    from megatron_vlmr1.evaluate import pictures, results
    from megatron_vlmr1.rewards import tasks
    from megatron_vlmr1.types import Sample

    task, folder = tasks.get(cfg.task), _folder(cfg)
    summary, pictured = {}, []
    for name, shards in splits.items():
        rows = results.read_rows(folder / f"{label}_{name}.jsonl")
        summary[name] = results.summarise(rows, task, figures[name], cfg.seed)

        def read(index: int, shards: ShardSet = shards) -> bytes:
            sample = shards.read(index)
            assert isinstance(sample, Sample)  # it was read for its answer
            return sample.images[0]

        if sheet := pictures.worst_sheet(rows, task, read):
            write_atomic(folder / f"{label}_{name}_worst.png", sheet)
            pictured.append(name)
    write_atomic(folder / f"{label}.md", results.markdown(label, task.name, summary, pictured).encode())
    write_atomic(folder / f"{label}.json", (json.dumps(summary, indent=1) + "\n").encode())


def _print(summary: dict[str, dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(summary)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from megatron_vlmr1.evaluate import results

    table = Table("figure", *(escape(name) for name in summary))
    for figure in results.figure_names(summary):
        table.add_row(escape(figure), *(escape(results.cell(values, figure)) for values in summary.values()))
    Console().print(table)
