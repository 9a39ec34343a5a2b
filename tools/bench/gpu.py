"""What one GPU makes of this program: its ceilings first, then training, decoding, kernels and a whole GRPO step.

`python tools/bench/gpu.py` takes under eight minutes and needs no arguments, data or weights: models have the published
shapes of Qwen2.5-VL-3B and 7B and random numbers. It writes docs/results/gpu_DEVICE.json after every case, and the
roofline beside it. What could not be measured is a row with its reason. `vlmr1 plan --fit docs/results/gpu_DEVICE.json
--gpu h100-80gb --write FILE.yaml` lets the planner learn from it. `--tiny` does all of it with a tiny model in seconds,
on a CPU too: then only that it runs means anything.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rich.console import Console
from rich.table import Table

from tools.bench import common

# Parts in their order, and the share of the time that each may take; time that one leaves is the next one's.
PARTS = {
    "ceilings": 0.12,
    "train": 0.36,
    "decode": 0.28,
    "tower": 0.05,
    "logprobs": 0.03,
    "attention": 0.03,
    "step": 0.13,
}
LIMIT_S = 420.0  # and some seconds before, for imports and CUDA
PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers")
FIRST = "ceilings"  # always measured: the others are held against it


def main(words: Sequence[str] | None = None) -> int:
    """Measure; return the exit code."""
    args = _arguments(words)
    from megatron_vlmr1.config import ParallelConfig
    from megatron_vlmr1.parallel import job
    from megatron_vlmr1.runtime import device

    if not device.has_cuda() and not args.tiny:
        print("no CUDA device: --tiny runs every part with tiny shapes on the CPU", file=sys.stderr)
        return 2
    name = re.sub(r"\W+", "_", device.name() or "cpu").strip("_").lower()
    out = args.out or (common.ROOT / "runs" / "gpu_tiny.json" if args.tiny else common.RESULTS / f"gpu_{name}.json")
    with job.joined(ParallelConfig(timeout_s=600), 0) as mesh:
        if mesh.world != 1:
            print(f"this is one of {mesh.world} ranks: gpu.py measures one GPU, start it alone", file=sys.stderr)
            return 2
        document = measure(args, mesh, out)
    _finish(document, out, args.json)
    return 0


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=_parts, default=list(PARTS), metavar="A,B", help=f"of {', '.join(PARTS)}")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="where to (default: docs/results/gpu_DEVICE.json)"
    )
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="of all parts together (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, and runs/gpu_tiny.json")
    parser.add_argument("--json", action="store_true", help="the document on stdout, all else on stderr")
    return parser.parse_args(words)


def _parts(text: str) -> list[str]:
    wanted = text.split(",")
    if unknown := [name for name in wanted if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(PARTS)}")
    return [name for name in PARTS if name in wanted or name == FIRST]


def measure(args: argparse.Namespace, mesh: Any, out: Path) -> dict[str, Any]:
    """Measure the parts that were asked for; the document is in `out` after every case."""
    from megatron_vlmr1.telemetry.files import write_atomic
    from tools.bench.gpu_parts import asked, ceilings, decode, kernels, roofline, step, train
    from tools.bench.gpu_parts.measuring import Bench

    functions = {
        "ceilings": ceilings.measure,
        "train": train.measure,
        "decode": decode.measure,
        "tower": kernels.tower,
        "logprobs": kernels.logprobs,
        "attention": kernels.attention,
        "step": step.measure,
    }
    document: dict[str, Any] = _facts(args)

    def keep(rows: Sequence[Mapping[str, Any]]) -> None:
        document.update(
            seconds=round(bench.spent_s, 1),
            ceilings=bench.ceilings,
            rows=list(rows),
            asked=asked.beside(rows),
            rates=[{"name": name, "unit": _unit(name), "value": value} for name, value in bench.rates.items()],
        )
        write_atomic(out, (json.dumps(document, indent=1) + "\n").encode())

    bench = Bench(args.tiny, args.limit_s, keep)
    whole, passed = sum(PARTS[name] for name in args.only), 0.0
    for name in args.only:
        passed += PARTS[name] / whole
        bench.begin(name, passed)
        functions[name](bench, mesh)
        roofline.draw(document, out.with_suffix(".png"))  # each time, as this may be cut
    return document


def _unit(rate: str) -> str:
    from megatron_vlmr1.plan.fit import RATES

    return RATES[rate]


def _facts(args: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured on what, and when."""
    import torch

    from megatron_vlmr1.runtime import device
    from megatron_vlmr1.telemetry import nvml

    card: dict[str, Any] = {"name": device.name() or common.cpu_name()}
    if device.has_cuda():
        card |= {
            "memory_bytes": torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory,
            "capability": list(device.capability()),
            "driver": nvml.driver_version() or "unknown",
            "cuda": torch.version.cuda,
        }
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "tiny": args.tiny,
        "parts": args.only,
        "limit_s": args.limit_s,
        "device": card,
        "host": common.machine(),
        "versions": {name: _version(name) for name in PACKAGES},
        "ceilings": {},
        "rows": [],
        "rates": [],
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _finish(document: Mapping[str, Any], out: Path, as_json: bool) -> None:
    """Print the table, what is asked of it, and where it is."""
    from tools.bench.gpu_parts import asked

    console = Console(stderr=as_json, width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(_table(document))
    for row in document["asked"]:
        console.print(asked.in_words(row))
    picture = out.with_suffix(".png")
    drawn = f", {picture}" if picture.is_file() else ""
    console.print(f"{document['seconds']:.0f} s; {out}{drawn}", soft_wrap=True)
    if as_json:
        print(json.dumps(document))


def _table(document: Mapping[str, Any]) -> Table:
    from tools.bench.gpu_parts.measuring import in_words

    out = Table(title=document["device"]["name"])
    for heading in ("part", "case", "figures"):
        out.add_column(heading)
    for row in document["rows"]:
        text = f"not measured: {row['not_measured']}" if "not_measured" in row else in_words(row["figures"])
        out.add_row(row["part"], row["case"], text.replace("[", r"\["))
    return out


if __name__ == "__main__":
    sys.exit(main())
