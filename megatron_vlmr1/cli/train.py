"""`vlmr1 train`: sft or grpo, as the config says."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlmr1.cli.common import add_overrides, load_config, run_here
from megatron_vlmr1.errors import BAD_INPUT, DONE, RunStopped
from megatron_vlmr1.runtime.ranks import identity
from megatron_vlmr1.runtime.signals import StopFlag
from megatron_vlmr1.telemetry.files import json_line, write_atomic

if TYPE_CHECKING:
    from megatron_vlmr1.config import Config

_EPILOG = """\
example:
  vlmr1 train configs/quickstart.yaml --nproc 2 train.steps=20

Under srun or torchrun this joins the job. Alone it starts --nproc ranks on this machine. A run directory that has
checkpoints is continued from the newest valid one.
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser("train", help="train a policy (sft or grpo)", epilog=_EPILOG)
    parser.add_argument("config", help="YAML file, or the name of one that came with the package")
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks to start here (default: tensor x pipeline)")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and what it costs, then stop")
    add_overrides(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Start the ranks, or be one."""
    from megatron_vlmr1 import config
    from megatron_vlmr1.launch.local import new_attempt
    from megatron_vlmr1.runtime.lock import held
    from megatron_vlmr1.train.check import check_inputs

    cfg = load_config(args.config, args.overrides)
    if args.dry_run:
        sys.stdout.write(config.dump(cfg))
        _print_plan(cfg, args.nproc)
        return DONE
    if identity() is not None:
        return _be_a_rank(cfg)
    check_inputs(cfg)
    with held(Path(cfg.run_dir)):
        pass  # to be told at once; rank 0 holds it while it runs
    return run_here(cfg, args.nproc, ["train", args.config, *args.overrides], new_attempt(cfg.run_dir))


def _print_plan(cfg: Config, nproc: int | None) -> None:
    """Print the layout, the memory of a rank and the work of a step as YAML comments."""
    from megatron_vlmr1.checkpoint.locate import hf_directory
    from megatron_vlmr1.models.families import read_shape
    from megatron_vlmr1.plan.step import lines

    shape = read_shape(hf_directory(cfg.model.path, check=False))
    world = nproc or cfg.parallel.tensor_model_parallel_size * cfg.parallel.pipeline_model_parallel_size
    for line in lines(cfg, shape, world):
        sys.stdout.write(f"# {line}\n")


def _be_a_rank(cfg: Config) -> int:
    stop = StopFlag()  # before the slow imports: from here on a signal asks for a checkpoint
    import torch.distributed as dist

    from megatron_vlmr1.parallel.job import joined
    from megatron_vlmr1.train import grpo, sft

    train = {"grpo": grpo.train, "sft": sft.train}[cfg.method]
    with joined(cfg.parallel, cfg.seed) as mesh:
        try:
            done = train(cfg, mesh, stop)
        except RunStopped as stopped:
            if mesh.rank == 0:
                _write_outcome(cfg.run_dir, str(stopped), stopped.code, stopped.step)
            dist.barrier()  # under srun the first rank to leave takes the others with it
            raise
        except ValueError as error:
            if mesh.rank == 0:
                _write_outcome(cfg.run_dir, str(error), BAD_INPUT, None)
            raise
        if mesh.rank == 0:
            _write_outcome(cfg.run_dir, f"{done.step} of {cfg.train.steps} steps done", DONE, done.step)
    return DONE


def _write_outcome(run_dir: str, reason: str, code: int, step: int | None) -> None:
    """Say how the attempt ended, for the launcher or the batch script."""
    folder = Path(os.environ.get("VLMR1_LOG_DIR", str(Path(run_dir) / "logs")))
    write_atomic(folder / "outcome.json", json_line({"reason": reason, "code": code, "step": step}))
