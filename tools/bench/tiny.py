"""The tiny Qwen2.5-VL of the benchmarks, prompts for it, and a long-tailed draw of completion lengths."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_vlmr1.checkpoint import weights
from megatron_vlmr1.config import ParallelConfig
from megatron_vlmr1.data import scenes
from megatron_vlmr1.data.images import ImageProcessor, pixel_values
from megatron_vlmr1.data.prompts import PromptBuilder
from megatron_vlmr1.data.scene_tokenizer import build_checkpoint_files
from megatron_vlmr1.data.tokens import VisionTokens, load_tokenizer
from megatron_vlmr1.models.families import read_shape
from megatron_vlmr1.models.policy import Policy
from megatron_vlmr1.parallel import job
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.rewards import tasks
from megatron_vlmr1.types import IntArray, Prompt, Sample

SEED = 0
MEAN_LENGTH, MAX_LENGTH = 64, 256
QUESTION = scenes.QUESTION.format(expression="the red shape at the top left")
TRUTH = "[100, 120, 260, 300]"
MODEL: dict[str, dict[str, Any]] = {
    "text_config": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    },
    "vision_config": {
        "depth": 4,
        "hidden_size": 64,
        "num_heads": 4,
        "intermediate_size": 128,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1, 3],
        "initializer_range": 0.05,
    },
}


def write_model(directory: Path, vocab_size: int | None = None, **text_settings: Any) -> Path:
    """Write a whole Hugging Face directory with transformers' own seeded initialisation.

    `vocab_size` None means the tokenizer's, rounded up; other settings of the text model go over those of `MODEL`.
    Large images are not resized.
    """
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    text = MODEL["text_config"] | text_settings | ({} if vocab_size is None else {"vocab_size": vocab_size})
    build_checkpoint_files(directory, {**MODEL, "text_config": text})
    path = directory / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"max_pixels": 28 * 28 * 1280}, indent=2))
    kept = {name: (directory / name).read_bytes() for name in ("generation_config.json", "config.json")}
    torch.manual_seed(SEED)
    Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(directory)).float().save_pretrained(directory)
    for name, data in kept.items():
        (directory / name).write_bytes(data)
    return directory


def picture(index: int, side: int) -> bytes:
    """Return a JPEG of `side` x `side` pixels with detail on several scales, another one for each index."""
    rng = np.random.default_rng((SEED, index, side))
    total = np.zeros((side, side, 3))
    for scale in (2, 7, 30):
        grain = rng.integers(0, 256, (scale, scale, 3), dtype=np.uint8)
        total += np.asarray(Image.fromarray(grain).resize((side, side), Image.Resampling.BICUBIC)) / 3
    out = io.BytesIO()
    Image.fromarray(total.astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def prompts(directory: Path, count: int, side: int) -> list[Prompt]:
    """Return `count` prompts of equal length, each with an image of its own of `side` x `side` pixels."""
    builder = PromptBuilder(
        load_tokenizer(directory),
        ImageProcessor.from_pretrained(directory),
        tasks.get("rec").render,
        None,
        4096,
        VisionTokens.from_pretrained(directory),
    )
    out = []
    for i in range(count):
        prompt = builder.build(i, Sample(str(i), QUESTION, TRUTH, (picture(i, side),)))
        assert isinstance(prompt, Prompt), prompt
        out.append(prompt)
    return out


def long_tailed_lengths(count: int, seed: int = SEED, mean: int = MEAN_LENGTH, longest: int = MAX_LENGTH) -> IntArray:
    """Draw completion lengths [count]: log-normal (sigma 1) cut at 1 and `longest`, scaled to the wanted mean.

    The scale is the one whose cut and rounded lengths have a mean nearest to `mean`.
    """
    raw = np.exp(np.random.default_rng(seed).standard_normal(count))

    def lengths(scale: float) -> IntArray:
        return np.clip(np.rint(raw * scale), 1, longest).astype(np.int64)

    low, high = 1e-3, float(longest * count)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if lengths(middle).mean() < mean else (low, middle)
    return min((lengths(low), lengths(high)), key=lambda found: abs(float(found.mean()) - mean))


@contextmanager
def mesh(threads: int) -> Iterator[Mesh]:
    """Join the job that the environment describes, or make one of this process alone; `threads` of torch a rank."""
    with job.joined(ParallelConfig(timeout_s=600), SEED) as built:
        torch.set_num_threads(threads)
        yield built


def policy(directory: Path, mesh: Mesh, freeze_vision: bool = False) -> Policy:
    """Load the model in fp32; only vision tokens are banned, so that the whole vocabulary takes part."""
    banned = sorted(VisionTokens.from_pretrained(directory).ids)
    out = Policy(read_shape(directory), mesh, torch.float32, banned, freeze_vision)
    weights.load(out.chunks, weights.HfWeights(directory))
    return out


def plain_model(directory: Path) -> Any:
    """Load transformers' own model in fp32."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(str(directory), dtype=torch.float32).eval()


def plain_inputs(model: Any, batch: Sequence[Prompt], more: Sequence[IntArray] = ()) -> dict[str, torch.Tensor]:
    """Return transformers' inputs for prompts of one length, each followed by its row of `more` where given."""
    rows = [p.token_ids for p in batch]
    if more:
        rows = [np.concatenate(pair) for pair in zip(rows, more, strict=True)]
    ids = torch.from_numpy(np.stack(rows))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == model.config.image_token_id).int(),
        "pixel_values": torch.from_numpy(np.concatenate([pixel_values(i) for p in batch for i in p.images])),
        "image_grid_thw": torch.tensor([i.grid_thw for p in batch for i in p.images]),
    }
