"""What a directory of shards holds, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlmr1.data import images
from megatron_vlmr1.data.index import Progress, ShardSet
from megatron_vlmr1.data.rows import METHOD
from megatron_vlmr1.types import Damage

LONGER_SIDES = (112, 224, 448, 672, 896, 1344, 1792, 2688)  # pixels; upper bounds of the histograms' bins
AREAS = tuple(side * side for side in LONGER_SIDES)  # pixels
LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 4096, 16384)  # characters


def inspect(directory: str | Path, progress: Progress | None = None) -> dict[str, Any]:
    """Read every sample and the header of every image.

    Returns:
        Counts (`shards`, `samples`, `damaged`, `images`, `bytes` of the shards), `images_per_sample`, `formats` and
        `methods` (the rows' own rewards) as {value: count}, `pixels` of an image as {min, median, max}; histograms
        `longer_side` and `area` (pixels) as lists of {upto, images}, `question_chars` and `solution_chars` as lists of
        {upto, samples}, upto None for the last bin; `unreadable` images, that are in no figure about images but their
        number; and `digest`. Damaged samples are in no count but `samples` and `damaged`.

    Raises:
        ValueError: as `ShardSet.open`.
    """
    shards = ShardSet.open(directory)
    per_sample: Counter[int] = Counter()
    formats: Counter[str] = Counter()
    methods: Counter[str] = Counter()
    sizes: list[tuple[int, int]] = []
    lengths: list[tuple[int, int]] = []
    damaged = 0
    for i in range(len(shards)):
        item = shards.read(i)
        if isinstance(item, Damage):
            damaged += 1
        else:
            per_sample[len(item.images)] += 1
            lengths.append((len(item.question), len(item.solution)))
            if method := item.extra.get(METHOD):
                methods[str(method)] += 1
            for data in item.images:
                kind, size = _header(data)
                formats[kind] += 1
                sizes += size
        if progress:
            progress(i + 1, len(shards))
    areas = [width * height for width, height in sizes]
    return {
        "shards": len(shards.names),
        "samples": len(shards),
        "damaged": damaged,
        "images": formats.total(),
        "unreadable": formats.total() - len(sizes),
        "bytes": sum(path.stat().st_size for name in shards.names if (path := shards.directory / name).is_file()),
        "images_per_sample": {str(count): per_sample[count] for count in sorted(per_sample)},
        "formats": dict(sorted(formats.items())),
        "methods": dict(sorted(methods.items())),
        "pixels": {"min": min(areas), "median": int(np.median(areas)), "max": max(areas)} if areas else None,
        "longer_side": _bins([max(size) for size in sizes], LONGER_SIDES, "images"),
        "area": _bins(areas, AREAS, "images"),
        "question_chars": _bins([question for question, _ in lengths], LENGTHS, "samples"),
        "solution_chars": _bins([solution for _, solution in lengths], LENGTHS, "samples"),
        "digest": shards.digest(),
    }


def _header(data: bytes) -> tuple[str, list[tuple[int, int]]]:
    """Format, and width and height; shards made elsewhere may hold anything under an image's name."""
    try:
        width, height, kind = images.header(data, max_pixels=2**62)
    except ValueError:
        return "unreadable", []
    return kind, [(width, height)]


def _bins(values: Sequence[int], bounds: Sequence[int], what: str) -> list[dict[str, Any]]:
    if not values:
        return []
    counts = np.bincount(np.searchsorted(bounds, values), minlength=len(bounds) + 1)
    return [{"upto": bound, what: int(count)} for bound, count in zip((*bounds, None), counts, strict=True)]
