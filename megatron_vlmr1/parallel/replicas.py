"""Whether what several ranks hold in common is the same on all of them, and what one rank holds has stayed as it was.

Data-parallel ranks hold the same parameters, and tensor-parallel ranks those that are not split among them (norms, the
vision tower). The distributed optimizer gathers every parameter anew from its one fp32 master, so a copy that was
damaged heals at the next step, after it was trained on: it must be found before the forward pass. Masters and Adam's
moments have no copy; their checksums are compared with those taken after the last optimizer step.

Not compared are the two copies of a tied embedding on the first and the last pipeline stage, which are updated apart.
"""

from __future__ import annotations

import socket
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megatron_vlmr1.errors import STOPPED, RunStopped
from megatron_vlmr1.parallel.exchange import gather_numbers
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.parallel.optimizer import states
from megatron_vlmr1.runtime import device, distributed

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number
_MOMENTS = ("exp_avg", "exp_avg_sq")
# Numbers that are weighed at a time: on a CPU so many that they stay in its cache, on a GPU enough to fill it.
_CPU_CHUNK, _CUDA_CHUNK = 1 << 16, 1 << 22


class Replicas:
    """Compares copies over the ranks, and a rank's own optimizer state over time; all ranks call every method."""

    def __init__(self, chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, mesh: Mesh, every: int) -> None:
        """Take what is to be compared; `every` is in optimizer steps, 0 never compares."""
        prefixes = [f"chunk {i}: " if len(chunks) > 1 else "" for i in range(len(chunks))]
        named = [(pre + name, p) for pre, c in zip(prefixes, chunks, strict=True) for name, p in c.named_parameters()]
        self._names, self._parameters = [name for name, _ in named], [p for _, p in named]
        self._name_of = {id(p): name for name, p in named}
        shared = [i for i, p in enumerate(self._parameters) if not getattr(p, "tensor_model_parallel", False)]
        self._shared = torch.tensor(shared, dtype=torch.int64, device=device.device())
        self._optimizer, self._mesh, self._every = optimizer, mesh, every
        self._steps = 0
        self._held: torch.Tensor | None = None  # checksums of the optimizer state after the last step

    def remember(self) -> None:
        """Take the checksums of the optimizer state; to be called when it is new: after each step, after a restore."""
        self._steps += 1
        self._held = checksums(t for _, t in self._optimizer_state()) if self._due else None

    def check(self, state: bool = False, always: bool = False) -> None:
        """Compare the parameters, and with `state` the optimizer state too, where this step is to be checked.

        Args:
            state: before training or saving; what generates does not use it.
            always: even where `every` leaves this step out (before a save).

        Raises:
            RunStopped: something differs (exit code 17); names rank, host and parameter. On all ranks.
        """
        if not self._every or not (always or self._due):
            return
        for chunk in (chunk for inner in self._optimizer.chained_optimizers for chunk in inner.model_chunks):
            chunk.settle()
        sums = checksums(self._parameters)
        held = self._held if state else None
        now = None if held is None else checksums(t for _, t in self._optimizer_state())
        changed = held is not None and now is not None and not torch.equal(now, held)
        rows = self._gathered(torch.stack([_fold(sums), _fold(sums[self._shared])]), changed)
        if wrong := {rank for rank, row in enumerate(rows) if row[-1]}:
            name = self._first_changed(now) if self._mesh.rank in wrong else ""
            self._stop(wrong, name, "is not what the last step left there")
        by_place = ((0, 1), 3, range(len(sums))), ((1, 2), 4, self._shared.tolist())
        found = [each for place, column, indices in by_place for each in _unlike(rows, place, column, indices)]
        if found:
            tables = gather_numbers(sums.tolist(), dist.group.WORLD)  # type: ignore[arg-type]  # the world's
            first = found[0]
            name = self._first_unlike(tables, first) if self._mesh.rank in first.ranks else ""
            suspects = set.intersection(*(f.suspects for f in found)) or first.suspects
            self._stop(suspects, name, "differs from the other copies", among=first.ranks)

    @property
    def _due(self) -> bool:
        return bool(self._every) and self._steps % self._every == 0

    def _optimizer_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield this rank's masters and moments, with their names."""
        for parameter, state in states(self._optimizer):
            name, master = self._name_of[id(parameter)], state["master"]
            assert master.untyped_storage().nbytes() or not master.numel(), "it was moved to host memory"
            yield f"the fp32 master of {name}", master
            for kind in _MOMENTS:  # zeros before the first step, whether they are there yet or not
                yield f"{kind} of {name}", state.get(kind, master.new_zeros(1))

    def _gathered(self, digests: torch.Tensor, changed: bool) -> list[list[int]]:
        """Return every rank's (tp_rank, pp_rank, dp_rank, digest, digest of what is not split, changed)."""
        mesh = self._mesh
        place = torch.tensor([mesh.tp_rank, mesh.pp_rank, mesh.dp_rank], device=digests.device)
        row = torch.cat([place, digests, torch.tensor([int(changed)], device=digests.device)])
        return [list(map(int, row)) for row in distributed.every_row(row).tolist()]

    def _first_changed(self, now: torch.Tensor | None) -> str:
        assert now is not None and self._held is not None
        names = [name for name, _ in self._optimizer_state()]
        return next(name for name, a, b in zip(names, now.tolist(), self._held.tolist(), strict=True) if a != b)

    def _first_unlike(self, tables: Sequence[Sequence[int]], found: _Unlike) -> str:
        return next(self._names[i] for i in found.indices if len({tables[rank][i] for rank in found.ranks}) > 1)

    def _stop(self, suspects: set[int], name: str, what: str, among: Iterable[int] = ()) -> None:
        """End the run, with the name that the first suspect knows, or else another of the ranks that compared."""
        knows = min(suspects & set(among) or set(among) or suspects)
        name = distributed.broadcast_text(name, knows)
        hosts = {rank: distributed.broadcast_text(socket.gethostname(), rank) for rank in sorted(suspects)}
        unknown = len(suspects) > 1 and suspects == set(among)  # which of them it is
        ranks = (" or " if unknown else " and ").join(f"rank {rank} on {host}" for rank, host in hosts.items())
        raise RunStopped(STOPPED, f"{name} {what}: {'either ' * unknown}{ranks}; nothing was trained on it or saved")


class _Unlike(NamedTuple):
    """Ranks that should hold the same and do not."""

    ranks: tuple[int, ...]
    suspects: set[int]  # those that differ from most, or all of them where there is no majority
    indices: Sequence[int]  # of the parameters that they hold in common


def _unlike(
    rows: Sequence[Sequence[int]], place: tuple[int, int], column: int, indices: Sequence[int]
) -> Iterator[_Unlike]:
    """Yield the groups of ranks, alike in the columns `place`, that are not alike in `column`."""
    groups: dict[tuple[int, ...], dict[int, int]] = defaultdict(dict)
    for rank, row in enumerate(rows):
        groups[row[place[0]], row[place[1]]][rank] = row[column]
    for digests in groups.values():
        (commonest, count), *others = Counter(digests.values()).most_common()
        if others:
            majority = 2 * count > len(digests)
            odd = {rank for rank, digest in digests.items() if not majority or digest != commonest}
            yield _Unlike(tuple(digests), odd, indices)


@torch.no_grad()
def checksums(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return a checksum of each tensor's bits, int64 [n], on the device that trains.

    The bits are read as integers, each weighed with an odd number that grows with its place, and summed modulo 2^64. So
    a change of any one number is seen, as are two numbers that changed places.
    """
    sums = [_checksum(t) for t in tensors]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64, device=device.device())


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    words = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
    size = _CUDA_CHUNK if words.is_cuda else _CPU_CHUNK
    weights = _weights(size, words.device)
    total = (words[:size] * weights[: len(words)]).sum()
    for start in range(size, len(words), size):
        part = words[start : start + size]
        total += (part * weights[: len(part)]).sum() + 2 * start * part.sum()
    return total


@cache
def _weights(size: int, where: torch.device) -> torch.Tensor:
    return torch.arange(1, 2 * size, 2, device=where)


def _fold(sums: torch.Tensor) -> torch.Tensor:
    """Return one checksum of several."""
    return (sums * torch.arange(1, 2 * len(sums), 2, device=sums.device)).sum()
