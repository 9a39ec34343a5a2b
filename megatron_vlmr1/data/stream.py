"""One rank's share of the data order, read from shards. The whole state is `consumed`."""

from __future__ import annotations

from megatron_vlmr1.data.index import ShardSet
from megatron_vlmr1.data.mixture import Mixture
from megatron_vlmr1.data.order import Mixer, Order
from megatron_vlmr1.data.reading import Reference
from megatron_vlmr1.types import Damage, Sample


class Stream:
    """Delivers the run's positions, in order, that belong to one data-parallel rank.

    Position `p` belongs to lane ``p % lanes``, and lane `l` to rank ``l % dp_size``. The order itself knows nothing of
    ranks, so a run may resume from `consumed` on any `dp_size` that divides `lanes`.

    Args:
        shards: where samples lie; one set or a mixture of several.
        seed: seed of the order.
        lanes: number of lanes (data.lanes).
        window: samples within which a lane is shuffled (data.shuffle_window).
        dp_rank: this rank's number in its data-parallel group.
        dp_size: data-parallel ranks.
        consumed: positions that the run has used before, over all ranks.

    Raises:
        ValueError: no samples, or `dp_size` does not divide `lanes`.
    """

    def __init__(
        self,
        shards: ShardSet | Mixture,
        seed: int,
        lanes: int,
        window: int,
        dp_rank: int,
        dp_size: int,
        consumed: int = 0,
    ) -> None:
        assert 0 <= dp_rank < dp_size and consumed >= 0
        if lanes % dp_size:
            raise ValueError(f"data.lanes={lanes} must be a multiple of the data-parallel size {dp_size}")
        self.mixture = shards if isinstance(shards, Mixture) else Mixture([shards], [1.0])
        self.dp_rank, self.dp_size, self.consumed = dp_rank, dp_size, consumed
        self._mixer = Mixer(self.mixture.turns, seed, lanes)
        # Sets of one length are shuffled apart; a set alone has the run's own seed.
        self.orders = [
            Order(found.firsts, seed + (m << 64), lanes, window) for m, found in enumerate(self.mixture.sets)
        ]

    def sample(self, position: int) -> tuple[int, int]:
        """Return (set of the mixture, sample of that set) at `position`."""
        member, own = self._mixer.place(position)
        return member, self.orders[member].sample(own)

    def positions(self, n_global: int) -> list[int]:
        """Return this rank's positions among the next `n_global`, without reading or consuming them.

        Raises:
            ValueError: `n_global` is not a multiple of the data-parallel size.
        """
        if n_global % self.dp_size:
            raise ValueError(
                f"train.prompts_per_step={n_global} must be a multiple of the data-parallel size {self.dp_size}"
            )
        first = self.consumed + (self.dp_rank - self.consumed) % self.dp_size
        return list(range(first, self.consumed + n_global, self.dp_size))

    def take(self, n_global: int) -> list[int]:
        """Consume the next `n_global` positions and return this rank's among them, for `read`.

        Raises:
            ValueError: as `positions`.
        """
        taken = self.positions(n_global)
        self.consumed += n_global
        return taken

    def next(self, n_global: int) -> list[tuple[int, Sample | Damage]]:
        """Read this rank's items of the next `n_global` positions: n_global / dp_size pairs (position, item).

        A damaged sample keeps its position, so no rank's count depends on what is damaged.

        Raises:
            ValueError: as `positions`.
        """
        return [(position, self.read(position)) for position in self.take(n_global)]

    def read(self, position: int) -> Sample | Damage:
        """Return the sample at `position`, or why it is lost."""
        return self.mixture.read(*self.sample(position))

    def reference(self, position: int) -> Reference:
        """Return where the sample at `position` lies, for another process to read."""
        return self.mixture.reference(*self.sample(position))

    def locate(self, position: int) -> tuple[str, str]:
        """Return (shard, key) of the sample at `position`."""
        return self.mixture.locate(*self.sample(position))
