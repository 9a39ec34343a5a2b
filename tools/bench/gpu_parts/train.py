"""Training: what our own update makes of the card, in bf16 and in each FP8 recipe."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron_vlmr1.config import Config
from megatron_vlmr1.data.costs import forward_language, forward_vision
from megatron_vlmr1.grpo.update import GrpoUpdate, Updater
from megatron_vlmr1.models import fp8
from megatron_vlmr1.models.policy import Policy
from megatron_vlmr1.parallel import optimizer as parallel_optimizer
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.runtime import device
from megatron_vlmr1.telemetry.flops import peak_flops
from megatron_vlmr1.types import Group
from tools.bench.gpu_parts import models
from tools.bench.gpu_parts.measuring import Bench, NotMeasured, Row

_PASSES = 3  # forward passes that a forward and a backward pass are worth
_ADAM_BYTES = 34  # of a parameter: fp32 gradient, master and two moments read, all but the first and the weight written
_LEARNING_RATE = 1e-6
# In the order of what one wants to know first.
_KINDS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8 tensorwise": {"precision": {"fp8": "tensorwise"}},
    "fp8 blockwise": {"precision": {"fp8": "blockwise"}},
    "fp8 delayed": {"precision": {"fp8": "delayed"}},
    "bf16, torch spec": {"model": {"path": "-", "spec": "torch"}},
}
_NEEDS_S = 15.0


def measure(bench: Bench, mesh: Mesh) -> None:
    """Measure every model in every kind, all kinds of a model with as many layers if they fit."""
    rates: dict[tuple[str, int], float] = {}  # tokens/s in bf16, by model and layers
    depths: dict[str, int] = {}
    for kind in _KINDS:
        for size in models.sizes(bench):
            bench.case(f"{size} {kind}", partial(_train, bench, mesh, size, kind, depths, rates), _NEEDS_S)


def _train(
    bench: Bench,
    mesh: Mesh,
    size: str,
    kind: str,
    depths: dict[str, int],
    rates: dict[tuple[str, int], float],
) -> Row:
    cfg = models.settings(bench, **_KINDS[kind])
    fp8.check_installed(cfg)
    if size not in depths:
        # The kind that needs most memory decides, so that all do the same work.
        dearest = models.settings(bench, precision={"fp8": "blockwise"})
        depths[size] = models.layers_that_fit(bench, size, dearest, ("update",))

    def measured(count: int) -> Row:
        depths[size] = count
        row = _updates(bench, mesh, size, kind, cfg, count)
        if kind == "bf16":
            rates[size, count] = row.figures["tokens_per_s"]
        elif (size, count) in rates:
            row.figures["times_bf16"] = row.figures["tokens_per_s"] / rates[size, count]
        return row

    return models.with_fewer_layers(depths[size], measured)


def _updates(bench: Bench, mesh: Mesh, size: str, kind: str, cfg: Config, count: int) -> Row:
    made = models.shape(bench, size, count)
    fp8.check(cfg, made.text)
    if bench.cuda:
        device.peak_bytes()  # of what was measured before
    policy = models.policy(mesh, made, cfg)
    update = GrpoUpdate(Updater(policy, parallel_optimizer.build(cfg.optimizer, policy.wrap_for_training()), cfg), None)
    step = models.work(bench)
    groups = models.groups(models.prompts(made, step.load), step.lengths())
    seconds = bench.seconds(lambda: _step(update, groups), repeats=3)
    flops = _flops(policy, groups)
    packed, batches = _packed(update, groups)
    figures = {
        "tokens_per_s": packed / seconds,
        "tflops": flops / seconds / 1e12,
        "s": seconds,
        **bench.share("fp8" if cfg.precision.fp8 != "none" else "bf16", flops / seconds),
    }
    if peak := peak_flops(device.name(), cfg.precision.products):
        figures["mfu"] = flops / seconds / peak
    if bench.cuda:
        figures["peak_gb"] = device.peak_bytes() / 1e9
    depth = models.in_layers(made, models.shape(bench, size))
    setting = (
        f"{size}, {depth} and the whole tower and vocabulary, {kind}, {policy.layers.spec} spec; {step.words()}, "
        f"{batches} of them; tower computed again in backward, optimizer step and checks included"
    )
    return Row(figures, setting, flops, _bytes(policy, cfg, batches), seconds)


def _step(update: GrpoUpdate, groups: list[Group]) -> None:
    metrics = update(groups, _LEARNING_RATE)
    if metrics["train/skipped"]:
        raise NotMeasured("loss or gradients are not finite")


def _flops(policy: Policy, groups: list[Group]) -> float:
    """Return the useful FLOPs of a step, as `train.work` counts them: nothing that is computed again."""
    language = sum(
        forward_language(policy.shape, group.prompt, [len(c.token_ids) for c in group.completions]) for group in groups
    )
    return float(_PASSES * (language + forward_vision(policy.shape, [group.prompt for group in groups])))


def _packed(update: GrpoUpdate, groups: list[Group]) -> tuple[int, int]:
    """Return the tokens that the language model is fed in a step, and its micro-batches."""
    packed, _ = update._prepare(groups)
    return sum(group.tokens for group in packed), len(update.updater.micro_batches(packed))


def _bytes(policy: Policy, cfg: Config, batches: int) -> float:
    """Return what a step moves at least: weights read in both passes, gradients added to, Adam; no activations."""
    item = device.DTYPES[cfg.precision.dtype].itemsize
    count = sum(parameter.numel() for parameter in policy.parameters())
    return float(count * (batches * (2 * item + 8) + _ADAM_BYTES))
