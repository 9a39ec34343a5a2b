"""What all benchmarks share: alternating pairs, a case's figures, the table, the JSON lines, the results page."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
MIN_PAIRS = 5
CORES = len(os.sched_getaffinity(0))  # that this process may use; asked before threads are bound to some of them
RESULT = "found.json"  # what rank 0 of a benchmark of ranks writes
_PACKAGES = ("torch", "megatron-core", "transformers", "trl")


@dataclass(frozen=True)
class Case:
    """One comparison, as its JSON line gives it.

    Attributes:
        name: of the case within its benchmark.
        ours: median of our side, in `unit`.
        peer: median of the other side, in `unit`.
        ratio: how much better ours is; the median of the pairs' own ratios.
        low: the smallest of the pairs' ratios.
        high: the largest of the pairs' ratios.
        unit: of `ours` and `peer`.
        setting: what was run, in words.
    """

    name: str
    ours: float
    peer: float
    ratio: float
    low: float
    high: float
    unit: str
    setting: str

    def line(self) -> str:
        """Return the case as one line of JSON, numbers to six digits."""
        return json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in asdict(self).items()})


def alternate(
    ours: Callable[[], float], peer: Callable[[], float], count: int, warm_up: bool = True
) -> list[tuple[float, float]]:
    """Measure both sides `count` times by turns, after one unmeasured turn of each.

    Which side goes first changes from pair to pair, so that a drift of the machine favours neither.

    Args:
        ours: runs our side once and returns its figure.
        peer: the same of the other side.
        count: pairs.
        warm_up: whether to run both once beforehand.

    Returns:
        `count` pairs (ours, peer).
    """
    if warm_up:
        ours(), peer()
    pairs = []
    for i in range(count):
        if i % 2 == 0:
            a = ours()
            b = peer()
        else:
            b = peer()
            a = ours()
        pairs.append((a, b))
        note(f"pair {i + 1} of {count}: ours {a:.4g}, peer {b:.4g}")
    return pairs


def by_ranks(script: str, ranks: int, words: Sequence[str]) -> Any:
    """Run a benchmark's own `script` as ranks with a thread each, and return what its rank 0 wrote as JSON.

    The ranks are told ``--rank-of FOLDER`` and `words`, and rank 0 writes ``FOLDER/RESULT``.

    Raises:
        SystemExit: a rank failed.
    """
    from megatron_vlmr1.launch.local import run_ranks

    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, script, "--rank-of", name, *words]
        if code := run_ranks(ranks, command, Path(name) / "logs", {"OMP_NUM_THREADS": "1"}):
            raise SystemExit(f"a rank left with exit code {code}")
        return json.loads((Path(name) / RESULT).read_bytes())


def case(name: str, pairs: Sequence[tuple[float, float]], unit: str, setting: str, more_is_better: bool) -> Case:
    """Return the figures of a case from its pairs (ours, peer)."""
    ratios = [ours / peer if more_is_better else peer / ours for ours, peer in pairs]
    return Case(
        name=name,
        ours=float(statistics.median(ours for ours, _ in pairs)),
        peer=float(statistics.median(peer for _, peer in pairs)),
        ratio=float(statistics.median(ratios)),
        low=float(min(ratios)),
        high=float(max(ratios)),
        unit=unit,
        setting=setting,
    )


def parser(description: str | None, cases: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    out = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--json", action="store_true", help="one line of JSON a case on stdout, all else on stderr")
    out.add_argument("--pairs", type=int, default=MIN_PAIRS, metavar="N", help="by turns (default: %(default)s)")
    out.add_argument("--case", choices=cases, action="append", metavar="NAME", help=f"only this one of {list(cases)}")
    out.add_argument("--write", action="store_true", help="put the figures into docs/results/bench.{json,md}")
    return out


def bind_threads() -> None:
    """Keep each thread of both sides on a core of its own; for a benchmark of one process, before torch is loaded.

    Threads that the system moves about change the time of small kernels by a third from one run to the next.
    """
    assert "torch" not in sys.modules
    os.environ.setdefault("OMP_PROC_BIND", "true")


def chosen(args: argparse.Namespace, cases: Sequence[str]) -> list[str]:
    """Return the cases that were asked for, all of them unless `--case` names some."""
    return [name for name in cases if not args.case or name in args.case]


def note(text: str) -> None:
    """Say something about progress, on stderr."""
    print(f"[bench] {text}", file=sys.stderr, flush=True)


def finish(bench: str, cases: Sequence[Case], args: argparse.Namespace) -> None:
    """Print the table (to stderr with `--json`) and then the JSON lines; write the results where asked to."""
    Console(stderr=args.json, width=None if sys.stdout.isatty() else 140).print(table(bench, cases))
    if args.write:
        write(bench, cases, RESULTS)
    for each in cases:
        print(each.line(), flush=True)


def table(bench: str, cases: Sequence[Case]) -> Table:
    """Return the cases as a table."""
    out = Table(title=f"{bench}: {cpu_name()}, {CORES} cores")
    for heading in ("case", "ours", "peer", "unit", "times better", "low to high", "setting"):
        out.add_column(heading, justify="right" if heading in ("ours", "peer", "times better") else "left")
    for c in cases:
        spread = f"{c.low:.2f} to {c.high:.2f}"
        out.add_row(c.name, f"{c.ours:.4g}", f"{c.peer:.4g}", c.unit, f"{c.ratio:.2f}", spread, c.setting)
    return out


def write(bench: str, cases: Sequence[Case], directory: Path) -> None:
    """Replace these cases in ``bench.json`` and make ``bench.md`` anew."""
    path = directory / "bench.json"
    results: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    held = results.setdefault(bench, {})
    for each in cases:
        held[each.name] = {**json.loads(each.line()), "machine": machine(), "versions": versions()}
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    (directory / "bench.md").write_text(markdown(results))


def markdown(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return the results page."""
    lines = [
        "# Benchmarks",
        "",
        "Both sides by turns on one machine. The ratio is how much better ours is: the median of the alternating pairs,"
        " then the smallest and the largest. `python tools/bench/NAME.py --write` measures a part anew.",
    ]
    for bench in sorted(results):
        cases = results[bench].values()
        facts = {(c["machine"], ", ".join(f"{k} {v}" for k, v in c["versions"].items())) for c in cases}
        lines += ["", f"## {bench}.py", "", "| case | ours | peer | unit | ratio | low to high | setting |"]
        lines.append("|---|---:|---:|---|---:|---|---|")
        for c in cases:
            lines.append(
                f"| {c['name']} | {c['ours']:.4g} | {c['peer']:.4g} | {c['unit']} | **{c['ratio']:.2f}** | "
                f"{c['low']:.2f} to {c['high']:.2f} | {c['setting']} |"
            )
        lines += ["", *(f"Measured on {where}; {what}." for where, what in sorted(facts))]
    return "\n".join(lines) + "\n"


def machine() -> str:
    """Return what the figures were taken on."""
    return f"{cpu_name()}, {CORES} cores, {platform.machine()}, Python {platform.python_version()}"


def versions() -> dict[str, str]:
    """Return the versions of the libraries that take part and are installed."""
    out = {}
    for name in _PACKAGES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


def cpu_name() -> str:
    """Return the processor's model name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"
