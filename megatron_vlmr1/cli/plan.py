"""`vlmr1 plan`: memory, time and layout, before the queue."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlmr1.cli.common import add_overrides, find_model, load_config, load_hardware, print_json
from megatron_vlmr1.errors import DONE

if TYPE_CHECKING:
    from megatron_vlmr1.config import Config
    from megatron_vlmr1.plan.hardware import Hardware
    from megatron_vlmr1.plan.shapes import PlanShape

_EPILOG = """\
examples:
  vlmr1 plan configs/recipe/72b.yaml --gpus 64 --chart plan.png
  vlmr1 plan configs/recipe/7b.yaml --gpus 16 --gpu h200-141gb --completion-tokens 150 --json
  vlmr1 plan --fit runs/rec --fit bench.json --gpu h100-80gb --write my_h100.yaml

Prompts, images and completions are as long as the config allows, unless told otherwise. Memory is always counted for
the largest step; of dynamic sampling one round is timed. Exit code 2 where the config's own layout cannot divide or
does not fit; what does is printed.
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "plan",
        help="memory, FLOPs and time of a config on so many GPUs, and the best layout for them",
        epilog=_EPILOG,
        description="Checks every rule of divisibility, predicts memory by phase and time by phase, and recommends.",
    )
    parser.add_argument("config", nargs="?", help="YAML file, or the name of one that came with the package")
    parser.add_argument("--gpus", type=int, metavar="N", help="devices of the job")
    parser.add_argument("--gpu", default="h100-80gb", metavar="NAME", help="a file of configs/hardware (h100-80gb)")
    parser.add_argument("--hardware", metavar="FILE", help="a file like those, instead")
    parser.add_argument("--model", metavar="PATH", help="directory with a config.json, or a name of configs/model")
    parser.add_argument("--prompt-tokens", type=float, metavar="N", help="of an average prompt, its image among them")
    parser.add_argument("--image-tokens", type=float, metavar="N", help="of an average image; 0 for none")
    parser.add_argument("--completion-tokens", type=float, metavar="N", help="of an average completion")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--chart", metavar="FILE.png", help="draw the memory, too")
    parser.add_argument(
        "--fit",
        action="append",
        metavar="RUN_DIR|FILE.json",
        help="fit the hardware file to finished runs, or to rates that a benchmark measured",
    )
    parser.add_argument("--write", metavar="FILE.yaml", help="where --fit writes the fitted hardware file")
    add_overrides(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan, or fit.

    Raises:
        ValueError: the input is wrong, or the config's own layout does not divide or fit; one line.
    """
    hardware = load_hardware(args.hardware, args.gpu)
    if args.fit or args.write:
        return _fit(args, hardware)
    if args.config is None or args.gpus is None:
        raise ValueError("which CONFIG, and how many devices? vlmr1 plan CONFIG --gpus N")
    if not 1 <= args.gpus <= 1_000_000:
        raise ValueError(f"--gpus {args.gpus}: from 1 to 1,000,000")
    from megatron_vlmr1.plan.document import document
    from megatron_vlmr1.plan.workload import workload

    cfg = load_config(args.config, args.overrides)
    shape = _shape(cfg, args.model)
    work = workload(cfg, shape.vision, args.prompt_tokens, args.image_tokens, args.completion_tokens)
    plan = document(cfg, shape, hardware, args.gpus, work)
    if args.json:
        print_json(plan)
    else:
        from rich.console import Console

        from megatron_vlmr1.plan.tables import show

        show(plan, Console(width=None if sys.stdout.isatty() else 140, highlight=False, soft_wrap=True))
    if args.chart and (plan["best"] or "memory" in plan["own"]):
        from megatron_vlmr1.plan.chart import draw

        draw(plan, Path(args.chart))
    if "refused" in plan["own"]:
        raise ValueError(f"{args.config} on {args.gpus} x {hardware.name}: {plan['own']['refused']}")
    return DONE


def _shape(cfg: Config, model: str | None) -> PlanShape:
    """Read the model that was named, or the config's: a plan needs its config.json only, not its weights."""
    from megatron_vlmr1.plan.shapes import read_plan_shape

    name = model or cfg.model.path
    try:
        return read_plan_shape(find_model(name))
    except ValueError:
        # models/Qwen2.5-VL-72B-Instruct, which is not here, has the numbers of configs/model/qwen2.5-vl-72b.
        shipped = find_model(f"configs/model/{Path(name).name.lower().removesuffix('-instruct')}")
        if Path(name).exists() or not (shipped / "config.json").is_file():
            raise
        return read_plan_shape(shipped)


def _fit(args: argparse.Namespace, hardware: Hardware) -> int:
    """Fit the hardware file: rates that a benchmark measured first, then what finished runs say."""
    from megatron_vlmr1.plan import fit
    from megatron_vlmr1.plan.hardware import CALIBRATED, number, write

    if not args.fit or not args.write:
        raise ValueError("--fit RUN_DIR and --write FILE.yaml belong together")
    if args.config is not None or args.gpus is not None or args.chart:
        raise ValueError("--fit takes no CONFIG, --gpus or --chart: plan with --hardware FILE.yaml afterwards")
    fitted = hardware
    runs = [Path(name) for name in args.fit if not name.endswith(".json")]
    for name in (name for name in args.fit if name.endswith(".json")):
        fitted = fit.from_benchmark(fitted, Path(name))
    observed = [fit.observe(path, hardware.devices_per_node) for path in runs]
    if observed:
        fitted = fit.fit(fitted, observed)
    write(fitted, Path(args.write))
    changes = {name: [number(hardware, name), number(fitted, name)] for name in CALIBRATED}
    changes = {name: pair for name, pair in changes.items() if pair[0] != pair[1]}
    off = [fit.error(which, observed) for which in (hardware, fitted)] if observed else None
    if args.json:
        print_json({"written": args.write, "changed": changes, "error_of_phases": off})
        return DONE
    for name, (before, after) in changes.items():
        print(f"{name}: {before:.4g} -> {after:.4g}")
    if off:
        print(f"phases of these runs are predicted {off[1]:.0%} off, {off[0]:.0%} before")
    print(args.write)
    return DONE
