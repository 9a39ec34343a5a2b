"""Random Qwen2.5-VL checkpoints, and prompts for them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlmr1.data.images import ImageProcessor
from megatron_vlmr1.data.packing import MicroBatch
from megatron_vlmr1.data.prompts import PromptBuilder
from megatron_vlmr1.data.tokens import VisionTokens, load_tokenizer
from megatron_vlmr1.models.mrope import mrope_positions
from megatron_vlmr1.types import ImagePatches, IntArray, Prompt, Sample
from tests.tiny import compressed, picture, write_tiny_checkpoint_files

STD = 0.1
PATCH = (3, 14 * 14)  # channels, pixels
PLAIN_IDS = 400  # ids below are ordinary tokens of the tiny tokenizer
VISION = {"depth": 4, "fullatt_block_indexes": [1, 3]}  # windowed and full-attention blocks, by turns


def write_random_checkpoint(
    directory: Path, seed: int = 0, tied: bool = False, vision: dict[str, Any] | None = None, **text_settings: Any
) -> Path:
    """Write a whole Hugging Face directory whose every number is drawn with std 0.1, norms around one.

    Args:
        directory: made if missing.
        seed: of the weights.
        tied: whether the output layer shares the embedding's weight.
        vision: override the tower's settings.
        text_settings: override the text model's settings, as `tests.tiny` takes them.
    """
    import torch
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    write_tiny_checkpoint_files(directory, **{"num_hidden_layers": 4, **text_settings})
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = tied
    config["vision_config"] |= vision or VISION
    path.write_text(json.dumps(config))
    stops = (directory / "generation_config.json").read_bytes()
    model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(str(directory))).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, STD, generator=generator)
            if "norm" in name or "ln_q" in name:
                parameter.add_(1.0)
    model.save_pretrained(str(directory))
    (directory / "generation_config.json").write_bytes(stops)
    return directory


def write_in_bf16(source: Path, target: Path) -> Path:
    """Write `source` again with weights in bf16, by safetensors' own means."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = (target / "config.json").read_text()
    (target / "config.json").write_text(config.replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    return target


def plain_model(directory: Path, dtype: str = "float32") -> Any:
    """Load transformers' own model, the reference of our tests."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(str(directory), dtype=getattr(torch, dtype)).eval()


def banned_ids(directory: Path) -> list[int]:
    """Return the vision tokens, and ordinary tokens of both halves of the vocabulary."""
    config = json.loads((directory / "config.json").read_text())
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return sorted({3, 100, 399, *(config[name] for name in names)})


def random_image(seed: int, rows: int, columns: int) -> ImagePatches:
    """Draw an image of `rows` x `columns` patches."""
    patches = np.random.default_rng((seed, rows, columns)).standard_normal((rows * columns, *PATCH))
    patches = patches.astype(np.float32)
    digest = hashlib.sha256(patches.tobytes()).digest()
    return ImagePatches(patches, (1, rows, columns), (columns * 14, rows * 14), digest)


def random_prompt(directory: Path, position: int, text: int, images: Sequence[ImagePatches] = ()) -> Prompt:
    """Draw a prompt: `text` tokens, then each image followed by three tokens more."""
    config = json.loads((directory / "config.json").read_text())
    image_id = config["image_token_id"]
    rng = np.random.default_rng((position, text))
    ids: list[int] = rng.integers(0, PLAIN_IDS, text).tolist()
    for image in images:
        ids.append(config["vision_start_token_id"])
        ids += [image_id] * (len(image.patches) // 4)
        ids.append(config["vision_end_token_id"])
        ids += rng.integers(0, PLAIN_IDS, 3).tolist()
    tokens: IntArray = np.array(ids, dtype=np.int64)
    positions = mrope_positions(tokens, [image.grid_thw for image in images], image_id, 2)
    return Prompt(position, f"prompt {position}", tokens, positions, tuple(images), "", "")


def real_prompts(directory: Path) -> dict[str, Prompt]:
    """Return prompts of six kinds, by their names: real pictures, through the checkpoint's own tokenizer and processor.

    The image processor rounds the sides of the sixth kind's pictures by one pixel.
    """
    words = "where is the red square at the left of region 12 ?".split()
    rng = np.random.default_rng(7)
    kinds: dict[str, tuple[int, list[tuple[int, int]]]] = {
        "text only": (40, []),
        "one image": (12, [(224, 168)]),
        "three images": (12, [(112, 112), (112, 112), (112, 112)]),
        "different sizes": (15, [(56, 56), (300, 40), (90, 210), (640, 480)]),
        "long": (1600, [(200, 130)]),
        "one pixel off": (9, [(57, 83), (113, 139)]),
    }
    builder = PromptBuilder(
        load_tokenizer(directory),
        ImageProcessor.from_pretrained(directory),
        *(str, None, 4096),
        VisionTokens.from_pretrained(directory),
    )
    prompts = {}
    for i, (name, (count, sizes)) in enumerate(kinds.items()):
        images = tuple(compressed(picture(*size, seed=10 * i + j)) for j, size in enumerate(sizes))
        prompt = builder.build(i, Sample(name, " ".join(rng.choice(words, count)), "", images))
        assert isinstance(prompt, Prompt), prompt
        prompts[name] = prompt
    return prompts


def mixed_prompts(directory: Path) -> list[Prompt]:
    """Return text-only prompts at even positions; at odd ones one image, two, and three with a shared one."""
    square = random_image(0, 8, 8)
    shapes: list[tuple[int, tuple[ImagePatches, ...]]] = [
        (7, ()),
        (3, (square,)),
        (3, ()),
        (5, (random_image(1, 4, 6), random_image(2, 20, 10))),
        (9, ()),
        (4, (random_image(3, 2, 2), square, random_image(4, 6, 2))),
    ]
    return [random_prompt(directory, i, text, images) for i, (text, images) in enumerate(shapes)]


def kind(batch: MicroBatch) -> str:
    """Name what a micro-batch holds."""
    return {0: "text", 1: "one image"}.get(len(batch.images), "images")
