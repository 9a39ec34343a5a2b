"""What is added to scores before they are compared."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_vlmr1.types import FloatArray, Group, IntArray

OVERLONG = "overlong"  # name of the penalty among a score's parts


def overlong_penalty(lengths: IntArray, max_new_tokens: int, buffer: int) -> FloatArray:
    """Return the soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13).

    It is 0 up to max_new_tokens - buffer, then ((max_new_tokens - buffer) - length) / buffer, and never less than -1.

    Args:
        lengths: [n] tokens of each completion, the stop token included.
        max_new_tokens: the longest completion.
        buffer: tokens over which the penalty grows.
    """
    return np.clip((max_new_tokens - buffer - lengths) / buffer, -1.0, 0.0).astype(np.float32)


def with_overlong_penalty(group: Group, max_new_tokens: int, buffer: int) -> Group:
    """Add the penalty to each score that there is, and name it among its parts.

    Nothing changes where `buffer` is 0.
    """
    if not buffer:
        return group
    lengths = np.array([len(completion.token_ids) for completion in group.completions], dtype=np.int64)
    penalties = overlong_penalty(lengths, max_new_tokens, buffer).tolist()
    scores = tuple(
        score
        if score.value is None
        else replace(score, value=score.value + penalty, parts={**score.parts, OVERLONG: penalty})
        for score, penalty in zip(group.scores, penalties, strict=True)
    )
    return replace(group, scores=scores)
