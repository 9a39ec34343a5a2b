"""What reads a rank's prompts: the rank itself, or worker processes, for which this module is also the program."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlmr1.config import Config, DataConfig
from megatron_vlmr1.data.cache import Cache, open_cache
from megatron_vlmr1.data.images import ImageProcessor
from megatron_vlmr1.data.prefetch import Bounds, Prefetcher
from megatron_vlmr1.data.prompts import PromptBuilder
from megatron_vlmr1.data.readers import Inline, Reader
from megatron_vlmr1.data.serve import Tick, serve
from megatron_vlmr1.data.stream import Stream
from megatron_vlmr1.data.tokens import VisionTokens, load_tokenizer
from megatron_vlmr1.rewards import tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def reader(stream: Stream, builder: PromptBuilder, cfg: Config, checkpoint: Path) -> Reader:
    """Return what builds the prompts of `stream`; the caller closes it.

    Args:
        stream: the rank's part of the data.
        builder: builds prompts in this process.
        cfg: says how many workers there are; with none, `builder` does it.
        checkpoint: Hugging Face directory from which workers make a builder that does the same.
    """
    data = cfg.data
    if data.workers == 0:
        return Inline(stream, builder)
    setup = {"checkpoint": str(checkpoint.absolute()), "task": cfg.task, "data": data.model_dump(mode="json")}
    bounds = Bounds(data.workers, data.prefetch, data.prefetch_bytes, builder.largest_bytes, data.worker_timeout_s)
    return Prefetcher(stream, __name__, json.dumps(setup).encode(), bounds)


def _set_up(message: bytes, tick: Tick) -> tuple[PromptBuilder, Cache | None]:
    found: dict[str, Any] = json.loads(message)
    cfg = DataConfig.model_validate(found["data"])
    checkpoint = Path(found["checkpoint"])
    builder = PromptBuilder(
        _tokenizer(checkpoint),
        ImageProcessor.from_pretrained(checkpoint, cfg.min_pixels, cfg.max_pixels),
        tasks.get(found["task"]).render,
        cfg.system_prompt,
        cfg.max_prompt_tokens,
        VisionTokens.from_pretrained(checkpoint),
    )
    return builder, open_cache(cfg, tick)


def _tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer without torch, which transformers would import: seconds and 200 MB for nothing."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that there is no torch
    try:
        return load_tokenizer(checkpoint)
    finally:
        if hidden:
            del sys.modules["torch"]


if __name__ == "__main__":
    serve(_set_up)
