"""Three-row rotary positions of a sequence of text and images (Qwen2-VL, arXiv 2409.12191, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_vlmr1.types import IntArray


def mrope_positions(
    token_ids: IntArray, grids: Sequence[tuple[int, int, int]], image_token_id: int, spatial_merge_size: int
) -> IntArray:
    """Return temporal, height and width positions [3, T].

    Text counts up by one in all three rows. An image that follows position n spreads over n + 1 + (0, row, column) of
    its merged grid, and what comes after it continues from the largest of these.

    Args:
        token_ids: [T], each image as a run of image tokens.
        grids: (1, height, width) in patches of each image, in the order of the runs.
        image_token_id: id of an image token.
        spatial_merge_size: patches along a side of what one image token stands for.

    Raises:
        ValueError: the image tokens are not those of `grids`.
    """
    sizes = [(height // spatial_merge_size, width // spatial_merge_size) for _, height, width in grids]
    is_image = np.asarray(token_ids) == image_token_id
    if int(is_image.sum()) != sum(height * width for height, width in sizes):
        raise ValueError(
            f"{int(is_image.sum())} image tokens, but the images make {sum(height * width for height, width in sizes)}"
        )
    out = np.empty((3, len(is_image)), np.int64)
    at, position = 0, 0  # next token, and the position it gets
    for height, width in sizes:
        begin = at + int(np.argmax(is_image[at:]))
        end = begin + height * width
        if not is_image[begin:end].all():
            raise ValueError(f"the image tokens from {begin} on are not one run of {height * width}")
        out[:, at:begin] = np.arange(position, position + begin - at)
        position += begin - at
        rows, columns = np.divmod(np.arange(height * width), width)
        out[:, begin:end] = position + np.stack((np.zeros_like(rows), rows, columns))
        position += max(height, width)
        at = end
    out[:, at:] = np.arange(position, position + len(is_image) - at)
    return out
