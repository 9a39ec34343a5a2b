"""Greedy answers of a Hugging Face directory to held-out scenes, by transformers alone.

Usage: answer_with_transformers.py MODEL_DIR SCENES_DIR COUNT. Prints one JSON list of texts. Does not import
megatron_vlmr1: it is the proof that an exported model needs nothing of ours.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

INSTRUCTION = (
    " First output the thinking process in <think> </think> tags and then output the final answer in "
    "<answer> </answer> tags. Output the final answer in JSON format."
)


def main() -> None:
    """Answer and print."""
    directory, scenes, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    processor = AutoImageProcessor.from_pretrained(directory)
    image_id, merge = model.config.image_token_id, model.config.vision_config.spatial_merge_size
    banned = [[i] for i in range(model.config.text_config.vocab_size) if not _sayable(i, tokenizer, model)]
    texts = []
    for line in (scenes / "heldout.jsonl").read_text().splitlines()[:count]:
        row = json.loads(line)
        question = row["conversations"][0]["value"].replace("<image>", "")
        content = [{"type": "image"}, {"type": "text", "text": question + INSTRUCTION}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        pixels = processor(images=[Image.open(scenes / "images" / row["image"])], return_tensors="pt")
        tokens = int(pixels["image_grid_thw"].prod()) // merge**2
        ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * tokens), return_tensors="pt")["input_ids"]
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == image_id).int(),
            max_new_tokens=30,
            do_sample=False,
            bad_words_ids=banned or None,
            **pixels,
        )
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    print(json.dumps(texts))


def _sayable(token: int, tokenizer: object, model: object) -> bool:
    """Whether training lets the policy produce this token: not vision, padding or beyond the tokenizer."""
    stops = model.generation_config.eos_token_id  # type: ignore[attr-defined]
    stops = [stops] if isinstance(stops, int) else list(stops)
    if token in stops:
        return True
    if token >= len(tokenizer):  # type: ignore[arg-type]
        return False
    text = tokenizer.convert_ids_to_tokens(token)  # type: ignore[attr-defined]
    return token != tokenizer.pad_token_id and not text.startswith(("<|vision", "<|image", "<|video"))  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
