"""The planner held against what others have published: ``python tools/plan_against_published.py [--write]``.

Every point is predicted with the same file of efficiencies, configs/hardware/h100-80gb.yaml; nothing is fitted to a
point. Twice: as this program would do it, and with what the others' programs have and this one has not (communication
behind compute). The last column says which inputs are not in the published figure.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_vlmr1.config import ParallelConfig, RecomputeConfig
from megatron_vlmr1.plan import hardware, passes, search
from megatron_vlmr1.plan.costs import Cost, Device, total
from megatron_vlmr1.plan.counts import cache_numbers
from megatron_vlmr1.plan.layout import Layout, layout
from megatron_vlmr1.plan.shapes import PlanShape, read_plan_shape
from megatron_vlmr1.plan.time import Program, StepTime, rollout_parts, step_time, training_task
from megatron_vlmr1.plan.workload import Workload, grid_of

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "results" / "plan_published.md"
HEADER = """\
# The planner beside published figures

`python tools/plan_against_published.py --write` made this page. All points with the one file of efficiencies,
configs/hardware/h100-80gb.yaml, of which most are assumed; none was fitted to a point. *This program*: what is
predicted for it in their setting (each prompt trained once a sample, as they do). *With theirs* adds what they have
and it has not: gradients, weights and tensor-parallel sums behind compute; and it asks the host after each tick of
generation, as they do. The error is that column's, against the nearer end of a published range. Nothing here was
measured by us on a GPU.

What the peers lose to offloading, refits, data and their hosts is not modelled, and theirs are small models in short
steps that come out too quick. Attention is taken as FlashAttention-2; Megatron-Bridge has quicker kernels, and fused
norms and activations, for which ours move more memory.

| point | published | this program | with theirs | error | inputs that had to be assumed |
|---|---|---|---|---|---|"""
VLLM_SHARE = 0.6  # of a device's memory, as EasyR1 sets it
FULL = RecomputeConfig(granularity="full")


@dataclass(frozen=True)
class Point:
    """A published figure and what it was measured on."""

    name: str
    published: tuple[float, float]  # from, to
    unit: str  # tok/s/GPU or TFLOP/s/GPU
    model: str
    ranks: int
    tp: int
    pp: int
    vp: int
    work: Workload
    how: dict[str, object]
    assumed: str
    generation_tp: int = 1
    sharded: bool = False  # weights are gathered for every micro-batch (FSDP)


def sampled(samples: int, prompt: float, completion: float, longest: int, image: float = 0.0) -> Workload:
    """Return a step of samples that each carry their own prompt through training, as the others do it."""
    vision = read_plan_shape("qwen2.5-vl-3b").vision
    assert vision is not None
    return Workload(samples, 1, prompt, grid_of(vision, image), completion, longest)


def given(sequences: int, length: int) -> Workload:
    """Return a step of pre-training: every token is a label."""
    return Workload(sequences, 1, 1.0, None, float(length), length)


EASY = "512 prompts x 5 samples a step (its default), 350 prompt tokens of which 250 image, the rest completion, "
EASY += "at most 2,048; one optimizer step for four, and passes for old and reference log-probs; padding-free; full "
EASY += "recompute (its default); FSDP's gathers counted"
NEMO = "64 prompts x 32 samples, 150 prompt tokens; one optimizer step for four; passes for old and reference "
NEMO += "log-probs; no recompute; longest completion 4,096 less the prompt"
BRIDGE = "optimizer and data time as ours; no recompute"
GRPO = {"recompute": FULL, "iterations": 1, "beta": True}
POINTS = (
    Point("EasyR1 3B", (1800, 1800), "tok/s/GPU", "qwen2.5-vl-3b", 8, 1, 1, 1,
          sampled(2560, 350, 350, 2048, 250), {**GRPO, "micro_batch_tokens": 4 * 700},
          "total of 700 tokens a sample (7B: 170 s x 8 GPUs x 1,400 tok/s / 2,560); micro-batches of 4; " + EASY,
          2, True),
    Point("EasyR1 7B", (1600, 2000), "tok/s/GPU", "qwen2.5-vl-7b", 8, 1, 1, 1,
          sampled(2560, 350, 350, 2048, 250), {**GRPO, "micro_batch_tokens": 10 * 700},
          "total of 700 tokens a sample (170 s x 8 GPUs x 1,400 tok/s / 2,560); micro-batches of 10; " + EASY,
          2, True),
    Point("EasyR1 32B", (620, 620), "tok/s/GPU", "qwen2.5-vl-32b", 8, 1, 1, 1,
          sampled(2560, 350, 677, 2048, 250), {**GRPO, "micro_batch_tokens": 4 * 1027},
          "1,027 tokens a sample (530 s x 8 GPUs x 620 tok/s / 2,560); micro-batches of 4; " + EASY, 8, True),
    Point("NeMo-RL Llama-3.1-8B", (1581, 1581), "tok/s/GPU", "llama-3.1-8b", 16, 1, 2, 1,
          sampled(2048, 150, 910, 3946), {"iterations": 1, "micro_batch_tokens": 4096},
          "1,060 tokens a sample (its documentation, v0.4); generation TP 1, training PP 2 (there); " + NEMO),
    Point("NeMo-RL Qwen3-32B", (571, 571), "tok/s/GPU", "qwen3-32b", 32, 4, 4, 1,
          sampled(2048, 150, 3101, 3946), {"iterations": 1, "micro_batch_tokens": 4096},
          NEMO, 4),
    Point("Megatron-Bridge Llama3-70B FP8", (731, 736), "TFLOP/s/GPU", "llama-3-70b", 64, 4, 8, 5,
          given(128, 8192), {"grpo": False, "precision": "fp8", "micro_batch_tokens": 8192},
          "128 sequences a step (its documentation, 25.11); " + BRIDGE),
    Point("Megatron-Bridge Llama3-8B FP8", (744, 744), "TFLOP/s/GPU", "llama-3.1-8b", 8, 1, 1, 1,
          given(128, 8192), {"grpo": False, "precision": "fp8", "micro_batch_tokens": 8192},
          "128 sequences a step, FSDP (its documentation, 25.11), its gathers counted; " + BRIDGE, 1, True),
    Point("Megatron-Bridge Llama3.1-405B FP8", (827, 827), "TFLOP/s/GPU", "llama-3.1-405b", 1024, 8, 8, 8,
          given(1024, 4096), {"grpo": False, "precision": "fp8", "micro_batch_tokens": 4096},
          "512 sequences of 8,192 tokens a step, TP 8, PP 8, VP 8 and context parallel 2 (its documentation, 25.11), "
          "which is taken as twice the sequences of half the length: a twentieth of the FLOPs less; " + BRIDGE),
)  # fmt: skip


def shape_of(name: str) -> PlanShape:
    """Read a point's model."""
    own = ROOT / "tools" / "published" / name
    return read_plan_shape(own if own.is_dir() else name)


def place_of(point: Point, shape: PlanShape) -> Layout:
    """Return a point's layout."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=point.tp,
        pipeline_model_parallel_size=point.pp,
        virtual_pipeline_model_parallel_size=point.vp,
        sequence_parallel=point.tp > 1,
        pipeline_layers=search.cut(shape.text.num_layers, point.pp * point.vp),
    )
    return layout(parallel, shape.text.num_layers, point.ranks, 8)


def predict(point: Point, gpu: hardware.Hardware, peers: bool) -> tuple[StepTime, float]:
    """Return a point's step, and the seconds of FSDP's gathers that compute does not hide."""
    shape = shape_of(point.model)
    burst = 1 if peers else None  # they ask the host after each tick
    place = place_of(point, shape)
    how = Program(place=place, decode_burst=burst, graphs=True, overlap=peers, **point.how)  # type: ignore[arg-type]
    step = step_time(gpu, shape, how, point.work, rollout=False)
    if how.grpo:
        # Several optimizer steps on a rollout: the old policy's log-probs as well as the reference's, whose weights
        # this program exchanges with host memory.
        reference = step.phases["logprobs"]
        old = reference.without("reference")
        both = {"rollout": generation(point, shape, gpu, how), "logprobs": old + (old if peers else reference)}
        step = replace(step, phases={**step.phases, **both})
    if not point.sharded:
        return step, 0.0
    device = Device(gpu, how.precision)
    task = training_task(device, shape, how, point.work)
    weights = sum(passes.stage_parameters(shape, how.place, 0)) * device.item
    # Forward and backward gather weights; so do the passes without gradients.
    gathers = task.batch.count * (2 + (2 if how.grpo else 0))
    seconds = device.all_gather("nvlink", how.place.dp, weights, "fsdp").seconds * gathers
    compute = sum(step.phases[name].seconds for name in ("update", "logprobs") if name in step.phases)
    return step, max(0.0, seconds - compute) if peers else seconds


def generation(point: Point, shape: PlanShape, gpu: hardware.Hardware, how: Program) -> Cost:
    """Return the others' rollout: engines of some ranks each; that they get new weights is left out."""
    tp, layers = point.generation_tp, shape.text.num_layers
    place = Layout(tp, 1, 1, point.ranks // tp, False, (layers,), 8)
    free = VLLM_SHARE * gpu.memory_bytes.value - 2 * sum(passes.stage_parameters(shape, place, 0))
    cache = int(free / (2 * cache_numbers(shape.text, tp, layers)))
    return total(rollout_parts(gpu, shape, replace(how, place=place, max_cache_tokens=cache), point.work).values())


def value(point: Point, step: StepTime, more_s: float) -> float:
    """Return a prediction in the point's unit."""
    seconds = step.seconds + more_s
    if point.unit == "tok/s/GPU":
        return step.sequence_tokens / seconds / step.world
    return step.language_flops / seconds / step.world / 1e12


def error(predicted: float, published: tuple[float, float]) -> float:
    """Return the relative error against the nearest published value; 0 within its range."""
    low, high = published
    return predicted / low - 1 if predicted < low else max(0.0, predicted / high - 1)


def rows(gpu: hardware.Hardware) -> list[dict[str, object]]:
    """Return a row a point."""
    out = []
    for point in POINTS:
        ours, peers = (value(point, *predict(point, gpu, flag)) for flag in (False, True))
        out.append({"point": point, "ours": ours, "peers": peers, "error": error(peers, point.published)})
    return out


def table(found: list[dict[str, object]]) -> str:
    """Return the page."""
    lines = [HEADER]
    for row in found:
        point = row["point"]
        assert isinstance(point, Point)
        low, high = point.published
        said = f"{low:,.0f}" if low == high else f"{low:,.0f}-{high:,.0f}"
        cells = f"{row['ours']:,.0f} | {row['peers']:,.0f} | {row['error']:+.0%}"
        lines.append(f"| {point.name} | {said} {point.unit} | {cells} | {point.assumed} |")
    errors = sorted(abs(float(str(row["error"]))) for row in found)
    middle = (errors[(len(errors) - 1) // 2] + errors[len(errors) // 2]) / 2
    lines += ["", f"Median error {middle:.0%}, largest {errors[-1]:.0%}.", ""]
    return "\n".join(lines)


def main() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"to {OUT.relative_to(ROOT)}")
    page = table(rows(hardware.read(ROOT / "configs" / "hardware" / "h100-80gb.yaml")))
    if parser.parse_args().write:
        OUT.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
