"""The stream's positions as prompts, with a ledger of what could not be delivered."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from megatron_vlmr1.data.readers import Reader
from megatron_vlmr1.data.stream import Stream
from megatron_vlmr1.parallel import reduce
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.runtime import distributed
from megatron_vlmr1.telemetry.files import json_line, write_atomic
from megatron_vlmr1.telemetry.lines import LineFile
from megatron_vlmr1.types import Damage, Prompt, Sample


class Feed:
    """This data-parallel rank's prompts, step by step. A damaged position stays a position: its batch is shorter.

    The ranks that hold one copy of the model read for themselves; what one of them cannot read, none of them uses.
    """

    def __init__(
        self, stream: Stream, reader: Reader, mesh: Mesh, ledger: Path | None, refuse_long: bool = False
    ) -> None:
        """Take what is needed.

        Args:
            stream: this rank's share of the data order.
            reader: makes the prompts.
            mesh: the ranks.
            ledger: receives one JSON line for each loss; None where another rank writes it.
            refuse_long: whether a prompt that is too long ends the run.
        """
        self._stream, self._reader, self._mesh = stream, reader, mesh
        self._ledger = LineFile(ledger) if ledger is not None else None
        self._refuse_long = refuse_long
        self.skipped = 0

    @property
    def unwritten(self) -> int:
        """Rows that are not in this rank's ledger, because its disk is full or fails."""
        return self._ledger.unwritten if self._ledger is not None else 0

    @property
    def consumed(self) -> int:
        """Positions of the data order that all ranks together have used."""
        return self._stream.consumed

    def next(self, n_global: int) -> list[tuple[Prompt, Sample]]:
        """Return this rank's part of the next `n_global` positions, with the samples they were made of.

        The samples are without their images.

        Raises:
            ValueError: a prompt is too long, and that is to end the run; on all ranks of the world.
        """
        if self._ledger is not None:
            self._ledger.flush()
        positions = self._stream.take(n_global)
        items = self._reader.read(positions)
        if self._refuse_long:
            agree_on_length(
                (" ".join(self._stream.locate(position)), item) for position, item in zip(positions, items, strict=True)
            )
        out: list[tuple[Prompt, Sample]] = []
        lost = reduce.lost_anywhere([isinstance(item, Damage) for item in items], self._mesh)
        for position, item, gone in zip(positions, items, lost, strict=True):
            if isinstance(item, Damage):
                self._lost(position, item.reason)
            elif gone:
                self._lost(position, "another rank of this copy of the model could not read it")
            else:
                out.append(item)
        return out

    def _lost(self, position: int, reason: str) -> None:
        self.skipped += 1
        shard, key = self._stream.locate(position)
        if self._ledger is not None:
            self._ledger.append(json_line({"position": position, "shard": shard, "key": key, "reason": reason}))


def agree_on_length(built: Iterable[tuple[str, object]]) -> None:
    """Go on if no rank of the world has a prompt that is too long; all of them call it.

    Args:
        built: of this rank, each with the name of its sample.

    Raises:
        ValueError: the first such prompt; the same line on all ranks.
    """
    long = ((name, item.reason) for name, item in built if isinstance(item, Damage) and item.too_long)
    name, reason = next(long, ("", ""))
    distributed.agree(f"{name}: {reason} (data.long_prompts=drop leaves it out)" if reason else "", ValueError)


def truncate_ledger(directory: Path, consumed: int) -> None:
    """Drop the rows of positions from `consumed` on, and torn lines, of all ranks: for a run that resumes there.

    Raises:
        OSError: a file cannot be read or rewritten.
    """
    for path in sorted(directory.glob("rank_*.jsonl")):
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and _position(line) in range(consumed)]
        if len(kept) < len(lines):
            write_atomic(path, b"".join(kept))


def _position(line: bytes) -> int | None:
    """Return the position that a row is of, None for a torn one: others may stand behind it, or a crash left zeros."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    position = row.get("position") if isinstance(row, dict) else None
    return position if isinstance(position, int) else None
