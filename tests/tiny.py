"""A tiny Qwen2.5-VL directory without weights: tokenizer, chat template, image processor, configuration."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
ADDED = ("<tool_call>", "</tool_call>", "<think>", "</think>", "<answer>", "</answer>")
CORPUS = (
    "Please provide the bounding box coordinate of the region this sentence describes: the red square at the left.",
    "First output the thinking process in <think> </think> tags and then output the final answer.\n\nYou are helpful.",
    '{"bbox_2d": [10, 20, 130, 240]}\n  indented\tlines user assistant system\n',
)
CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB_SIZE = 512  # rows of the embedding; the tokenizer names fewer


def write_tiny_checkpoint_files(directory: Path, **text_settings: Any) -> Path:
    """Write everything of a Hugging Face directory but the weights; `text_settings` override the text model's."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(str(directory))
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    text = {
        **dict(vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2),
        **dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, rms_norm_eps=1e-6),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        **{
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        **text_settings,
    }
    vision = {
        **dict(depth=2, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=text["hidden_size"]),
        **dict(patch_size=14, spatial_merge_size=2, temporal_patch_size=2, window_size=56, fullatt_block_indexes=[1]),
    }
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "text_config": {"model_type": "qwen2_5_vl_text", **text},
        "vision_config": {"model_type": "qwen2_5_vl", **vision},
        "tie_word_embeddings": True,
    }
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 56 * 56,
        "max_pixels": 224 * 224,
        **dict(patch_size=14, merge_size=2, temporal_patch_size=2),
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    stops = {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "pad_token_id": ids["<|endoftext|>"]}
    for name, value in (("config", config), ("preprocessor_config", processor), ("generation_config", stops)):
        (directory / f"{name}.json").write_text(json.dumps(value, indent=2))
    return directory


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Draw something with the statistics of a photograph: smooth colours with detail on all scales."""
    rng = np.random.default_rng((seed, width, height))
    total = np.zeros((height, width, 3))
    for scale in (2, 5, 13, 40):
        grain = rng.integers(0, 256, (scale, scale, 3), dtype=np.uint8)
        layer = Image.fromarray(grain).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(layer, np.float64) / scale**0.5
    total += rng.normal(0, 6, total.shape)
    low, high = total.min(), total.max()
    return Image.fromarray(((total - low) * (255 / max(high - low, 1e-9))).astype(np.uint8))


def compressed(image: Image.Image, kind: str = "JPEG", **settings: Any) -> bytes:
    """Return `image` as a file."""
    out = io.BytesIO()
    image.save(out, kind, **settings)
    return out.getvalue()


def plain_png(width: int, height: int) -> bytes:
    """Return a valid black PNG of one bit a pixel: small as a file, as large as you like once decoded."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + -(-width // 8))) for _ in range(height)) + packer.flush()
    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + ihdr + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _tokenizer() -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    bpe = Tokenizer(models.BPE(byte_fallback=False))
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        CORPUS * 4,
        trainers.BpeTrainer(vocab_size=440, initial_alphabet=alphabet, special_tokens=[], show_progress=False),
    )
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    tokenizer = Qwen2Tokenizer(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
