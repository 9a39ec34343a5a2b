"""Qwen2.5-VL: its config.json, and which Hugging Face rows make up each parameter of a rank.

Every parameter of a rank is a concatenation of `Piece`s along one dimension, so loading reads slices and saving
writes the same slices back. Column-parallel parameters are cut evenly along dimension 0 of Megatron's own row order:
the fused QKV goes [q..q, k, v] per key/value group, and the fused gate/up is [gate_i; up_i] on rank i.
"""

from __future__ import annotations

from typing import Any

from megatron_vlmr1.models.pieces import Block, Piece, cut
from megatron_vlmr1.models.shape import TextShape, VisionShape, VlmShape, padded

# Names that newer transformers use in memory, and the published names that they stand for.
ALIASES = (("model.language_model.", "model."), ("model.visual.", "visual."))
VISION_PREFIX = "visual."


def read_shape(config: dict[str, Any]) -> VlmShape:
    """Read the published flat config.json as well as the nested one of newer transformers."""
    text = config.get("text_config", config)
    vision = config["vision_config"]
    rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    heads = text["num_attention_heads"]
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    return VlmShape(
        family="qwen2_5_vl",
        text=TextShape(
            hidden_size=text["hidden_size"],
            num_layers=text["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=text["num_key_value_heads"],
            head_dim=text.get("head_dim") or text["hidden_size"] // heads,
            ffn_hidden_size=text["intermediate_size"],
            vocab_size=text["vocab_size"],
            tied=bool(tied),
            norm_eps=text["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta") or text["rope_theta"]),
            mrope_section=tuple(rope["mrope_section"]),  # type: ignore[arg-type]
            max_positions=text["max_position_embeddings"],
        ),
        vision=VisionShape(
            depth=vision["depth"],
            hidden_size=vision["hidden_size"],
            num_heads=vision["num_heads"],
            intermediate_size=vision["intermediate_size"],
            out_hidden_size=vision["out_hidden_size"],
            patch_size=vision["patch_size"],
            temporal_patch_size=vision.get("temporal_patch_size", 2),
            in_channels=vision.get("in_channels", vision.get("in_chans", 3)),
            spatial_merge_size=vision["spatial_merge_size"],
            window_size=vision["window_size"],
            full_attention_blocks=tuple(vision["fullatt_block_indexes"]),
        ),
        image_token_id=config["image_token_id"],
        video_token_id=config["video_token_id"],
        vision_start_token_id=config["vision_start_token_id"],
    )


def tensor_shapes(shape: VlmShape) -> dict[str, tuple[int, ...]]:
    """Return every Hugging Face tensor of the model under its published name, with its shape."""
    t = shape.text
    q, kv = t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (t.vocab_size, t.hidden_size)}
    for i in range(t.num_layers):
        layer = f"model.layers.{i}."
        out |= {layer + "input_layernorm.weight": (t.hidden_size,)}
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            out[f"{layer}self_attn.{name}_proj.weight"] = (rows, t.hidden_size)
            out[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        out |= {
            layer + "self_attn.o_proj.weight": (t.hidden_size, q),
            layer + "post_attention_layernorm.weight": (t.hidden_size,),
            layer + "mlp.gate_proj.weight": (t.ffn_hidden_size, t.hidden_size),
            layer + "mlp.up_proj.weight": (t.ffn_hidden_size, t.hidden_size),
            layer + "mlp.down_proj.weight": (t.hidden_size, t.ffn_hidden_size),
        }
    out["model.norm.weight"] = (t.hidden_size,)
    if not t.tied:
        out["lm_head.weight"] = (t.vocab_size, t.hidden_size)
    return out | {VISION_PREFIX + name: size for name, size in vision_shapes(shape.vision).items()}


def vision_shapes(v: VisionShape) -> dict[str, tuple[int, ...]]:
    """Return the tower's tensors (also the names of our own tower's parameters) with their shapes."""
    merged = v.hidden_size * v.merge_unit
    out: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (
            v.hidden_size,
            v.in_channels,
            v.temporal_patch_size,
            v.patch_size,
            v.patch_size,
        )
    }
    for i in range(v.depth):
        block = f"blocks.{i}."
        out |= {
            block + "norm1.weight": (v.hidden_size,),
            block + "norm2.weight": (v.hidden_size,),
            block + "attn.qkv.weight": (3 * v.hidden_size, v.hidden_size),
            block + "attn.qkv.bias": (3 * v.hidden_size,),
            block + "attn.proj.weight": (v.hidden_size, v.hidden_size),
            block + "attn.proj.bias": (v.hidden_size,),
        }
        for name, (rows, columns) in {
            "gate_proj": (v.intermediate_size, v.hidden_size),
            "up_proj": (v.intermediate_size, v.hidden_size),
            "down_proj": (v.hidden_size, v.intermediate_size),
        }.items():
            out[f"{block}mlp.{name}.weight"] = (rows, columns)
            out[f"{block}mlp.{name}.bias"] = (rows,)
    return out | {
        "merger.ln_q.weight": (v.hidden_size,),
        "merger.mlp.0.weight": (merged, merged),
        "merger.mlp.0.bias": (merged,),
        "merger.mlp.2.weight": (v.out_hidden_size, merged),
        "merger.mlp.2.bias": (v.out_hidden_size,),
    }


def text_pieces(shape: VlmShape, name: str, layer: int | None, tp_rank: int, tp: int) -> list[Piece]:
    """Return what makes up one parameter of the language model on one tensor-parallel rank.

    Args:
        shape: the model.
        name: Megatron name within the decoder layer (``self_attention.linear_qkv.weight``), or of the whole
            language model where `layer` is None (``embedding.word_embeddings.weight``).
        layer: global layer number.
        tp_rank: rank in the tensor-parallel group.
        tp: size of the tensor-parallel group.
    """
    t = shape.text
    if layer is None:
        if name == "decoder.final_layernorm.weight":
            return [Piece("model.norm.weight", 0, 0, t.hidden_size)]
        tied_or_embedding = t.tied or name == "embedding.word_embeddings.weight"
        source = "model.embed_tokens.weight" if tied_or_embedding else "lm_head.weight"
        rows = padded(t.vocab_size, tp)
        return cut([(source, 0, t.vocab_size), (None, 0, rows - t.vocab_size)], tp_rank, rows // tp)
    prefix = f"model.layers.{layer}."
    kind = name.rsplit(".", 1)[1]
    if name == "self_attention.linear_qkv." + kind:
        return cut(_qkv_rows(t, prefix + "self_attn.", kind), tp_rank, _qkv_size(t) // tp)
    if name == "mlp.linear_fc1.weight":
        return [p for half in ("gate", "up") for p in _padded_cut(f"{prefix}mlp.{half}_proj.weight", t, tp_rank, tp, 0)]
    if name == "mlp.linear_fc2.weight":
        return _padded_cut(prefix + "mlp.down_proj.weight", t, tp_rank, tp, 1)
    if name == "self_attention.linear_proj.weight":
        width = t.num_heads * t.head_dim // tp
        return [Piece(prefix + "self_attn.o_proj.weight", 1, tp_rank * width, (tp_rank + 1) * width)]
    norms = {
        "input_layernorm.weight": "input_layernorm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    }
    return [Piece(prefix + norms[name], 0, 0, t.hidden_size)]


def _qkv_size(t: TextShape) -> int:
    return (t.num_heads + 2 * t.num_kv_heads) * t.head_dim


def _qkv_rows(t: TextShape, prefix: str, kind: str) -> list[Block]:
    d, per_group = t.head_dim, t.num_heads // t.num_kv_heads * t.head_dim
    rows: list[Block] = []
    for g in range(t.num_kv_heads):
        rows.append((f"{prefix}q_proj.{kind}", g * per_group, (g + 1) * per_group))
        rows.append((f"{prefix}k_proj.{kind}", g * d, (g + 1) * d))
        rows.append((f"{prefix}v_proj.{kind}", g * d, (g + 1) * d))
    return rows


def _padded_cut(name: str, t: TextShape, rank: int, tp: int, dim: int) -> list[Piece]:
    """Cut rank's share of the feed-forward width, zeros behind it."""
    whole = padded(t.ffn_hidden_size, tp)
    return cut([(name, 0, t.ffn_hidden_size), (None, 0, whole - t.ffn_hidden_size)], rank, whole // tp, dim)
