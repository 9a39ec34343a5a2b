"""The shipped recipes, the published shapes of their models, and thin models: all layers, the same ratio of heads."""

from __future__ import annotations

from pathlib import Path

from megatron_vlmr1 import config
from megatron_vlmr1.models.families import read_shape
from tests.checkpoints import write_random_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SIZES = ("3b", "7b", "32b", "72b")
DIVISORS = {"3b": 16, "7b": 32, "32b": 64, "72b": 64}  # of all widths
TOWER = {"depth": 32, "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112}


def layout(tp: int = 1, pp: int = 1, vp: int = 1, layers: list[int] | None = None) -> config.ParallelConfig:
    """Return a layout by its sizes."""
    return config.ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp,
        pipeline_layers=layers,
    )


def path(size: str) -> Path:
    """Return the recipe's file."""
    return ROOT / "configs" / "recipe" / f"{size}.yaml"


def published(size: str) -> Path:
    """Return the directory with the published model's config.json, and nothing else."""
    return ROOT / "configs" / "model" / f"qwen2.5-vl-{size}"


def write_thin_checkpoint(directory: Path, size: str) -> Path:
    """Write random weights for the model with its widths divided: every layer and block, and two key/value heads."""
    text = read_shape(published(size)).text
    thin = text.hidden_size // DIVISORS[size]
    return write_random_checkpoint(
        directory,
        seed=SIZES.index(size),
        tied=text.tied,
        vision={"hidden_size": 32, "num_heads": 2, "intermediate_size": 86, "out_hidden_size": thin, **TOWER},
        hidden_size=thin,
        num_hidden_layers=text.num_layers,
        num_attention_heads=text.num_heads * 2 // text.num_kv_heads,
        num_key_value_heads=2,
        intermediate_size=text.ffn_hidden_size // DIVISORS[size],
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
