"""Log-probs of labels, forward and backward, at 151,936 tokens of vocabulary: ours against plain log_softmax.

4,096 positions, hidden size 256, fp32, a one-rank gloo group. Ours also returns entropies. Cases: `time`, both sides
by turns in one process; `memory`, each side alone in a fresh process: its peak resident memory above what it was before
the call, outputs and gradients included.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench import common

CASES = ("memory", "time")
VOCABULARY, POSITIONS, HIDDEN = 151_936, 4096, 256
MAX_GAP = 1e-4
GIB = 1 << 30


def main() -> None:
    """Measure the cases that were asked for."""
    parser = common.parser(__doc__, CASES)
    parser.add_argument("--threads", type=int, default=common.CORES, help="of torch (default: all cores)")
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="hidden size (default: %(default)s)")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    common.bind_threads()
    if args.side:
        print(peak_bytes(args.side, args))
        return
    setting = (
        f"vocabulary {VOCABULARY:,}, {POSITIONS:,} positions, hidden {args.hidden}, fp32, forward and backward, "
        f"1 rank x {args.threads} threads, bound to cores"
    )
    cases = []
    if "memory" in (names := common.chosen(args, CASES)):
        sides = [lambda side=side: fresh_process(side, args) / GIB for side in ("ours", "peer")]
        pairs = common.alternate(*sides, args.pairs, warm_up=False)
        what = "; peak resident memory of a fresh process above that before the call"
        cases.append(common.case("memory", pairs, "GiB", setting + what, more_is_better=False))
    if "time" in names:
        ours, peer = build("ours", args), build("peer", args)
        gap = (ours() - peer()).abs().max()
        if gap > MAX_GAP:
            raise SystemExit(f"our log-probs and log_softmax's differ by {float(gap):.2e}")
        pairs = common.alternate(seconds(ours), seconds(peer), args.pairs, warm_up=False)
        cases.append(common.case("time", pairs, "s", f"{setting}; they agree to {gap:.0e}", more_is_better=False))
    common.finish("logprobs", cases, args)


def build(side: str, args: argparse.Namespace) -> Callable[[], object]:
    """Return one forward and backward of a side; it returns the log-probs [POSITIONS]."""
    import torch

    from megatron_vlmr1.runtime import distributed

    torch.set_num_threads(args.threads)
    if not torch.distributed.is_initialized():
        distributed.start(60)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(POSITIONS, args.hidden, generator=generator).requires_grad_()
    weight = torch.randn(VOCABULARY, args.hidden, generator=generator).mul_(0.05).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (POSITIONS,), generator=generator)
    upstream = torch.randn(POSITIONS, generator=generator) / POSITIONS

    def plain() -> torch.Tensor:
        table = torch.log_softmax(hidden @ weight.t(), dim=-1)
        return table.gather(1, labels[:, None])[:, 0]

    def own() -> torch.Tensor:
        return token_logprobs(hidden, weight, labels, vocabulary)[0]

    if side == "ours":
        from megatron_vlmr1.models.logprobs import Vocabulary, token_logprobs

        vocabulary = Vocabulary(VOCABULARY, VOCABULARY, [], torch.distributed.group.WORLD, torch.device("cpu"))

    def run() -> torch.Tensor:
        hidden.grad = weight.grad = None
        found = own() if side == "ours" else plain()
        found.backward(upstream)
        return found.detach()

    return run


def seconds(side: Callable[[], object]) -> Callable[[], float]:
    """Return a measurement of `side`."""

    def measure() -> float:
        start = time.perf_counter()
        side()
        return time.perf_counter() - start

    return measure


def peak_bytes(side: str, args: argparse.Namespace) -> int:
    """Run one side and return how far the process's peak resident memory rose above what it was just before."""
    import psutil

    run = build(side, args)
    before = psutil.Process().memory_info().rss
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def fresh_process(side: str, args: argparse.Namespace) -> float:
    """Return `peak_bytes` of a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--threads", str(args.threads), "--hidden", str(args.hidden)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own program
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
