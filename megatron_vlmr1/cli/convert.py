"""`vlmr1 convert`: checkpoints to and from Hugging Face directories."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_vlmr1.cli.common import byte_progress, byte_size
from megatron_vlmr1.errors import DIFFERS, DONE

_EPILOG = """\
example:
  vlmr1 convert export runs/quickstart runs/quickstart/export --dtype bf16 --max-shard-size 5GB
  vlmr1 convert roundtrip megatron_vlmr1/assets/tiny_vlm /tmp/copy --tp 2 --pp 2
  vlmr1 convert verify megatron_vlmr1/assets/tiny_vlm /tmp/copy
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb and its parts."""
    parser = subparsers.add_parser("convert", help="to and from Hugging Face directories", epilog=_EPILOG)
    parts = parser.add_subparsers(title="what", metavar="WHAT", required=True)
    export = parts.add_parser("export", help="make a Hugging Face directory of a checkpoint", epilog=_EPILOG)
    export.add_argument("checkpoint", help="checkpoint step_N, or a run directory (its newest)")
    export.add_argument("out", help="new directory")
    export.add_argument("--dtype", choices=("fp32", "bf16"), help="type of the weights (default: as they are)")
    export.add_argument(
        "--max-shard-size", type=byte_size, default="5GB", metavar="SIZE", help="of one file (default: 5GB)"
    )
    export.set_defaults(run=_export)
    trip = parts.add_parser("roundtrip", help="load on T x P ranks and save again", epilog=_EPILOG)
    trip.add_argument("source", help="Hugging Face directory")
    trip.add_argument("out", help="new directory")
    trip.add_argument("--tp", type=int, default=1, metavar="T", help="tensor-parallel size")
    trip.add_argument("--pp", type=int, default=1, metavar="P", help="pipeline-parallel size")
    trip.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="type in memory (default: fp32)")
    trip.set_defaults(run=_roundtrip)
    verify = parts.add_parser("verify", help="compare two directories tensor by tensor", epilog=_EPILOG)
    verify.add_argument("left", help="Hugging Face directory, checkpoint or run directory")
    verify.add_argument("right", help="the same")
    verify.set_defaults(run=_verify)


def _export(args: argparse.Namespace) -> int:
    from megatron_vlmr1.checkpoint.release import export
    from megatron_vlmr1.report.card import model_card, run_of
    from megatron_vlmr1.runtime.device import DTYPES

    checkpoint, out = Path(args.checkpoint), Path(args.out)
    dtype = DTYPES[args.dtype] if args.dtype else None
    run = run_of(checkpoint)
    card = model_card(run, out.name) if run else {}
    with byte_progress("export") as progress:
        export(checkpoint, out, dtype, args.max_shard_size, card, progress)
    print(out)
    return DONE


def _roundtrip(args: argparse.Namespace) -> int:
    import tempfile

    from megatron_vlmr1.checkpoint.convert import roundtrip
    from megatron_vlmr1.config import ParallelConfig
    from megatron_vlmr1.launch.local import rank_command, run_ranks
    from megatron_vlmr1.runtime.ranks import identity

    if min(args.tp, args.pp) < 1:
        raise ValueError("--tp and --pp are at least 1")
    if identity() is None:
        if Path(args.out).exists():
            raise ValueError(f"{args.out}: exists already; name a new directory")
        words = ["convert", "roundtrip", args.source, args.out, "--tp", str(args.tp), "--pp", str(args.pp)]
        with tempfile.TemporaryDirectory(prefix="vlmr1-") as logs:
            command = rank_command([*words, "--precision", args.precision])
            code = run_ranks(args.tp * args.pp, command, logs)
        if code == DONE:
            print(args.out)
        return code
    layout = ParallelConfig(tensor_model_parallel_size=args.tp, pipeline_model_parallel_size=args.pp)
    roundtrip(Path(args.source), Path(args.out), layout, args.precision)
    return DONE


def _verify(args: argparse.Namespace) -> int:
    from megatron_vlmr1.checkpoint.convert import differences

    found = differences(Path(args.left), Path(args.right))
    for line in found:
        print(line)
    print(f"{len(found)} differences" if found else "the same tensors, bit for bit")
    return DIFFERS if found else DONE
