"""The checkpoint's tokenizer, and the ids of its tokens that mean something to the program."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_vlmr1.types import IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class VisionTokens:
    """Ids of a checkpoint's vision tokens, and how many patches one image token stands for along a side."""

    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    spatial_merge_size: int

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> VisionTokens:
        """Read config.json of a Hugging Face directory.

        Raises:
            ValueError: the file is missing, broken, or not that of a vision-language model of the Qwen-VL kind.
        """
        path = Path(directory) / "config.json"
        config = _read_json(path)
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        found: dict[str, Any] = {name: config.get(name) for name in names}
        found["spatial_merge_size"] = (config.get("vision_config") or {}).get("spatial_merge_size")
        if missing := [name for name, value in found.items() if not isinstance(value, int)]:
            raise ValueError(f"{path}: {', '.join(missing)} missing: not a Qwen2.5-VL configuration")
        return cls(**found)

    @property
    def ids(self) -> frozenset[int]:
        """All vision token ids."""
        return frozenset(
            (self.image_token_id, self.video_token_id, self.vision_start_token_id, self.vision_end_token_id)
        )


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face directory, without a network and without running code from it.

    Raises:
        ValueError: no tokenizer there, or one without the fast backend.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory")
    from transformers import AutoTokenizer  # takes seconds to import, and building shards needs none

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory}: no usable tokenizer: {' '.join(str(error).split())[:300]}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{directory}: the tokenizer has no tokenizer.json (the fast backend is needed)")
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, plain: bool) -> list[int]:
    """Tokenise `text` as it stands; with `plain`, special tokens written in it become ordinary text."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=plain, verbose=False)["input_ids"])


def completion_ids(tokenizer: PreTrainedTokenizerBase, text: str, stop_token_id: int) -> IntArray:
    """Return the ids [L] of a completion for supervised training: its text, special tokens disarmed, and the stop."""
    return np.array([*encode(tokenizer, text, plain=True), stop_token_id], np.int64)


def stop_token_ids(directory: str | Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that end a completion: eos_token_id of generation_config.json, else the tokenizer's.

    The tokenizer's own comes first where it is among them: it ends a turn of the chat.

    Raises:
        ValueError: there are none, or the file is broken.
    """
    path = Path(directory) / "generation_config.json"
    found: Any = _read_json(path).get("eos_token_id") if path.is_file() else None
    if found is None:
        found = tokenizer.eos_token_id
    ids = [found] if isinstance(found, int) else found
    if not isinstance(ids, list) or not ids or not all(isinstance(i, int) for i in ids):
        raise ValueError(f"{path}: eos_token_id must be an id or a list of ids, and the tokenizer names none")
    return tuple(sorted(dict.fromkeys(ids), key=lambda i: i != tokenizer.eos_token_id))


def banned_token_ids(directory: str | Path, tokenizer: PreTrainedTokenizerBase) -> IntArray:
    """Return, sorted, the ids [B] that must never be sampled.

    These are vision, image and video tokens (a sampled one would stand for an image that does not exist), the
    padding token unless it ends completions, and rows of the embedding that no token of the tokenizer names.

    Raises:
        ValueError: config.json is missing or not that of a vision-language model.
    """
    config = _read_json(Path(directory) / "config.json")
    vocab_size = (config.get("text_config") or config).get("vocab_size", config.get("vocab_size"))
    if not isinstance(vocab_size, int):
        raise ValueError(f"{Path(directory) / 'config.json'}: vocab_size missing")
    named = tokenizer.get_vocab()
    banned = set(range(vocab_size)) - set(named.values())
    banned |= VisionTokens.from_pretrained(directory).ids
    # config.json files of one family differ in whether they name the third vision token.
    optional = (config.get("vision_token_id"), named.get("<|vision_pad|>"), tokenizer.pad_token_id)
    banned |= {i for i in optional if isinstance(i, int)}
    return np.array(sorted(banned - set(stop_token_ids(directory, tokenizer))), np.int64)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must be a JSON object")
    return value
