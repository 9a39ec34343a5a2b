"""Saving checkpoints on this machine's disk, by data-parallel ranks of a model in fp32 training (16 bytes a parameter).

Cases: `async`, the seconds that training waits for a save that threads write (staging, then publishing once they are
done; in between it multiplies matrices, which is not counted), beside a save at once; `dp_reshardable`, the seconds of
saving the optimizer, generators and position in that format, beside `fully_reshardable`. Memory is each rank's largest
resident growth during a save, the largest of all saves and ranks.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench import common

CASES = ("async", "dp_reshardable")
TEXT: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
}
MB = 10**6


def main() -> None:
    """Measure the cases that were asked for, or be one of the ranks that do."""
    args = arguments()
    if args.run:
        be_a_rank(args.run, args)
        return
    from megatron_vlmr1.launch.local import log_path, run_ranks

    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=args.folder) as name:
        folder = Path(name)
        words = [*sys.argv[1:], "--run", str(folder)]
        code = run_ranks(args.ranks, [sys.executable, __file__, *words], folder / "logs", {"CUDA_VISIBLE_DEVICES": ""})
        if code:
            raise SystemExit(log_path(folder / "logs", 0).read_text()[-3000:])
        found = json.loads((folder / "found.json").read_text())
    cases = [common.case(name, found[name]["pairs"], "s", found[name]["setting"], False) for name in found]
    common.finish("checkpoint", cases, args)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Return the options, the process's own by default."""
    parser = common.parser(__doc__, CASES)
    parser.add_argument("--ranks", type=int, default=2, help="data-parallel (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="of 3 million parameters (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's temporary one)")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def be_a_rank(folder: Path, args: argparse.Namespace) -> None:
    """Measure together with the other ranks; the first one writes ``found.json``."""
    from megatron_vlmr1.runtime import distributed
    from tools.bench import tiny

    with tiny.mesh(threads=1) as mesh:
        source = folder / "source"
        distributed.together(lambda: tiny.write_model(source, num_hidden_layers=args.layers, **TEXT), only_first=True)
        side = Side(folder, source, mesh)
        found = {}
        for name in common.chosen(args, CASES):
            ours, peer = side.sides(name)
            pairs = common.alternate(ours, peer, args.pairs)
            found[name] = {"pairs": pairs, "setting": side.setting(name) if mesh.rank == 0 else ""}
        if mesh.rank == 0:
            (folder / "found.json").write_text(json.dumps(found))


class Side:
    """A policy in training, and how it is saved."""

    def __init__(self, folder: Path, source: Path, mesh: Any) -> None:
        from megatron_vlmr1.config import OptimizerConfig
        from megatron_vlmr1.parallel import optimizer as parallel_optimizer
        from tools.bench import tiny

        self.folder, self.mesh = folder, mesh
        policy = tiny.policy(source, mesh)
        self.optimizer = parallel_optimizer.build(OptimizerConfig(), policy.wrap_for_training())
        self.actor: Any = SimpleNamespace(policy=policy, directory=source)
        self.parameters = sum(p.numel() for chunk in policy.chunks for p in chunk.parameters())
        self.growth: dict[str, float] = {}  # MB, by the name of a way to save
        self.kept: dict[str, Any] = {}
        self.bytes: dict[str, float] = {}  # of the last save, MB

    def sides(self, name: str) -> tuple[Callable[[], float], Callable[[], float]]:
        """Return our side of a case and the other."""
        if name == "async":
            return (lambda: self.whole("async", True)), (lambda: self.whole("at once", False))
        return (lambda: self.state("dp_reshardable")), (lambda: self.state("fully_reshardable"))

    def setting(self, name: str) -> str:
        """Say what was measured."""
        ways = ("async", "at once") if name == "async" else ("dp_reshardable", "fully_reshardable")
        memory = ", ".join(f"{way} +{self.growth[way]:.0f} MB" for way in ways)
        size = ", ".join(f"{self.bytes[way]:.0f} MB" for way in ways)
        return f"{self.parameters / 1e6:.0f} M parameters, {self.mesh.world} ranks; written {size}; memory {memory}"

    def whole(self, way: str, later: bool) -> float:
        """Save a whole checkpoint; return the seconds that training waits."""
        import torch
        import torch.distributed as dist

        from megatron_vlmr1 import config
        from megatron_vlmr1.train.checkpoints import Checkpoints

        run = self.folder / "run"
        raw = {"run_dir": str(run), "model": {"path": "none"}, "data": {"train": "none"}}
        if way not in self.kept:  # with its memory, as in a run
            cfg = config.parse({**raw, "train": {"async_save": later}}, "bench")
            self.kept[way] = Checkpoints(cfg, self.mesh)
        checkpoints = self.kept[way]
        a = torch.ones(256, 256)
        waited = 0.0
        with self.memory(way):
            start = time.perf_counter()
            checkpoints.save(self.actor, self.optimizer, {"step": 1}, {})
            waited += time.perf_counter() - start
            while checkpoints.under_way:
                for _ in range(50):
                    a = (a @ a).clamp_(0, 1)
                dist.barrier()  # as ranks meet in a step
                start = time.perf_counter()
                checkpoints.poll()
                waited += time.perf_counter() - start
        self.tidy(way, run)
        return waited

    def state(self, kind: str) -> float:
        """Save the training state; return the seconds."""
        from megatron_vlmr1.checkpoint import state
        from megatron_vlmr1.runtime import distributed

        out = self.folder / "state"
        distributed.together(out.mkdir, only_first=True)
        with self.memory(kind):
            start = time.perf_counter()
            state.save(self.actor.policy, self.optimizer, {}, out, kind)
            seconds = time.perf_counter() - start
        self.tidy(kind, out)
        return seconds

    def tidy(self, way: str, path: Path) -> None:
        """Remove what was written, and note its size."""
        from megatron_vlmr1.runtime import distributed

        if self.mesh.rank == 0:
            self.bytes[way] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / MB
        distributed.together(lambda: shutil.rmtree(path), only_first=True)

    def memory(self, way: str) -> Growth:
        """Return a block that notes by how much this job's ranks grow in it."""
        return Growth(self.growth, way)


class Growth:
    """Notes the largest growth of any rank's resident memory within blocks of one name, in MB."""

    def __init__(self, notes: dict[str, float], way: str) -> None:
        self.notes, self.way = notes, way

    def __enter__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.before = resident("VmRSS")

    def __exit__(self, *_: object) -> None:
        import torch
        import torch.distributed as dist

        grown = torch.tensor([resident("VmHWM") - self.before])
        dist.all_reduce(grown, dist.ReduceOp.MAX)
        self.notes[self.way] = max(float(grown), self.notes.get(self.way, 0.0))


def resident(name: str) -> float:
    """Return a line of /proc/self/status, in MB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / MB


if __name__ == "__main__":
    main()
