"""`vlmr1 submit`: a training run as SLURM jobs."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import Any

from megatron_vlmr1.cli.common import add_overrides, load_config, print_json
from megatron_vlmr1.errors import DONE

logger = logging.getLogger(__name__)

_VARIABLE = "VLMR1_CLUSTER"
_EPILOG = f"""\
example, one that prints the script and one that submits it, with up to four jobs to follow:
  vlmr1 submit configs/rec.yaml --nodes 2 --cluster example_h100 --dry-run
  vlmr1 submit configs/rec.yaml --nodes 2 --cluster mine.yaml --chain 5 --time 4:00:00 train.steps=600

The job runs a snapshot of the code and the config, RUN_DIR/snapshots/K, and its script is there too. It saves and is
requeued before its time limit and where it is preempted; RUN_DIR/logs/latest has what the ranks say.
{_VARIABLE} may hold the name of the cluster's file.
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser("submit", help="submit a training run to SLURM", epilog=_EPILOG)
    parser.add_argument("config", help="YAML file, or the name of one that came with the package")
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes of the training")
    parser.add_argument(
        "--cluster",
        metavar="NAME|FILE",
        default=os.environ.get(_VARIABLE),
        help="facts of the cluster: a YAML file, or the name of one in configs/cluster",
    )
    parser.add_argument("--chain", type=int, default=1, metavar="K", help="jobs in a row, until one finishes the run")
    parser.add_argument("--time", metavar="LIMIT", help="time limit of each job, in SLURM's words (default: cluster's)")
    parser.add_argument(
        "--rewards-nodes", type=int, default=0, metavar="N", help="1: the reward service on a node of its own"
    )
    parser.add_argument("--retry", action="store_true", help="start although the same step failed three times in a row")
    parser.add_argument(
        "--allow-config-change",
        action="store_true",
        help="continue a run whose config was changed, and list the changes",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script and write nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object: the jobs, the run directory, the script")
    add_overrides(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Submit, or print what would be.

    Raises:
        ValueError: something does not fit together; one line.
    """
    from megatron_vlmr1.launch import cluster
    from megatron_vlmr1.launch.submit import Request, script, submit
    from megatron_vlmr1.train.check import check_data

    if not args.cluster:
        raise ValueError(f"say --cluster NAME|FILE, or set {_VARIABLE}; configs/cluster has examples")
    cfg, facts = load_config(args.config, args.overrides), cluster.load(args.cluster)
    flags = {"retry": args.retry, "allow_config_change": args.allow_config_change}
    request = Request(cfg, facts, args.nodes, args.chain, args.time, args.rewards_nodes, **flags)
    if args.dry_run:
        text = script(request)
        print_json({"script": text}) if args.json else sys.stdout.write(text)
        try:
            check_data(cfg)
        except ValueError as error:  # a script can be looked at without the data, or where it is not
            logger.warning("%s", error)
        return DONE
    jobs = submit(request)
    if args.json:
        print_json({"jobs": jobs, "run_dir": str(request.run_dir)})
    else:
        print(f"submitted {', '.join(jobs)}: what they say will be in {request.run_dir}/logs")
    return DONE
