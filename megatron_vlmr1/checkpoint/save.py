"""One checkpoint on its way to the disk: the weights' and the state's files, by all ranks, now or in threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.optimizer import MegatronOptimizer

from megatron_vlmr1.checkpoint import state, writer
from megatron_vlmr1.checkpoint.background import Writes
from megatron_vlmr1.checkpoint.sharded import Sharded
from megatron_vlmr1.checkpoint.staging import Staging
from megatron_vlmr1.checkpoint.store import Listing
from megatron_vlmr1.models.policy import Policy
from megatron_vlmr1.runtime import distributed


class Save:
    """Writes a checkpoint's files below a temporary directory; all ranks call every method.

    `stage` has all of the collectives that concern tensors. With staging memory it also copies whatever is to be
    written, so that training may go on while threads write; without it every file is written on the way.
    """

    def __init__(self, temporary: Path, policy: Policy, staging: Staging | None) -> None:
        self.temporary, self._policy, self._staging = temporary, policy, staging
        self._writes = Writes(temporary, later=staging is not None)
        self._sharded: Sharded | None = None

    def stage(self, optimizer: MegatronOptimizer, source: Path, progress: dict[str, Any], kind: str) -> None:
        """Gather and copy, then write or begin to.

        Args:
            optimizer: of the policy.
            source: the Hugging Face directory of config, tokenizer and processor files.
            progress: what `state.load` returns again.
            kind: of the optimizer's format, as in `state.sharding`.

        Raises:
            OSError: some rank could not begin; the same line on every rank.
        """
        if self._staging is not None:
            self._staging.begin()
        hf, other = self.temporary / "hf", self.temporary / "state"
        writer.stage(self._policy.chunks, source, hf, self._writes, self._staging)
        self._sharded = state.stage(self._policy, optimizer, progress, other, kind, self._writes, self._staging)
        if self._staging is not None:
            self._staging.settle()
        self._writes.start()

    def done(self) -> bool:
        """Whether every rank has written its part, or failed to; a collective."""
        return not distributed.any_rank(not self._writes.done())

    @property
    def seconds(self) -> float:
        """How long this rank's part took, from the beginning to the disk."""
        return self._writes.seconds

    def finish(self) -> Listing:
        """Wait until every rank has written its part, and complete it.

        Returns:
            On the first rank, what `Store.publish` wants as proven; nothing elsewhere.

        Raises:
            OSError: some rank could not write; the same line on every rank.
        """
        assert self._sharded is not None
        problem, listing = self._writes.wait()
        distributed.agree(problem)
        everyone = distributed.gathered((listing, self._sharded.results))
        out: Listing = {}
        distributed.together(lambda: out.update(self._complete(everyone)), only_first=True)
        return out

    def _complete(self, everyone: list[tuple[Listing, list[Any]]]) -> Listing:
        assert self._sharded is not None
        self._sharded.finish([results for _, results in everyone])
        renamed = writer.finish(self.temporary / "hf", self._policy.shape)
        names = {f"hf/{old}": f"hf/{new}" for old, new in renamed.items()}
        return {names.get(name, name): entry for listing, _ in everyone for name, entry in listing.items()}
