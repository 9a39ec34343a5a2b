"""Files of rows and their images to a directory of indexed WebDataset shards.

Two passes, both in parallel: a survey checks and measures every row and so fixes which sample goes into which shard;
then each shard is written by itself. So the bytes don't depend on the number of processes, and an interrupted build
goes on with the shards that are missing.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from megatron_vlmr1.checkpoint import partial
from megatron_vlmr1.data import index, rows
from megatron_vlmr1.data.building import pool, sources, writer
from megatron_vlmr1.data.building.sources import Source
from megatron_vlmr1.data.building.survey import Survey, survey
from megatron_vlmr1.data.index import Progress

REJECTED = "rejected.jsonl"
MAX_REJECTED_FRAC = 0.01
MAX_WORKERS = 16  # by default: beyond it disks are slower than processes
_FORMAT = 1  # of plans: an interrupted build of another one is begun anew
_WORK = "work"  # what is not published

Bars = Callable[[str], AbstractContextManager[Progress]]  # title of a phase -> what is told the bytes done and in all

logger = logging.getLogger(__name__)


def build(
    jsonl_paths: Sequence[str | Path],
    image_roots: Sequence[str | Path],
    out: str | Path,
    shard_bytes: int,
    max_rejected_frac: float = MAX_REJECTED_FRAC,
) -> dict[str, Any]:
    """Build shards from jsonl files, each with the folder that its image paths start from, as `build_from`.

    Raises:
        ValueError: not one folder for each file, or as `build_from`.
    """
    if len(jsonl_paths) != len(image_roots):
        raise ValueError(f"{len(jsonl_paths)} jsonl files but {len(image_roots)} image folders: give one for each file")
    pairs = zip(jsonl_paths, image_roots, strict=True)
    return build_from(
        [Source("jsonl", Path(path), Path(root)) for path, root in pairs], out, shard_bytes, max_rejected_frac
    )


@contextmanager
def _no_bar(_: str) -> Iterator[Progress]:
    yield lambda done, total: None


def build_from(
    what: Sequence[Source],
    out: str | Path,
    shard_bytes: int,
    max_rejected_frac: float = MAX_REJECTED_FRAC,
    workers: int | None = None,
    bars: Bars = _no_bar,
) -> dict[str, Any]:
    """Build the directory `out` of shards from `what`, in that order.

    `out` appears complete or not at all. Beside shards and indexes it holds `shards.json` (their names and numbers of
    samples) and `rejected.jsonl` (file, line and reason of each row left out). Until then it grows in ``OUT.partial``,
    where the same call goes on after an interruption; a call with other sources or another shard size begins anew.

    Args:
        what: sources of rows.
        out: must not exist yet.
        shard_bytes: a shard is closed before its members would take more; a larger sample gets one of its own.
        max_rejected_frac: a larger share of bad rows is an error, before anything is copied.
        workers: processes; by default as many as this machine has CPUs, and fewer where there is little to do.
        bars: shows how far each phase is.

    Returns:
        ``{"out", "samples", "images", "shards", "bytes", "rejected"}``.

    Raises:
        ValueError: `out` exists or is being built, an input is missing or has no rows, too many rows are bad, an input
            changed meanwhile, or the disk is full.
    """
    out = Path(out)
    if not what:
        raise ValueError("no source of rows given: nothing to build from")
    for source in what:
        source.check()
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out}: exists already; delete it or choose another directory")
    plan = json.dumps([_FORMAT, shard_bytes, [source.identity() for source in what]])
    with partial.making(out, plan) as place, partial.room(place):
        try:
            found, shard_sizes = _fill(place, what, shard_bytes, max_rejected_frac, workers, bars)
        except ValueError:  # the user has to change something: nothing to go on with
            shutil.rmtree(place)
            raise
        shutil.rmtree(place / _WORK)
        partial.publish(out)
    if found.own_methods:
        logger.warning(
            "%d rows name their %s, which counts only in a recipe with `accuracy`", found.own_methods, rows.METHOD
        )
    return {
        "out": str(out),
        "samples": len(found),
        "images": found.images,
        "shards": len(shard_sizes),
        "bytes": sum(shard_sizes),
        "rejected": len(found.rejected),
    }


def _worthwhile(size: int, share: int) -> int:
    """How many processes pay for their start: one for each `share` of the bytes."""
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)), 1 + size // share)


def _fill(
    place: Path, what: Sequence[Source], shard_bytes: int, max_rejected_frac: float, workers: int | None, bars: Bars
) -> tuple[Survey, list[int]]:
    """Do both passes in `place`; return what was found, and the bytes of each shard."""
    work = place / _WORK
    work.mkdir(exist_ok=True)
    memory = work / "survey.npz"
    found = Survey.load(memory)
    lists = [work / f"rows-{number}.jsonl" for number in range(len(what))]
    if found is None:
        for path in lists:
            path.unlink(missing_ok=True)
    pieces = [piece for source, path in zip(what, lists, strict=True) for piece in sources.pieces(source, path)]
    if found is None:
        with bars("reading rows") as progress:
            found = survey(pieces, workers or _worthwhile(sum(piece.size_bytes for piece in pieces), 1 << 20), progress)
        found.save(memory)
    _judge(found, what, max_rejected_frac)
    shards = found.shards(pieces, shard_bytes)
    total = sum(shard.size_bytes for shard in shards)
    sizes = []
    with bars("writing shards") as progress:
        jobs = [(place, work, shard) for shard in shards]
        for size in pool.each(writer.write, jobs, workers or _worthwhile(total, 1 << 26)):
            sizes.append(size)
            progress(total if len(sizes) == len(shards) else min(total, sum(sizes)), total)
    names = [shard.name for shard in shards]
    manifest = {"shards": names, "samples": [shard.samples for shard in shards]}
    (place / index.MANIFEST).write_text(json.dumps(manifest) + "\n", encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in found.rejected)
    (place / REJECTED).write_text(lines, encoding="utf-8")
    return found, sizes


def _judge(found: Survey, what: Sequence[Source], max_rejected_frac: float) -> None:
    bad, total = len(found.rejected), len(found.rejected) + len(found)
    if total == 0:
        raise ValueError(f"{', '.join(str(source.path) for source in what)}: no rows")
    if bad > max_rejected_frac * total or bad == total:
        first = found.rejected[0]
        enough = math.ceil(100 * bad / total) / 100
        way_out = f"; --max-rejected {enough:.2f} would leave them out" if enough < 1 else ""
        raise ValueError(
            f"{first['file']}:{first['line']}: {first['reason']} (the first of {bad} bad rows in {total}{way_out})"
        )
