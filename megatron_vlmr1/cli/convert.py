"""`vlmr1 convert`: checkpoints to and from Hugging Face directories."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlmr1.cli.common import byte_progress, byte_size, find_model, print_json
from megatron_vlmr1.errors import BAD_INPUT, DIFFERS, DONE

if TYPE_CHECKING:
    import torch

    from megatron_vlmr1.config import ParallelConfig

_LONG_S = 10**6  # one rank may write for hours while another waits

_NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # nothing is computed

_EPILOG = """\
example:
  vlmr1 convert export runs/quickstart runs/quickstart/export --dtype bf16 --max-shard-size 5GB
  vlmr1 convert export runs/quickstart /tmp/megatron --format torch_dist
  vlmr1 convert import /tmp/megatron /tmp/back
  vlmr1 convert roundtrip megatron_vlmr1/assets/tiny_vlm /tmp/copy --tp 2 --pp 2
  vlmr1 convert roundtrip megatron_vlmr1/assets/tiny_vlm /tmp/copy --pp 3 --layers 2,1,1
  vlmr1 convert verify megatron_vlmr1/assets/tiny_vlm /tmp/copy
  vlmr1 convert plan configs/model/qwen2.5-vl-72b --tp 8 --pp 4
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb and its parts."""
    parser = subparsers.add_parser("convert", help="to and from Hugging Face directories", epilog=_EPILOG)
    parts = parser.add_subparsers(title="what", metavar="WHAT", required=True)
    export = parts.add_parser("export", help="make a Hugging Face directory of a checkpoint", epilog=_EPILOG)
    export.add_argument("checkpoint", help="checkpoint step_N, run directory (its newest) or Hugging Face directory")
    _add_output(export)
    export.add_argument(
        "--format", choices=("hf", "torch_dist"), default="hf", help="torch_dist: megatron-core's (default: hf)"
    )
    export.add_argument("--prefix", help="torch_dist: what precedes GPTModel's names (default: language_model.)")
    export.set_defaults(run=_shared_out(_export))
    back = parts.add_parser("import", help="make a Hugging Face directory of a torch_dist checkpoint", epilog=_EPILOG)
    back.add_argument("checkpoint", help="directory with .metadata, or with latest_checkpointed_iteration.txt")
    _add_output(back)
    back.add_argument("--config", metavar="HF_DIR", help="config.json, tokenizer (default: huggingface/ beside it)")
    back.set_defaults(run=_shared_out(_import))
    trip = parts.add_parser("roundtrip", help="load on T x P ranks and save again", epilog=_EPILOG)
    trip.add_argument("source", help="Hugging Face directory")
    trip.add_argument("out", help="new directory")
    _add_layout(trip)
    trip.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="type in memory (default: fp32)")
    trip.set_defaults(run=_roundtrip)
    verify = parts.add_parser("verify", help="compare two directories tensor by tensor", epilog=_EPILOG)
    verify.add_argument("left", help="Hugging Face directory, checkpoint or run directory")
    verify.add_argument("right", help="the same")
    verify.set_defaults(run=_verify)
    plan = parts.add_parser("plan", help="which rank of a layout holds what", epilog=_EPILOG)
    plan.add_argument("source", help="Hugging Face directory; config.json is enough")
    _add_layout(plan)
    plan.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="type in memory (default: bf16)")
    plan.add_argument("--json", action="store_true", help="one JSON object: every part of a tensor, every rank's bytes")
    plan.set_defaults(run=_plan)
    pickled = parts.add_parser("safetensors", help="make safetensors of pytorch_model*.bin, without running its code")
    pickled.add_argument("source", help="Hugging Face directory with pytorch_model*.bin")
    pickled.add_argument("out", help="new directory")
    pickled.set_defaults(run=_safetensors)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", help="new directory")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="type of the weights (default: as they are)")
    parser.add_argument("--max-shard-size", type=byte_size, metavar="SIZE", help="of a file of weights (default: 5GB)")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes to share the files out over")


def _add_layout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tp", type=int, default=1, metavar="T", help="tensor-parallel size")
    parser.add_argument("--pp", type=int, default=1, metavar="P", help="pipeline-parallel size")
    parser.add_argument("--vp", type=int, default=1, metavar="V", help="chunks of layers on each pipeline stage")
    parser.add_argument("--layers", metavar="N,N,...", help="layers of each chunk, in order (default: equal shares)")


def _layout(args: argparse.Namespace) -> ParallelConfig:
    from megatron_vlmr1 import config

    values: dict[str, object] = {
        "tensor_model_parallel_size": args.tp,
        "pipeline_model_parallel_size": args.pp,
        "virtual_pipeline_model_parallel_size": args.vp,
    }
    if args.layers is not None:
        values["pipeline_layers"] = args.layers.split(",")
    return config.parse_section(config.ParallelConfig, values, "layout")


def _shared_out(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Let a verb run on `--nproc` ranks, or on those that srun or torchrun started."""

    def start(args: argparse.Namespace) -> int:
        from megatron_vlmr1.launch.local import rank_command
        from megatron_vlmr1.runtime.ranks import identity

        if args.nproc < 1:
            raise ValueError(f"--nproc {args.nproc}: at least one process")
        me = identity()
        if me is None and args.nproc > 1:
            return _run_ranks(args.nproc, rank_command(args.words))
        return run(args) if me is None else _as_rank(run, args)

    return start


def _as_rank(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    os.environ |= _NO_GPU  # before torch is loaded
    from megatron_vlmr1.runtime import distributed

    distributed.start(_LONG_S)
    try:
        return run(args)
    finally:
        distributed.stop()


def _run_ranks(nproc: int, command: Sequence[str]) -> int:
    """Run ranks here; their logs stay where one of them crashed."""
    import shutil
    import tempfile

    from megatron_vlmr1.launch.local import run_ranks

    logs = tempfile.mkdtemp(prefix="vlmr1-")
    code = run_ranks(nproc, command, logs, _NO_GPU)
    if code in (DONE, BAD_INPUT):
        shutil.rmtree(logs, ignore_errors=True)
    return code


def _say(out: Path) -> None:
    """Print what was made, on the first rank."""
    from megatron_vlmr1.runtime import distributed

    if distributed.place()[0] == 0:
        print(out)


def _export(args: argparse.Namespace) -> int:
    from megatron_vlmr1.checkpoint.release import export
    from megatron_vlmr1.report.card import model_card, run_of

    if args.format == "torch_dist":
        return _export_torch_dist(args)
    if args.prefix is not None:
        raise ValueError("--prefix is for --format torch_dist")
    checkpoint, out = Path(args.checkpoint), Path(args.out)
    run = run_of(checkpoint)
    card = model_card(run, out.name) if run else {}
    with byte_progress("export") as progress:
        export(checkpoint, out, _dtype(args), _shard_bytes(args), card, progress)
    _say(out)
    return DONE


def _export_torch_dist(args: argparse.Namespace) -> int:
    from megatron_vlmr1.checkpoint.torch_dist import export_torch_dist
    from megatron_vlmr1.checkpoint.torch_dist_names import LANGUAGE_PREFIX

    prefix = LANGUAGE_PREFIX if args.prefix is None else args.prefix
    checkpoint, out = Path(args.checkpoint), Path(args.out)
    with byte_progress("export") as progress:
        export_torch_dist(checkpoint, out, _dtype(args), progress, prefix, _shard_bytes(args))
    _say(out)
    return DONE


def _import(args: argparse.Namespace) -> int:
    from megatron_vlmr1.checkpoint.torch_dist import import_torch_dist

    config = Path(args.config) if args.config else None
    with byte_progress("import") as progress:
        out = import_torch_dist(
            Path(args.checkpoint), Path(args.out), config, _dtype(args), _shard_bytes(args), progress
        )
    _say(out)
    return DONE


def _dtype(args: argparse.Namespace) -> torch.dtype | None:
    from megatron_vlmr1.runtime.device import DTYPES

    return DTYPES[args.dtype] if args.dtype else None


def _shard_bytes(args: argparse.Namespace) -> int:
    from megatron_vlmr1.checkpoint.writer import MAX_SHARD_BYTES

    return MAX_SHARD_BYTES if args.max_shard_size is None else int(args.max_shard_size)


def _roundtrip(args: argparse.Namespace) -> int:
    from megatron_vlmr1.runtime import device

    device.prepare_megatron()  # before megatron-core is imported
    from megatron_vlmr1.checkpoint.convert import check_roundtrip, roundtrip
    from megatron_vlmr1.launch.local import rank_command
    from megatron_vlmr1.runtime.ranks import identity

    layout = _layout(args)
    if identity() is not None:
        roundtrip(Path(args.source), Path(args.out), layout, args.precision)
        return DONE
    check_roundtrip(Path(args.source), Path(args.out), args.precision)
    words = ["convert", "roundtrip", args.source, args.out, "--precision", args.precision]
    words += ["--tp", str(args.tp), "--pp", str(args.pp), "--vp", str(args.vp)]
    words += ["--layers", args.layers] if args.layers is not None else []
    code = _run_ranks(layout.ranks_of_a_copy, rank_command(words))
    if code == DONE:
        print(args.out)
    return code


def _verify(args: argparse.Namespace) -> int:
    from megatron_vlmr1.checkpoint.convert import differences

    found = differences(Path(args.left), Path(args.right))
    for line in found:
        print(line)
    print(f"{len(found)} differences" if found else "the same tensors, bit for bit")
    return DIFFERS if found else DONE


def _plan(args: argparse.Namespace) -> int:
    from rich.console import Console

    from megatron_vlmr1.checkpoint.coverage import cover
    from megatron_vlmr1.models.families import read_shape
    from megatron_vlmr1.report.coverage import mapping_rows, mapping_table, rank_table
    from megatron_vlmr1.runtime.device import DTYPES

    shape, layout = read_shape(find_model(args.source)), _layout(args)
    coverage, bytes_each = cover(shape, layout), DTYPES[args.precision].itemsize
    if args.json:
        ranks = [{"parameters": count, "bytes": count * bytes_each} for count in coverage.rank_parameters]
        print_json({"parts": [*mapping_rows(coverage)], "ranks": ranks})
        return DONE
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(mapping_table(shape, coverage))
    console.print(rank_table(layout, coverage, bytes_each))
    return DONE


def _safetensors(args: argparse.Namespace) -> int:
    from megatron_vlmr1.checkpoint.bins import bins_to_safetensors

    with byte_progress("convert") as progress:
        print(bins_to_safetensors(Path(args.source), Path(args.out), progress))
    return DONE
