"""Seconds of a layer, of the output layer and of the vision tower, in training's passes. No torch.

Matrix products and attention as `telemetry.flops` counts them; what norms, activations and copies move through memory
as the modules are written; kernels as a dispatch mode counted them in this program.
"""

from __future__ import annotations

import math

from megatron_vlmr1.models.shape import TextShape, VisionShape, padded
from megatron_vlmr1.plan.costs import NOTHING, Cost, Device, total
from megatron_vlmr1.plan.layout import Layout
from megatron_vlmr1.plan.workload import Packed, tower_pairs

# Kernels of a layer or block: counted with a TorchDispatchMode, views left out.
LAYER_KERNELS = {"forward": 51, "backward": 75}
BLOCK_KERNELS = 34  # forward; backward has about twice as many
_HEAD_KERNELS = 49
# Bytes that one number moves, in bf16 with fp32 inside: read and written by the operations one after another.
_NORM_BYTES = 24  # to fp32, normalise, back, times the weight
_ADD_BYTES = 6
_ROTARY_BYTES = 46  # to fp32, times cos, rolled, times sin and added, back
_GATE_BYTES = 10  # SiLU, product
_COPY_BYTES = 4  # attention's packing and unpacking
_LOGIT_BYTES = {"forward": 46, "backward": 44}  # `models.logprobs`, of one logit
_ACCUMULATED_BYTES = 12  # a parameter's gradient is written, and read and added to the fp32 buffer
# Attention makes its scores again in backward: five matrix products for two (arXiv 2205.14135).
_ATTENTION_BACKWARD = 2.5
PRODUCTS_BACKWARD = 2.0


def layer(device: Device, text: TextShape, place: Layout, batch: Packed, backward: bool) -> Cost:
    """Return one layer's forward or backward pass over a micro-batch, on one rank."""
    tp, tokens = place.tp, batch.tokens
    width, kv_width = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    hidden, ffn = text.hidden_size, padded(text.ffn_hidden_size, tp)
    m = int(tokens)
    products = device.products(
        [
            (m, (width + 2 * kv_width) // tp, hidden),
            (m, hidden, width // tp),
            (m, 2 * ffn // tp, hidden),
            (m, hidden, ffn // tp),
        ]
    )
    residual = tp if place.sequence_parallel else 1  # numbers of norms and residuals are split then
    moved = (2 * _NORM_BYTES + 2 * _ADD_BYTES) * hidden / residual
    moved += (_ROTARY_BYTES + 3 * _COPY_BYTES) * (width + 2 * kv_width) / tp + _GATE_BYTES * ffn / tp
    attention = device.attention(batch.pairs, width // tp)
    weights = hidden * ((width + 2 * kv_width) + width + 3 * ffn) / tp
    parts = {
        "matmul": products * (PRODUCTS_BACKWARD if backward else 1),
        "attention": attention * (_ATTENTION_BACKWARD if backward else 1),
        "memory": device.moved(moved * tokens * device.item / 2 * (2 if backward else 1))
        + (device.moved(weights * _ACCUMULATED_BYTES) if backward else 0.0),
    }
    compute = Cost(device.with_launches(parts, LAYER_KERNELS["backward" if backward else "forward"]))
    return compute + _layer_traffic(device, text, place, tokens, backward)


def _layer_traffic(device: Device, text: TextShape, place: Layout, tokens: float, backward: bool) -> Cost:
    """Return the tensor-parallel collectives of one layer's pass.

    Each half of a layer ends in a sum over ranks; with sequence parallelism it is a gather before and a scatter after
    (arXiv 2205.05198, section 4), and backward gathers the input once more.
    """
    if place.tp == 1:
        return NOTHING
    link, whole = place.tp_link, tokens * text.hidden_size * device.item
    if place.sequence_parallel:
        traffic = device.all_gather(link, place.tp, whole, "tensor parallel") * (6 if backward else 4)
    else:
        traffic = device.all_reduce(link, place.tp, whole, "tensor parallel") * 2
    if text.num_kv_heads < place.tp:  # megatron-core gathers the fused rows of all heads
        fused = tokens * (text.num_heads + 2 * text.num_kv_heads) * text.head_dim * device.item
        traffic += device.all_gather(link, place.tp, fused, "tensor parallel")
    return traffic


def recomputed(device: Device, text: TextShape, place: Layout, batch: Packed, modules: tuple[str, ...]) -> Cost:
    """Return what one layer computes a second time when some of its modules keep nothing: core_attn, mlp."""
    parts: dict[str, float] = {}
    traffic = NOTHING
    if "core_attn" in modules:
        parts["attention"] = device.attention(batch.pairs, text.num_heads * text.head_dim // place.tp)
    if "mlp" in modules:
        m, ffn = int(batch.tokens), padded(text.ffn_hidden_size, place.tp) // place.tp
        parts["matmul"] = device.products([(m, 2 * ffn, text.hidden_size), (m, text.hidden_size, ffn)])
        parts["memory"] = device.moved(_GATE_BYTES * ffn * m * device.item / 2)
        traffic = _layer_traffic(device, text, place, batch.tokens, backward=False) * 0.5
    return Cost(parts) + traffic


def head(device: Device, text: TextShape, place: Layout, batch: Packed, backward: bool) -> Cost:
    """Return log-probs of a micro-batch's labels, forward or backward; backward makes the logits again."""
    rows = padded(text.vocab_size, place.tp) // place.tp
    labels = max(1, int(batch.labels))
    products = device.products([(labels, rows, text.hidden_size)], plain=True)
    parts = {
        "matmul": products * (3 if backward else 1),
        "memory": device.moved(_LOGIT_BYTES["backward" if backward else "forward"] * labels * rows)
        + (device.moved(_ACCUMULATED_BYTES * rows * text.hidden_size) if backward else 0.0),
    }
    traffic = NOTHING
    if place.tp > 1:
        whole = batch.tokens * text.hidden_size * device.item
        traffic = device.all_gather(place.tp_link, place.tp, whole, "tensor parallel")
        traffic += device.all_reduce(place.tp_link, place.tp, 16.0 * labels, "tensor parallel")
    return Cost(device.with_launches(parts, _HEAD_KERNELS)) + traffic


def embedding(device: Device, text: TextShape, place: Layout, batch: Packed) -> Cost:
    """Return the embedding of a micro-batch's tokens, which is summed over tensor-parallel ranks."""
    if place.tp == 1:
        return NOTHING
    return device.all_reduce(place.tp_link, place.tp, batch.tokens * text.hidden_size * device.item, "tensor parallel")


def tower(device: Device, vision: VisionShape, grid: tuple[int, int], images: float, place: Layout) -> Cost:
    """Return the tower's forward pass over images, on the rank that has most of them, and the gather behind it."""
    mine = math.ceil(images / place.tp) if images else 0
    if not mine:
        return NOTHING
    patches = grid[0] * grid[1] * mine
    hidden, ffn, merged = vision.hidden_size, vision.intermediate_size, vision.hidden_size * vision.merge_unit
    windowed, full = tower_pairs(vision, grid)
    full_blocks = len(set(vision.full_attention_blocks) & set(range(vision.depth)))
    block = device.products(
        [(patches, 3 * hidden, hidden), (patches, hidden, hidden), (patches, ffn, hidden), (patches, ffn, hidden)]
        + [(patches, hidden, ffn)],
        plain=True,
    )
    tokens = patches // vision.merge_unit
    ends = device.products(
        [(patches, hidden, vision.patch_dim), (tokens, merged, merged), (tokens, vision.out_hidden_size, merged)],
        plain=True,
    )
    pairs = mine * ((vision.depth - full_blocks) * windowed + full_blocks * full)
    moved = (2 * _NORM_BYTES + 2 * _ADD_BYTES + 2 * _ROTARY_BYTES + 4 * _COPY_BYTES) * hidden + _GATE_BYTES * ffn
    parts = {
        "tower matmul": vision.depth * block + ends,
        "tower attention": device.attention(pairs, hidden),
        "tower memory": device.moved(vision.depth * moved * patches * device.item / 2),
    }
    compute = Cost(device.with_launches(parts, vision.depth * BLOCK_KERNELS))
    rows = tokens * place.tp * vision.out_hidden_size * device.item  # padded to the largest share
    return total((compute, device.all_gather(place.tp_link, place.tp, rows, "images")))
