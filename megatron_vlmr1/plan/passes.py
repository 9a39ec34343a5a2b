"""Seconds of training's passes: micro-batches through the pipeline, gradients, the optimizer. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_vlmr1.config import RecomputeConfig
from megatron_vlmr1.models.shape import padded
from megatron_vlmr1.plan import layers
from megatron_vlmr1.plan.costs import NOTHING, Cost, Device, slowest, total
from megatron_vlmr1.plan.counts import layer_tensors, tower_tensors
from megatron_vlmr1.plan.layout import Layout
from megatron_vlmr1.plan.shapes import PlanShape
from megatron_vlmr1.plan.workload import Packed, Workload

# Bytes that a parameter moves in Adam: gradient, master and two moments, fused on CUDA (Transformer Engine), else
# operation by operation (torch's foreach).
_ADAM_BYTES = {"cuda": 34, "cpu": 78}
_GRADIENT_BYTES = 12  # the fp32 buffer is emptied, and read for the finite check and the norm
_CHECKSUM_PASSES = 2  # `parallel.replicas` reads weights and state before a step, and remembers them after it


@dataclass(frozen=True)
class Task:
    """A model in a layout with its micro-batches: what a pass runs over."""

    device: Device
    shape: PlanShape
    place: Layout
    work: Workload
    batch: Packed
    recompute: RecomputeConfig = RecomputeConfig()
    freeze_vision: bool = False


@lru_cache(maxsize=4096)
def stage_parameters(shape: PlanShape, place: Layout, stage: int) -> tuple[int, int]:
    """Return a rank's parameters of a stage: (language model, tower)."""
    text = shape.text
    count = place.stage_layers(stage) * sum(layer_tensors(shape, place.tp))
    table = padded(text.vocab_size, place.tp) // place.tp * text.hidden_size
    count += table * ((stage == 0) + (stage == place.pp - 1 and not (text.tied and place.pp == 1)))
    count += text.hidden_size * (stage == place.pp - 1)
    return count, _tower_parameters(shape) if stage == 0 else 0


@lru_cache(maxsize=64)
def _tower_parameters(shape: PlanShape) -> int:
    return sum(tower_tensors(shape))


def _tower(task: Task) -> Cost:
    if task.work.grid is None or task.shape.vision is None:
        return NOTHING
    return layers.tower(task.device, task.shape.vision, task.work.grid, task.batch.images, task.place)


def _stage(task: Task, stage: int, train: bool, tower: bool) -> Cost:
    """Return one micro-batch on one stage: forward, and backward with what is computed again."""
    device, text, place, batch = task.device, task.shape.text, task.place, task.batch
    count = place.stage_layers(stage)
    forward = layers.layer(device, text, place, batch, backward=False)
    costs = [forward * count]
    if train:
        costs += [layers.layer(device, text, place, batch, backward=True) * count, _again(task, stage, forward)]
    if stage == 0:
        costs.append(layers.embedding(device, text, place, batch))
        if tower:
            once = _tower(task)
            costs.append(once * (1 + layers.PRODUCTS_BACKWARD + task.recompute.tower if train else 1))
    if stage == place.pp - 1:
        costs += [
            layers.head(device, text, place, batch, backward) for backward in ([False, True] if train else [False])
        ]
    if place.pp > 1:
        residual = place.tp if place.sequence_parallel else 1
        sent = batch.tokens * text.hidden_size * device.item / residual
        costs.append(device.send(place.pp_link, sent, "pipeline") * (place.vp * (2 if train else 1)))
    return total(costs)


def _again(task: Task, stage: int, forward: Cost) -> Cost:
    """Return what backward computes a second time on a stage."""
    recompute, count = task.recompute, task.place.stage_layers(stage)
    if recompute.granularity == "full":
        if recompute.method == "block":
            chunks = task.place.layers[stage :: task.place.pp]
            count = sum(min(chunk, recompute.num_layers or 1) for chunk in chunks)
        return forward * count
    if recompute.granularity == "selective":
        modules = tuple(recompute.modules or ("core_attn",))
        return layers.recomputed(task.device, task.shape.text, task.place, task.batch, modules) * count
    return NOTHING


def through(task: Task, train: bool, tower: bool) -> Cost:
    """Return all micro-batches through all stages.

    The slowest stage does them one after another; the rest of the stages' time for one of them passes before it begins
    or after it ends, a virtual stage's share of it where there are several (arXiv 2104.04473, section 2.2). But however
    the layers are cut, each micro-batch has to pass through all of them, the next a virtual stage behind.
    """
    kinds = [(task.place.layers[i :: task.place.pp], i == 0, i == task.place.pp - 1) for i in range(task.place.pp)]
    costs = {kind: _stage(task, kinds.index(kind), train, tower) for kind in dict.fromkeys(kinds)}
    stages = [costs[kind] for kind in kinds]
    longest, trip, vp = slowest(stages), sum(stage.seconds for stage in stages), task.place.vp
    busy = longest.seconds * task.batch.count
    whole = max(
        busy + (trip - longest.seconds) / vp,
        trip + (task.batch.count - 1) * longest.seconds / vp,
    )
    return longest * task.batch.count + Cost({"bubble": whole - busy} if task.place.pp > 1 else {})


def after_backward(task: Task) -> Cost:
    """Return what ends an optimizer step, on the slowest stage: gradients summed, Adam, weights gathered."""
    return slowest(_end(task, stage) for stage in range(task.place.pp))


def _end(task: Task, stage: int) -> Cost:
    device, place, shape = task.device, task.place, task.shape
    language, tower = stage_parameters(shape, place, stage)
    trained = language + (0 if task.freeze_vision else tower)
    share = trained / place.dp
    moved = trained * _GRADIENT_BYTES + share * _ADAM_BYTES[device.hardware.device]
    moved += _CHECKSUM_PASSES * ((language + tower) * device.item + share * 12)
    costs = [
        device.all_gather(place.dp_link, place.dp, 4.0 * trained, "gradients", place.dp_on_node),
        Cost({"optimizer": device.moved(moved)}),
        device.all_gather(place.dp_link, place.dp, float(trained * device.item), "weights", place.dp_on_node),
    ]
    if stage == 0 and tower and not task.freeze_vision:  # each tensor-parallel rank saw its own images
        costs.append(device.all_reduce(place.tp_link, place.tp, 4.0 * tower, "gradients"))
    if shape.text.tied and place.pp > 1 and stage in (0, place.pp - 1):
        table = padded(shape.text.vocab_size, place.tp) // place.tp * shape.text.hidden_size
        costs.append(device.all_reduce(place.pp_link, 2, 4.0 * table, "gradients"))
    return total(costs)


def reference_swap(task: Task) -> Cost:
    """Return the exchange of the reference's weights with the policy's, in and out: to the host and back each time."""
    device = task.device
    most = max(sum(stage_parameters(task.shape, task.place, stage)) for stage in range(task.place.pp))
    return Cost(device.send("pcie", float(most * device.item), "reference").seconds_by_part) * 4 + Cost(
        {}, {("pcie", "reference"): 2.0 * most * device.item}
    )


def offloaded_state(task: Task) -> Cost:
    """Return the way of the optimizer's state to the host and back, once each (`parallel.offload`)."""
    device, place = task.device, task.place
    each = 12.0 if device.item < 4 else 8.0
    stages = [stage_parameters(task.shape, place, stage) for stage in range(place.pp)]
    most = max(language + (0 if task.freeze_vision else tower) for language, tower in stages) / place.dp
    return Cost(device.send("pcie", most * each, "offload").seconds_by_part) * 2 + Cost(
        {}, {("pcie", "offload"): most * each}
    )


def checkpoint_bytes(shape: PlanShape, freeze_vision: bool, item: int) -> tuple[int, int]:
    """Return the bytes of a checkpoint: (weights, optimizer: fp32 masters and moments, of fp32 weights too)."""
    whole = Layout(1, 1, 1, 1, False, (shape.text.num_layers,), 1)
    language, tower = stage_parameters(shape, whole, 0)
    trained = language + (0 if freeze_vision else tower)
    return (language + tower) * item, trained * 12
