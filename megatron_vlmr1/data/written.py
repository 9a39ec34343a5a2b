"""Made-up or repackaged data sets as files: a jsonl of VLM-R1 rows, and their pictures beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_vlmr1.telemetry.files import write_atomic


def write_rows(
    directory: str | Path, split: str, items: Iterable[tuple[Mapping[str, Any], Mapping[str, bytes]]]
) -> Path:
    """Write ``{split}.jsonl`` and ``images/`` below `directory`, and return the jsonl's path.

    Each file appears whole or not at all, the jsonl last.

    Args:
        directory: is made where it is missing.
        split: the file's name.
        items: each row with its pictures by name; a name that came before is not written again.

    Raises:
        ValueError: `directory` cannot be written.
    """
    images = Path(directory) / "images"
    lines: list[str] = []
    written: set[str] = set()
    try:
        images.mkdir(parents=True, exist_ok=True)
        for row, pictures in items:
            for name in pictures.keys() - written:
                write_atomic(images / name, pictures[name])
            written |= pictures.keys()
            lines.append(json.dumps(row) + "\n")
        target = Path(directory) / f"{split}.jsonl"
        write_atomic(target, "".join(lines).encode())
    except OSError as error:
        raise ValueError(f"{directory}: cannot be written: {error.strerror}") from error
    return target
