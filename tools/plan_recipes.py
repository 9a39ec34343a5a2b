"""What the planner says of every recipe on 8 to 128 H100: ``python tools/plan_recipes.py [--write]``."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_vlmr1 import config
from megatron_vlmr1.plan import hardware
from megatron_vlmr1.plan.memory import rank_memory
from megatron_vlmr1.plan.recommend import check, misfit
from megatron_vlmr1.plan.shapes import read_plan_shape
from megatron_vlmr1.plan.time import program, step_time
from megatron_vlmr1.plan.workload import workload

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "results" / "plan_recipes.md"
GPUS = (8, 32, 64, 128)
SIZES = ("3b", "7b", "32b", "72b")
RECIPES = {f"{task}{size}": size for task in ("", "ovd_") for size in SIZES}
HEADER = """\
# Recipes on 8 to 128 H100 (80 GB)

`python tools/plan_recipes.py --write` made this page: predicted seconds of a step, and GB of the fullest rank, with
prompts and completions as long as the recipe allows. *n prompts*: with `train.prompts_per_step=n`, because every
data-parallel copy needs one. -: a copy of the model takes more devices. Nothing here was measured on a GPU.

| recipe | tensor x pipeline | 8 | 32 | 64 | 128 |
|---|---|---|---|---|---|"""


def planned(name: str, gpus: int, gpu: hardware.Hardware) -> tuple[config.Config, float, float] | None:
    """Return (config, seconds of a step, bytes of the fullest rank); None where the devices hold no copy.

    Raises:
        ValueError: the planner refuses the recipe.
    """
    path = ROOT / "configs" / "recipe" / f"{name}.yaml"
    parallel = config.load(path).parallel
    if gpus % parallel.ranks_of_a_copy:
        return None
    copies = parallel.data_parallel_size(gpus)
    prompts = max(config.load(path).train.prompts_per_step, copies)
    cfg = config.load(path, [f"train.prompts_per_step={prompts}"])
    shape = read_plan_shape(f"qwen2.5-vl-{RECIPES[name]}")
    check(cfg, shape, gpus)
    memory = rank_memory(cfg, shape, gpus)
    if problem := misfit(memory, gpu, gpu.devices_per_node):
        raise ValueError(f"{path.name} on {gpus}: {problem}")
    how = program(cfg, shape.text.num_layers, gpus, gpu.devices_per_node)
    seconds = step_time(gpu, shape, how, workload(cfg, shape.vision)).seconds
    return cfg, seconds, max(rank.worst()[1] for rank in memory)


def page() -> str:
    """Return the page."""
    gpu = hardware.read(ROOT / "configs" / "hardware" / "h100-80gb.yaml")
    lines = [HEADER]
    for name in RECIPES:
        own = config.load(ROOT / "configs" / "recipe" / f"{name}.yaml")
        cells = []
        for gpus in GPUS:
            found = planned(name, gpus, gpu)
            if found is None:
                cells.append("-")
                continue
            cfg, seconds, count = found
            more = cfg.train.prompts_per_step
            said = f", {more} prompts" if more != own.train.prompts_per_step else ""
            cells.append(f"{seconds:.1f} s, {count / 1e9:.0f} GB{said}")
        parallel = own.parallel
        layout = f"{parallel.tensor_model_parallel_size} x {parallel.pipeline_model_parallel_size}"
        lines.append(f"| `{name}.yaml` | {layout} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"to {OUT.relative_to(ROOT)}")
    text = page()
    if parser.parse_args().write:
        OUT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
