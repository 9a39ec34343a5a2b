"""The shipped recipes, the published shapes of their models, and thin models: all layers, the same ratio of heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_vlmr1 import config
from tests.checkpoints import write_random_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SIZES = ("3b", "7b", "32b", "72b")
# hidden, layers, heads, key/value heads, ffn, vocabulary, tied, tower's ffn
SHAPES = {
    "3b": (2048, 36, 16, 2, 11008, 151936, True, 3420),
    "7b": (3584, 28, 28, 4, 18944, 152064, False, 3420),
    "32b": (5120, 64, 40, 8, 27648, 152064, False, 3456),
    "72b": (8192, 80, 64, 8, 29568, 152064, False, 3420),
}
DIVISORS = {"3b": 16, "7b": 32, "32b": 64, "72b": 64}  # of all widths
TOWER = {"depth": 32, "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112}


def path(size: str) -> Path:
    """Return the recipe's file."""
    return ROOT / "configs" / "recipe" / f"{size}.yaml"


def write_published_config(directory: Path, size: str) -> Path:
    """Write the config.json of the published model, and nothing else."""
    hidden, layers, heads, kv_heads, ffn, vocabulary, tied, tower_ffn = SHAPES[size]
    vision = {"hidden_size": 1280, "num_heads": 16, "intermediate_size": tower_ffn, "out_hidden_size": hidden, **TOWER}
    content: dict[str, Any] = {
        "model_type": "qwen2_5_vl",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "max_position_embeddings": 128000,
        "vision_config": vision | {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2},
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
    }
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(content))
    return directory


def write_thin_checkpoint(directory: Path, size: str) -> Path:
    """Write random weights for the model with its widths divided: every layer and block, and two key/value heads."""
    hidden, layers, heads, kv_heads, ffn, _, tied, _ = SHAPES[size]
    thin, heads = hidden // DIVISORS[size], heads * 2 // kv_heads
    return write_random_checkpoint(
        directory,
        seed=SIZES.index(size),
        tied=tied,
        vision={"hidden_size": 32, "num_heads": 2, "intermediate_size": 86, "out_hidden_size": thin, **TOWER},
        hidden_size=thin,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        intermediate_size=ffn // DIVISORS[size],
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    )


def thin_config(size: str, model: Path, tp: int, pp: int) -> config.Config:
    """Load the recipe as it is, but for fp32, the model's path and the sizes of its layout.

    With fewer stages, neighbours of each virtual stage become one; in a single process there are no stages.
    """
    given = config.load(path(size)).parallel
    virtual = given.virtual_pipeline_model_parallel_size if pp > 1 else 1
    overrides = [
        "precision=fp32",
        f"model.path={model}",
        f"parallel.tensor_model_parallel_size={tp}",
        f"parallel.pipeline_model_parallel_size={pp}",
        f"parallel.virtual_pipeline_model_parallel_size={virtual}",
        f"parallel.sequence_parallel={str(given.sequence_parallel and tp > 1).lower()}",
    ]
    if config.load(path(size)).rollout.tensor_model_parallel_size is not None:
        overrides.append(f"rollout.tensor_model_parallel_size={tp}")
    if given.pipeline_layers is not None:
        per = given.chunks // (pp * virtual)
        layers = [sum(given.pipeline_layers[i : i + per]) for i in range(0, given.chunks, per)]
        overrides.append(f"parallel.pipeline_layers={layers if pp > 1 else 'null'}")
    return config.load(path(size), overrides)
