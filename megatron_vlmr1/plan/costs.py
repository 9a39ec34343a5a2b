"""Seconds and bytes of what a device does: matrix products, memory traffic, collectives. A roofline each.

A matrix product takes the longer of its FLOPs at the share of the peak that its size class reaches and its bytes at
the memory's rate (S. Williams et al., "Roofline", CACM 52(4), 2009). Collectives are rings (R. Thakur et al.,
"Optimization of Collective Communication Operations in MPICH", 2005): an all-gather or reduce-scatter of n bytes over
p ranks sends (p - 1) / p * n from each and takes p - 1 hops; an all-reduce is both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from megatron_vlmr1.plan.hardware import Hardware, Link

_LARGE, _MEDIUM = 2048, 512  # least dimensions of the size classes of `plan.hardware.Efficiency`
ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp8": 2}  # of an activation or weight; fp8 is what products are computed in


@dataclass(frozen=True)
class Cost:
    """Seconds by what takes them, and bytes that a rank sends by (link, what for)."""

    seconds_by_part: Mapping[str, float] = field(default_factory=dict)
    sent_bytes: Mapping[tuple[Link, str], float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """All of them."""
        return sum(self.seconds_by_part.values())

    def __add__(self, other: Cost) -> Cost:
        """Return one after the other."""
        return total((self, other))

    def __mul__(self, times: float) -> Cost:
        """Return it so many times."""
        return Cost(
            {part: seconds * times for part, seconds in self.seconds_by_part.items()},
            {key: count * times for key, count in self.sent_bytes.items()},
        )

    def without(self, *parts: str) -> Cost:
        """Return it with some parts' seconds hidden behind others; their bytes are still sent."""
        return Cost({k: v for k, v in self.seconds_by_part.items() if k not in parts}, self.sent_bytes)


NOTHING = Cost()


def total(costs: Iterable[Cost]) -> Cost:
    """Return all of them, one after the other."""
    seconds: dict[str, float] = {}
    sent: dict[tuple[Link, str], float] = {}
    for cost in costs:
        for part, value in cost.seconds_by_part.items():
            seconds[part] = seconds.get(part, 0.0) + value
        for key, count in cost.sent_bytes.items():
            sent[key] = sent.get(key, 0.0) + count
    return Cost(seconds, sent)


def slowest(costs: Iterable[Cost]) -> Cost:
    """Return the one that takes longest."""
    return max(costs, key=lambda cost: cost.seconds, default=NOTHING)


class Device:
    """One device that computes in one precision.

    Args:
        hardware: its numbers.
        precision: fp32, bf16 or fp8.
        graphs: whether the host's time for kernels of generation is saved (CUDA graphs), on CUDA.
    """

    def __init__(self, hardware: Hardware, precision: str, graphs: bool = False) -> None:
        """See the class.

        Raises:
            ValueError: the device has no such type.
        """
        self.hardware, self.graphs = hardware, graphs and hardware.device == "cuda"
        self.item = ITEM_BYTES[precision]
        self.rates = hardware.rates
        self._peak, self._shares = hardware.peak(precision), hardware.matmul_shares
        # Attention, the tower and the output layer stay in bf16 where layers are in fp8.
        self._plain = hardware.peak("bf16") if precision == "fp8" else self._peak
        self._attention = self._plain * hardware.efficiency.attention.value
        self._launch = hardware.overheads.launch_s.value
        self._latency = {
            "nvlink": hardware.overheads.nvlink_latency_s.value,
            "network": hardware.overheads.network_latency_s.value,
            "pcie": 0.0,
        }

    def products(self, sizes: Iterable[tuple[int, int, int]], rate: str = "memory", plain: bool = False) -> float:
        """Return seconds of matrix products [m, k] x [k, n], given as (m, n, k), one after another.

        Args:
            sizes: of each.
            rate: "decode" where weights are read for a few rows.
            plain: never in fp8.
        """
        seconds = 0.0
        peak, bandwidth = self._plain if plain else self._peak, self.rates[rate]
        for m, n, k in sizes:
            least = min(m, n, k)
            share = self._shares[0 if least >= _LARGE else 1 if least >= _MEDIUM else 2]
            moved = self.item * (m * k + k * n + m * n)
            seconds += max(2.0 * m * n * k / (peak * share), moved / bandwidth)
        return seconds

    def attention(self, pairs: float, width: int) -> float:
        """Return seconds of attention over useful (query, key) pairs, forward; `width` is heads x head size."""
        return 4.0 * pairs * width / self._attention

    def moved(self, count: float, rate: str = "memory") -> float:
        """Return seconds of so many bytes to and from memory."""
        return count / self.rates[rate]

    def with_launches(self, parts: dict[str, float], kernels: float, graphs: bool = False) -> dict[str, float]:
        """Add what the host needs to launch kernels: beside them on CUDA, where they queue; between them on a CPU."""
        host = 0.0 if graphs else kernels * self._launch
        if self.hardware.device == "cuda":
            host = max(0.0, host - sum(parts.values()))
        return {**parts, "launch": parts.get("launch", 0.0) + host}

    def all_gather(self, link: Link, ranks: int, count: float, what: str, on_node: int = 1) -> Cost:
        """Return what gathering `count` bytes in all, or reducing and scattering them, costs a rank.

        With `on_node` of the ranks on each node there are as many rings at a time, each of which leaves the node at
        another rank's adapter: a rank sends its part of one of them over the network, and of the others to neighbours.
        """
        if ranks == 1:
            return NOTHING
        sent = {link: count * (ranks - 1) / ranks}
        if link == "network" and on_node > 1:
            sent = {"network": sent[link] / on_node, "nvlink": sent[link] * (1 - 1 / on_node)}
        seconds = max(part / self.rates[way] for way, part in sent.items()) + (ranks - 1) * self._latency[link]
        return Cost({what: seconds}, {(way, what): part for way, part in sent.items()})

    def all_reduce(self, link: Link, ranks: int, count: float, what: str) -> Cost:
        """Return what summing `count` bytes over ranks costs a rank."""
        return self.all_gather(link, ranks, count, what) * 2

    def send(self, link: Link, count: float, what: str) -> Cost:
        """Return what passing on so many bytes costs."""
        return Cost({what: count / self.rates[link] + self._latency[link]}, {(link, what): count})
