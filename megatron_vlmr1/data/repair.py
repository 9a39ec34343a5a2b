"""Indexes for shards that have none, or a damaged one: of a damaged directory, or of shards made elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_vlmr1.data.index import MANIFEST, Progress, index_path, read_index, write_index
from megatron_vlmr1.data.reading import is_url
from megatron_vlmr1.data.scan import scan


def repair(directory: str | Path, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Index each shard of `directory` whose index is missing or damaged, in place; other files are left as they are.

    Returns:
        One row for each new index: `shard`, `why`, `samples` in it, `expected` (what shards.json says, or None),
        `ignored` members, `without_json` (keys with images only), `gaps` (bytes ``[begin, end]`` that belong to no
        readable member) and `damaged` (keys beside a gap: indexed, but never delivered).

    Raises:
        ValueError: no such directory, no shard in it, or a shard that holds no sample.
    """
    if is_url(directory):
        raise ValueError(f"{directory}: a URL; indexes are written into a local directory only")
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory of shards")
    tars = sorted(directory.glob("*.tar"))
    if not tars:
        raise ValueError(f"{directory}: holds no .tar files")
    expected = _expected(directory / MANIFEST)
    changed = []
    for number, tar in enumerate(tars, start=1):
        why = _why(index_path(tar))
        if why:
            changed.append({"shard": tar.name, "why": why, "expected": expected.get(tar.name), **_make(tar)})
        if progress:
            progress(number, len(tars))
    return changed


def lost(changed: dict[str, Any]) -> bool:
    """Whether a row of `repair` tells of samples that are or may be gone."""
    return bool(changed["gaps"]) or (changed["expected"] is not None and changed["expected"] != changed["samples"])


def _why(path: Path) -> str:
    if not path.exists():
        return "its index was missing"
    try:
        read_index(path)
    except ValueError:
        return "its index was damaged"
    return ""


def _make(tar: Path) -> dict[str, Any]:
    found = scan(tar)
    if not len(found.index):
        raise ValueError(
            f"{tar}: no sample (KEY.json, KEY.jpg, KEY.0.png …) can be read in it; bring it back or delete it"
        )
    fresh = tar.with_name(f".{tar.name}.{os.getpid()}.tmp")
    try:
        write_index(found.index, fresh)
        os.replace(fresh, index_path(tar))
    finally:
        fresh.unlink(missing_ok=True)
    return {
        "samples": len(found.index),
        "ignored": found.ignored,
        "without_json": found.without_json,
        "gaps": [list(gap) for gap in found.gaps],
        "damaged": list(found.damage),
    }


def _expected(manifest: Path) -> dict[str, int]:
    """Samples of each shard as they were built; nothing where the manifest doesn't tell."""
    try:
        found = json.loads(manifest.read_bytes())
        return {str(name): int(count) for name, count in zip(found["shards"], found["samples"], strict=True)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
