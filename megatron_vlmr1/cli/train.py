"""`vlmr1 train`: sft or grpo, as the config says."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlmr1.cli.common import add_overrides, load_config, log_directory, rank_count, run_here
from megatron_vlmr1.errors import BAD_INPUT, DONE, STOPPED, RunStopped
from megatron_vlmr1.runtime import attempts
from megatron_vlmr1.runtime.ranks import identity
from megatron_vlmr1.runtime.signals import StopFlag

if TYPE_CHECKING:
    from megatron_vlmr1.config import Config

logger = logging.getLogger(__name__)

_ALLOW = "--allow-config-change"

_EPILOG = """\
example, on the data that the quickstart made:
  vlmr1 train configs/quickstart.yaml --nproc 2 run_dir=runs/short train.steps=20

Under srun or torchrun this joins the job. Alone it starts --nproc ranks on this machine. A run directory that has
checkpoints is continued from the newest valid one.
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser("train", help="train a policy (sft or grpo)", epilog=_EPILOG)
    parser.add_argument("config", help="YAML file, or the name of one that came with the package")
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks to start here (default: tensor x pipeline)")
    parser.add_argument("--retry", action="store_true", help="start although the same step failed three times in a row")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and what it costs, then stop")
    parser.add_argument(
        _ALLOW,
        action="store_true",
        help="continue a run whose config was changed, and list the changes",
    )
    add_overrides(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Start the ranks, or be one."""
    from megatron_vlmr1 import config
    from megatron_vlmr1.launch.local import new_attempt
    from megatron_vlmr1.runtime.lock import held
    from megatron_vlmr1.train.check import check_data, check_inputs, check_machine

    cfg = load_config(args.config, args.overrides)
    if identity() is not None and not args.dry_run:
        return _be_a_rank(cfg, args.retry, args.allow_config_change)
    check_inputs(cfg, rank_count(cfg, args.nproc))
    if args.dry_run:
        sys.stdout.write(config.dump(cfg))
        _print_plan(cfg, args.nproc)
        _warn_of_absent_data(cfg)
        return DONE
    check_machine(cfg)
    check_data(cfg)
    with held(Path(cfg.run_dir)):
        pass  # to be told at once; rank 0 holds it while it runs
    flags = [flag for flag, given in (("--retry", args.retry), (_ALLOW, args.allow_config_change)) if given]
    return run_here(cfg, args.nproc, ["train", args.config, *flags, *args.overrides], new_attempt(cfg.run_dir))


def _print_plan(cfg: Config, nproc: int | None) -> None:
    """Print the layout, the memory of a rank and the work of a step as YAML comments."""
    from megatron_vlmr1.plan.lines import lines
    from megatron_vlmr1.plan.shapes import read_plan_shape

    for line in lines(cfg, read_plan_shape(cfg.model.path), rank_count(cfg, nproc)):
        sys.stdout.write(f"# {line}\n")


def _warn_of_absent_data(cfg: Config) -> None:
    """Say what data is missing: a plan can be made without it, or where it is not."""
    from megatron_vlmr1.train.check import check_data

    try:
        check_data(cfg)
    except ValueError as error:
        logger.warning("%s", error)


def _be_a_rank(cfg: Config, retry: bool, allow_config_change: bool) -> int:
    stop = StopFlag()  # before the slow imports: from here on a signal asks for a checkpoint
    import torch.distributed as dist

    from megatron_vlmr1.runtime import device

    device.prepare_megatron()  # before megatron-core is imported
    from megatron_vlmr1.launch.preflight import preflight
    from megatron_vlmr1.parallel.job import joined
    from megatron_vlmr1.runtime.watchdog import Watchdog
    from megatron_vlmr1.train import grpo, sft

    train = {"grpo": grpo.train, "sft": sft.train}[cfg.method]
    with joined(cfg.parallel, cfg.seed) as mesh:
        log_dir = log_directory(cfg.run_dir)
        try:
            _check_crash_loop(log_dir, retry)
            with Watchdog(log_dir, mesh.rank, mesh.world, cfg.parallel.timeout_s):
                preflight(cfg, log_dir)
                done = train(cfg, mesh, stop, allow_config_change)
        except RunStopped as stopped:
            if mesh.rank == 0:
                attempts.write_outcome(log_dir, str(stopped), stopped.code, stopped.step)
            dist.barrier()  # under srun the first rank to leave takes the others with it
            raise
        except ValueError as error:
            if mesh.rank == 0:
                attempts.write_outcome(log_dir, str(error), BAD_INPUT, None)
            raise
        if mesh.rank == 0:
            attempts.write_outcome(log_dir, f"{done.step} of {cfg.train.steps} steps done", DONE, done.step)
    return DONE


def _check_crash_loop(log_dir: Path, retry: bool) -> None:
    """Refuse to start where the same step failed three times in a row, unless told to try again; all ranks call it.

    Raises:
        RunStopped: it did (17).
    """
    from megatron_vlmr1.runtime import distributed

    problem = ""
    if distributed.is_first():
        if retry:
            (log_dir / attempts.RETRY).touch()
        else:
            problem = attempts.crash_loop(log_dir)
    if problem := distributed.broadcast_text(problem):
        raise RunStopped(STOPPED, problem)
