"""Dynamic sampling: draw until there are enough groups to learn from (DAPO, arXiv 2503.14476, section 3.2)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from megatron_vlmr1.grpo.advantages import scores_differ
from megatron_vlmr1.parallel import reduce
from megatron_vlmr1.types import Group

logger = logging.getLogger(__name__)


class Batch:
    """This rank's groups of one step, drawn in rounds that all ranks take together.

    A round takes the next `size` positions of the data order. With refilling, the groups whose scores differ are
    trained on, up to `size` of them over all ranks, the earliest positions first; without, all groups of one round.
    What is drawn and kept is a function of the data order and the weights: a step that is interrupted and begun again
    draws and keeps the same.

    Attributes:
        drawn: every group of this rank, in the order of positions.
        rounds: how many rounds were drawn.
        first: position of the data order at which the step began.
    """

    def __init__(self, size: int, max_rounds: int, first: int) -> None:
        """`first` is the next position of the data order; 0 `max_rounds` is one round without refilling."""
        self.drawn: list[Group] = []
        self.rounds = 0
        self._size, self._max_rounds, self.first = size, max_rounds, first
        self._found: list[int] = []  # positions of groups to learn from, on all ranks

    @property
    def wants_more(self) -> bool:
        """Whether another round is to be drawn; all ranks get the same answer."""
        return self.rounds < max(1, self._max_rounds) and len(self._found) < self._size

    @property
    def kept(self) -> list[Group]:
        """The groups of this rank to train on."""
        if not self._max_rounds:
            return self.drawn
        chosen = set(self._found[: self._size])
        return [group for group in self.drawn if group.prompt.position in chosen]

    def add(self, groups: Sequence[Group]) -> None:
        """Take this rank's scored groups of the next round; all ranks call it."""
        start = self.first + self.rounds * self._size
        positions = range(start, start + self._size)
        assert all(group.prompt.position in positions for group in groups)
        self.drawn += groups
        self.rounds += 1
        if self._max_rounds:
            mine = {group.prompt.position for group in groups if scores_differ(group)}
            flags = reduce.maxima({str(p): float(p in mine) for p in positions}, speaks=True)
            self._found += [p for p in positions if flags[str(p)] > 0]
        if self.wants_more:
            logger.info("round %d: scores differ in %d of %d groups; drawing more", self.rounds, *self._tally())

    def _tally(self) -> tuple[int, int]:
        return len(self._found), self._size
