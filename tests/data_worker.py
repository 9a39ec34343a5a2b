"""A data worker without a tokenizer, which starts at once: its prompts say which sample they were made of."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_vlmr1.data.serve import serve
from megatron_vlmr1.types import Prompt, Sample


class KeysOnly:
    """Builds prompts of no tokens to speak of."""

    def build(self, position: int, sample: Sample) -> Prompt:
        ids = np.array([len(sample.key)])
        return Prompt(position, sample.key, ids, np.zeros((3, 1), np.int64), (), sample.question, sample.solution)


if __name__ == "__main__":
    builder: Any = KeysOnly()
    serve(lambda message, tick: (builder, None))
