"""What a directory of shards holds, in numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlmr1.data import images
from megatron_vlmr1.data.index import Progress, ShardSet
from megatron_vlmr1.types import Damage

LONGER_SIDES = (112, 224, 448, 672, 896, 1344, 1792, 2688)  # pixels, upper bounds of the histogram's bins


def inspect(directory: str | Path, progress: Progress | None = None) -> dict[str, Any]:
    """Read every sample and the header of every image.

    Returns:
        Counts (`shards`, `samples`, `damaged`, `images`, `bytes` of the shards), `images_per_sample` and `formats` as
        {value: count}, `pixels` of an image as {min, median, max}, `longer_side` as a list of {upto, images}, upto
        None for the last bin, and `digest`. Damaged samples are in no count but `samples` and `damaged`.

    Raises:
        ValueError: as `ShardSet.open`.
    """
    shards = ShardSet.open(directory)
    per_sample: Counter[int] = Counter()
    formats: Counter[str] = Counter()
    sizes: list[tuple[int, int]] = []
    damaged = 0
    for i in range(len(shards)):
        item = shards.read(i)
        if isinstance(item, Damage):
            damaged += 1
        else:
            per_sample[len(item.images)] += 1
            headers = [images.header(data, max_pixels=2**62) for data in item.images]
            formats.update(kind for _, _, kind in headers)
            sizes += [(width, height) for width, height, _ in headers]
        if progress:
            progress(i + 1, len(shards))
    return {
        "shards": len(shards.names),
        "samples": len(shards),
        "damaged": damaged,
        "images": len(sizes),
        "bytes": sum(path.stat().st_size for name in shards.names if (path := shards.directory / name).is_file()),
        "images_per_sample": {str(count): per_sample[count] for count in sorted(per_sample)},
        "formats": dict(sorted(formats.items())),
        **_resolutions(sizes),
        "digest": shards.digest(),
    }


def _resolutions(sizes: list[tuple[int, int]]) -> dict[str, Any]:
    if not sizes:
        return {"pixels": None, "longer_side": []}
    pixels = [width * height for width, height in sizes]
    bins = np.bincount(np.searchsorted(LONGER_SIDES, [max(size) for size in sizes]), minlength=len(LONGER_SIDES) + 1)
    return {
        "pixels": {"min": min(pixels), "median": int(np.median(pixels)), "max": max(pixels)},
        "longer_side": [
            {"upto": bound, "images": int(count)} for bound, count in zip((*LONGER_SIDES, None), bins, strict=True)
        ],
    }
