"""The vision tower, the output layer's log-probs, and attention over packed groups, each by itself."""

from __future__ import annotations

from functools import partial

import torch

from megatron_vlmr1.data.packing import PackedGroup, pack, split_by_tokens
from megatron_vlmr1.models.attention import AttentionPlan
from megatron_vlmr1.models.logprobs import Vocabulary, token_logprobs
from megatron_vlmr1.models.segments import Segment
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.runtime import device
from megatron_vlmr1.telemetry.flops import causal_pairs, vision_flops
from tools.bench.gpu_parts import models
from tools.bench.gpu_parts.measuring import Bench, Row

_BF16 = torch.bfloat16
_IMAGES = {"16 pictures of 640 x 480": [(1, 34, 46)] * 16, "4 pictures of 1280 tokens": [(1, 64, 80)] * 4}
_TINY_IMAGES = {"2 pictures of 112 x 112": [(1, 8, 8)] * 2}
_POSITIONS = 8192
_ATTENTION_BACKWARD = 2.5  # forward passes that its backward pass computes, as the plan has it: scores come again


def tower(bench: Bench, mesh: Mesh) -> None:
    """Measure the tower, forward alone and with backward; it is the same in all sizes but for its width of output."""
    for name, grids in (_TINY_IMAGES if bench.tiny else _IMAGES).items():
        for backward in (False, True):
            way = "forward and backward" if backward else "forward"
            bench.case(f"{name}, {way}", partial(_tower, bench, mesh, grids, backward), 4)


def _tower(bench: Bench, mesh: Mesh, grids: list[tuple[int, int, int]], backward: bool) -> Row:
    cfg = models.settings(bench, recompute={"tower": False})
    made = models.policy(mesh, models.shape(bench, "3b", 1), cfg)
    vision, shape = made.model.vision, made.shape.vision
    assert vision is not None
    patches = [
        torch.randn(h * w, shape.in_channels, shape.patch_size**2, device=device.device(), dtype=_BF16)
        for _, h, w in grids
    ]

    def run() -> None:
        with torch.set_grad_enabled(backward):
            out = vision(patches, grids)
            if backward:
                vision.zero_grad()
                out.float().sum().backward()

    seconds, flops = bench.seconds(run), float(vision_flops(shape, grids) * (3 if backward else 1))
    count = sum(h * w for _, h, w in grids)
    weights = sum(parameter.nbytes for parameter in vision.parameters())
    figures = {
        "tflops": flops / seconds / 1e12,
        "patches_per_s": count / seconds,
        "s": seconds,
        **bench.share("bf16", flops / seconds),
    }
    moved = weights * (3 if backward else 1) + 2.0 * count * shape.hidden_size * shape.depth * (3 if backward else 1)
    return Row(figures, f"{len(grids)} images, {count} patches, bf16, nothing computed again", flops, moved, seconds)


def logprobs(bench: Bench, mesh: Mesh) -> None:
    """Measure the log-probs of so many labels, forward alone and with backward."""
    for size in models.sizes(bench):
        for backward in (False, True):
            way = "forward and backward" if backward else "forward"
            bench.case(f"{size}, {way}", partial(_logprobs, bench, mesh, size, backward), 4)


def _logprobs(bench: Bench, mesh: Mesh, size: str, backward: bool) -> Row:
    text, where = models.shape(bench, size).text, device.device()
    n = 128 if bench.tiny else _POSITIONS
    hidden = torch.randn(n, text.hidden_size, device=where, dtype=_BF16).requires_grad_(backward)
    weight = torch.randn(text.vocab_size, text.hidden_size, device=where, dtype=_BF16)
    weight = weight.mul_(models.STD).requires_grad_(backward)
    labels = torch.randint(0, text.vocab_size, (n,), device=where)
    vocabulary = Vocabulary(text.vocab_size, text.vocab_size, [], mesh.tp_group, where)

    def run() -> None:
        values, _ = token_logprobs(hidden, weight, labels, vocabulary)
        if backward:
            hidden.grad = weight.grad = None
            values.sum().backward()

    seconds = bench.seconds(run)
    flops = 2.0 * n * text.vocab_size * text.hidden_size * (3 if backward else 1)
    figures = {
        "tflops": flops / seconds / 1e12,
        "labels_per_s": n / seconds,
        "s": seconds,
        **bench.share("bf16", flops / seconds),
    }
    again = "; the logits are computed again in backward, which counts for nothing" if backward else ""
    setting = f"{n} labels, vocabulary {text.vocab_size}, hidden {text.hidden_size}, bf16, with entropies{again}"
    moved = float((weight.nbytes + hidden.nbytes) * (3 if backward else 1))
    return Row(figures, setting, flops, moved, seconds)


def attention(bench: Bench, mesh: Mesh) -> None:
    """Measure attention over one micro-batch of packed groups."""
    for size in models.sizes(bench):
        for backward in (False, True):
            way = "forward and backward" if backward else "forward"
            row = bench.case(f"{size}, {way}", partial(_attention, bench, size, backward), 4)
            if row is not None and backward:
                bench.rates["attention"] = max(row.flops / row.seconds, bench.rates.get("attention", 0.0))


def _attention(bench: Bench, size: str, backward: bool) -> Row:
    text = models.shape(bench, size).text
    segments = _segments(bench, size)
    tokens, where = segments[-1].stop, device.device()
    q, k, v = (
        torch.randn(tokens, heads, text.head_dim, device=where, dtype=_BF16).requires_grad_(backward)
        for heads in (text.num_heads, text.num_kv_heads, text.num_kv_heads)
    )
    plan = AttentionPlan(segments)
    upstream = torch.randn_like(q)

    def run() -> None:
        out = plan.attend(1, q, k, v)
        if backward:
            q.grad = k.grad = v.grad = None
            out.backward(upstream)

    seconds = bench.seconds(run)
    pairs = sum(causal_pairs(s.stop - s.start, s.prefix[1] - s.prefix[0] if s.prefix else 0) for s in segments)
    passes = 1 + _ATTENTION_BACKWARD if backward else 1.0
    flops = 4.0 * pairs * text.num_heads * text.head_dim * passes
    figures = {"tflops": flops / seconds / 1e12, "s": seconds, **bench.share("bf16", flops / seconds)}
    setting = (
        f"{tokens} tokens in {len(segments)} segments of groups that share prompts, {text.num_heads} heads, "
        f"{text.num_kv_heads} of keys, of {text.head_dim}, bf16; useful pairs, backward worth {_ATTENTION_BACKWARD:g}"
    )
    moved = float((2 * q.nbytes + k.nbytes + v.nbytes) * (3 if backward else 1))
    return Row(figures, setting, flops, moved, seconds)


def _segments(bench: Bench, size: str) -> list[Segment]:
    """Return the segments of a step's fullest micro-batch."""
    step, of = models.work(bench), models.shape(bench, size)
    groups = models.groups(models.prompts(of, step.load), step.lengths())
    slots = tuple(range(step.load.generations))
    packed = [PackedGroup(g.prompt, tuple(c.token_ids for c in g.completions), slots) for g in groups]
    parts = split_by_tokens(packed, step.micro_batch_tokens)
    return list(max((pack(part, of.image_token_id, 1) for part in parts), key=lambda b: len(b.token_ids)).segments)
