"""Tokenizer and text files of the embedded tiny Qwen2.5-VL checkpoint.

A byte-level BPE in Qwen's form, trained on the scenes' own sentences; constant pieces of prompt and answer are
single added tokens, which keeps a prompt below 50 tokens and an answer below 25.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2Tokenizer

from megatron_vlmr1.data.scenes import COLOURS, QUESTION, SHAPES

# Qwen2's published split: contractions, words, single digits, punctuation, white space.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
"""Qwen2.5's special tokens, in the order of their ids."""

SYSTEM = "You are a helpful assistant."
INSTRUCTION = (
    " First output the thinking process in <think> </think> tags and then output the final answer in"
    " <answer> </answer> tags. Output the final answer in JSON format."
)
STEM = QUESTION.removesuffix(" {expression}")
CONSTANTS = ("<think>", "</think>", "<answer>", "</answer>", '{"bbox_2d": [', "]}", ", ", STEM, INSTRUCTION, SYSTEM)
"""Pieces that occur word for word in nearly every sample."""

CHAT_TEMPLATE = """\
{%- if messages and messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nSYSTEM<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
""".replace("SYSTEM", SYSTEM)


IMAGE_PROCESSOR: Mapping[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 56 * 56,
    "max_pixels": 224 * 224,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
"""Qwen2.5-VL's preprocessing (CLIP's mean and deviation) for small pictures."""


def corpus() -> Iterator[str]:
    """Texts whose words become single tokens."""
    for colour, shape, vertical, side in itertools.product(COLOURS, SHAPES, ("top", "bottom"), ("left", "right")):
        yield f"the {colour} shape at the {vertical} {side}"
        yield f"the {colour} {shape}"
        yield f" {colour} {vertical} {side} {shape} "
    for text in ("system", "user", "assistant", STEM, INSTRUCTION, SYSTEM):
        yield from [text] * 4


def build_tokenizer(bpe_size: int = 480) -> Qwen2Tokenizer:
    """Train the byte-level BPE (at most `bpe_size` entries), then add special tokens and constants after it."""
    core = Tokenizer(models.BPE(byte_fallback=False))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=bpe_size, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    core.train_from_iterator(corpus(), trainer)
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    core.add_tokens([AddedToken(text, special=False, normalized=False) for text in CONSTANTS])
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return Qwen2Tokenizer(tokenizer_object=core, chat_template=CHAT_TEMPLATE, model_max_length=1024, **roles)


def model_config(tokenizer: Qwen2Tokenizer, settings: Mapping[str, Any]) -> Qwen2_5_VLConfig:
    """Complete `settings` (keys ``text_config``, ``vision_config``) with the tokenizer's ids.

    The vocabulary's size is rounded up to a multiple of 128: it divides over tensor-parallel ranks.

    Raises:
        ValueError: `settings` names a vocabulary smaller than the tokenizer's.
    """
    text = dict(settings["text_config"])
    text.setdefault("vocab_size", -(-len(tokenizer) // 128) * 128)
    if text["vocab_size"] < len(tokenizer):
        raise ValueError(f"text_config.vocab_size {text['vocab_size']} is below the tokenizer's {len(tokenizer)}")
    text |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**settings["vision_config"], "out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=True,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        dtype="float32",
        **{key: tokenizer.convert_tokens_to_ids(name) for key, name in names.items()},
    )


def build_checkpoint_files(directory: str | Path, settings: Mapping[str, Any]) -> Qwen2_5_VLConfig:
    """Write everything of a Hugging Face directory but the weights: tokenizer, template, processor, configs.

    `settings` holds the shapes, see :func:`model_config`. Returns the config that was written.

    Raises:
        ValueError: as :func:`model_config`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    config = model_config(tokenizer, settings)
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    stops = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    generation = GenerationConfig(do_sample=False, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    generation.save_pretrained(directory)
    processor = json.dumps(IMAGE_PROCESSOR, indent=2) + "\n"
    (directory / "preprocessor_config.json").write_text(processor, encoding="utf-8")
    return config
