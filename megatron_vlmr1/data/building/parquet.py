"""Parquet files as Hugging Face data sets have them: one row a row.

Columns: `image` or `images` (``{"bytes", "path"}``, bytes, or a path; one or a list), `question` or `problem`,
`answer` or `solution`. Other columns are kept, but those that hold bytes; times become text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_BATCH_ROWS = 16
_IMAGES = ("image", "images")


def group_sizes(path: Path) -> list[int]:
    """Return the size in bytes of each row group.

    Raises:
        ValueError: pyarrow is missing, or this is no parquet file.
    """
    metadata = _open(path).metadata
    return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]


def rows(path: Path, group: int, places: Sequence[int] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number within the row group, row for `rows.from_object`) of all rows, or of those at `places`.

    Raises:
        ValueError: as `group_sizes`, or the row group is damaged.
    """
    file = _open(path)
    wanted = None if places is None else set(places)
    number = 0
    columns = [field.name for field in file.schema_arrow if field.name in _IMAGES or not _holds_bytes(field.type)]
    try:
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns):
            for at in range(len(batch)):
                if wanted is None or number in wanted:
                    (found,) = batch.slice(at, 1).to_pylist()
                    yield number, {key: _value(value, key in _IMAGES) for key, value in found.items()}
                number += 1
    except (OSError, ValueError, TypeError, LookupError, NotImplementedError) as error:  # Arrow's are such
        raise ValueError(f"{path}: row group {group} cannot be read: {' '.join(str(error).split())}") from error


def _open(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            f"{path}: reading parquet needs pyarrow, which is missing: pip install 'megatron-vlmr1[parquet]'"
        ) from error
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError, NotImplementedError) as error:  # Arrow's are such
        raise ValueError(f"{path}: not a parquet file: {' '.join(str(error).split())}") from error


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return True
    return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))


def _value(value: Any, is_image: bool) -> Any:
    """`value` as JSON has it; an image as its bytes, else as its path."""
    if isinstance(value, list | tuple):
        return [_value(item, is_image) for item in value]
    if isinstance(value, dict):
        return (
            value.get("bytes") or value.get("path") or ""
            if is_image
            else {k: _value(v, False) for k, v in value.items()}
        )
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str | bytes) else str(value)
