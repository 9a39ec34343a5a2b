"""Sets of shards that are drawn from together, each with a weight."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from megatron_vlmr1.data import order
from megatron_vlmr1.data.index import Remote, ShardSet
from megatron_vlmr1.data.reading import Reference
from megatron_vlmr1.types import Damage, Sample


class Mixture:
    """One or more sets of shards; names of shards start with their set's place where there are several.

    Args:
        sets: where samples lie.
        weights: share of positions that each set gets, in any unit.

    Raises:
        ValueError: a set holds no samples, or a weight is too small next to the others.
    """

    def __init__(self, sets: Sequence[ShardSet], weights: Sequence[float]) -> None:
        assert len(sets) == len(weights) > 0
        self.sets, self.turns = tuple(sets), order.turns(weights)
        for shards in sets:
            if not len(shards):
                raise ValueError(f"{shards.place}: the shards hold no samples")

    @classmethod
    def open(cls, sources: Sequence[tuple[str, float]], remote: Remote | None = None) -> Mixture:
        """Open the sets of `sources`, (directory or URL, weight) each.

        Raises:
            ValueError: as `ShardSet.open` and the class.
        """
        return cls([ShardSet.open(place, remote) for place, _ in sources], [weight for _, weight in sources])

    def __len__(self) -> int:
        return sum(len(shards) for shards in self.sets)

    @property
    def shards_read(self) -> set[str]:
        """Names of the shards that something was read of."""
        return {self._named(m, shard) for m, shards in enumerate(self.sets) for shard in shards.shards_read}

    def digest(self) -> str:
        """Return a sha256: equal digests mean the same samples in the same sets with the same weights."""
        if len(self.sets) == 1:
            return self.sets[0].digest()
        lines = (f"{turns} {shards.digest()}\n" for turns, shards in zip(self.turns, self.sets, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def locate(self, member: int, i: int) -> tuple[str, str]:
        """Return (shard, key) of sample `i` of a set."""
        shard, key = self.sets[member].locate(i)
        return self._named(member, shard), key

    def reference(self, member: int, i: int) -> Reference:
        """Return where sample `i` of a set lies; its shard counts as read."""
        return self.sets[member].reference(i)

    def read(self, member: int, i: int) -> Sample | Damage:
        """Return sample `i` of a set, or why it is lost."""
        return self.sets[member].read(i)

    def _named(self, member: int, shard: str) -> str:
        return shard if len(self.sets) == 1 else f"{self.sets[member].place.rstrip('/')}/{shard}"
