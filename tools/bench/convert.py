"""Checkpoint conversion on this machine's disk, beside `cp`, fsync and the sha256 of the copy of the same files.

A random bf16 checkpoint with the shapes of a 7B model, and as many of its layers as `--gigabytes` hold. Cases: `export`
to Hugging Face shards, `export_torch_dist` to a megatron-core checkpoint, `import` of that one. Each run of ours is a
fresh process, whose imports are not timed; source files are dropped from the page cache before each run of either side.
The peer's sha256 is OpenSSL's, which is faster than the program `sha256sum`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench import common

if TYPE_CHECKING:
    import torch

    from megatron_vlmr1.checkpoint.tensorfile import Entry

CASES = ("export", "export_torch_dist", "import")
CONFIG = common.ROOT / "configs" / "model" / "qwen2.5-vl-7b"
GB = 10**9
MAX_PEAK_BYTES = 3 * GB


def main() -> None:
    """Measure the cases that were asked for, or do one run of ours and print its seconds and peak bytes."""
    args = arguments()
    if args.run:
        print(json.dumps(run(args.run[0], Path(args.run[1]), Path(args.run[2]))))
        return
    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=args.folder) as folder:
        cases = measure(Path(folder), args)
    common.finish("convert", cases, args)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options, the process's own by default."""
    parser = common.parser(__doc__, CASES)
    parser.add_argument("--gigabytes", type=float, default=8, help="of the checkpoint (default: %(default)s)")
    parser.add_argument("--config", type=Path, default=CONFIG, help="directory with config.json (default: 7B)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's temporary one)")
    parser.add_argument("--run", nargs=3, metavar=("CASE", "SOURCE", "OUT"), help=argparse.SUPPRESS)
    return parser.parse_args(words)


def measure(folder: Path, args: argparse.Namespace) -> list[common.Case]:
    """Return the cases that were asked for, measured in an empty folder.

    Raises:
        SystemExit: a run of ours took more memory than it may.
    """
    hf, megatron = folder / "hf", folder / "megatron"
    layers = write_model(hf, args.config, round(args.gigabytes * GB))
    common.note(f"{weight_bytes(hf) / GB:.2f} GB, {layers} layers")
    if "import" in (names := common.chosen(args, CASES)):
        fresh_process("export_torch_dist", hf, megatron)
    cases = []
    for name in names:
        source = megatron if name == "import" else hf
        peaks: list[int] = []
        sides = ours(name, source, folder / "out", peaks), peer(source, folder / "copy")
        pairs = common.alternate(*sides, args.pairs, warm_up=False)
        if (peak := max(peaks)) > MAX_PEAK_BYTES:
            raise SystemExit(f"{name}: peak resident memory {peak / GB:.2f} GB; limit {MAX_PEAK_BYTES / GB:.0f} GB")
        size, text = weight_bytes(source) / GB, "peer: cp, fsync, sha256"
        setting = f"{size:.2f} GB bf16, {layers} layers; peak memory of ours {peak / GB:.2f} GB; {text}"
        cases.append(common.case(name, pairs, "GB/s", setting, more_is_better=True))
    return cases


def ours(name: str, source: Path, out: Path, peaks: list[int]) -> Callable[[], float]:
    """Return a measurement of a conversion, GB/s; it adds its peak bytes to `peaks`."""

    def measure() -> float:
        forget(source)
        found = fresh_process(name, source, out)
        shutil.rmtree(out)
        peaks.append(found["peak"])
        return weight_bytes(source) / GB / found["seconds"]

    return measure


def peer(source: Path, out: Path) -> Callable[[], float]:
    """Return a measurement of copying a checkpoint's weight files and hashing the copies, GB/s."""

    def measure() -> float:
        forget(source)
        out.mkdir()
        start = time.perf_counter()
        subprocess.run(["cp", *map(str, weight_files(source)), str(out)], check=True)  # noqa: S603, S607
        for path in out.iterdir():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
                hashlib.file_digest(stream, "sha256")
        seconds = time.perf_counter() - start
        shutil.rmtree(out)
        return weight_bytes(source) / GB / seconds

    return measure


def fresh_process(name: str, source: Path, out: Path) -> dict[str, Any]:
    """Return what `run` finds in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--run", name, str(source), str(out)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own program
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(name: str, source: Path, out: Path) -> dict[str, float]:
    """Convert once; return seconds, and this process's peak resident bytes, imports included."""
    from megatron_vlmr1.checkpoint.release import export
    from megatron_vlmr1.checkpoint.torch_dist import export_torch_dist, import_torch_dist

    work = {"export": export, "export_torch_dist": export_torch_dist, "import": import_torch_dist}[name]
    start = time.perf_counter()
    work(source, out)
    return {"seconds": time.perf_counter() - start, "peak": peak_bytes()}


def peak_bytes() -> int:
    """Return this program's peak resident memory; `getrusage` would count what its parent held when it forked, too."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))) * 1024


def weight_files(directory: Path) -> list[Path]:
    """Return the files of a checkpoint that hold its tensors."""
    return sorted([*directory.rglob("*.safetensors"), *directory.rglob("*.distcp")])


def weight_bytes(directory: Path) -> int:
    """Return how many bytes these files have."""
    return sum(path.stat().st_size for path in weight_files(directory))


def forget(directory: Path) -> None:
    """Drop a checkpoint's files from the page cache."""
    for path in weight_files(directory):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())  # dirty pages would stay
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_model(directory: Path, config: Path, nbytes: int) -> int:
    """Write a random checkpoint of at most so many bytes, or little more; return how many layers it has."""
    from megatron_vlmr1.checkpoint import release, writer

    (side := directory.with_name(directory.name + "-side")).mkdir()
    settings = fitted(json.loads((config / "config.json").read_bytes()), nbytes, side)
    release.publish(Random(side), side, directory, None, writer.MAX_SHARD_BYTES, {}, lambda done, total: None)
    return int(settings.get("text_config", settings)["num_hidden_layers"])


def fitted(config: dict[str, Any], nbytes: int, side: Path) -> dict[str, Any]:
    """Write a config.json with as many layers as fit, and return it.

    Where not even one fits, vocabulary and tower are halved until it does, or nothing is left to halve.
    """
    text, vision = config.get("text_config", config), config["vision_config"]
    whole = int(text["num_hidden_layers"])

    def size(layers: int) -> int:
        text["num_hidden_layers"] = layers
        (side / "config.json").write_text(json.dumps(config))
        return sum(entry.nbytes for entry in Random(side).entries.values())

    while size(1) > nbytes and vision["depth"] > 1:
        text["vocab_size"] //= 2
        vision["depth"] //= 2
        vision["fullatt_block_indexes"] = [i for i in vision["fullatt_block_indexes"] if i < vision["depth"]]
    one, two = size(1), size(2)
    size(max(1, min(whole, 1 + (nbytes - one) // (two - one))))
    return config


class Random:
    """Random bf16 tensors of the model that a config.json describes, made piece by piece (a `release.Source`)."""

    def __init__(self, directory: Path) -> None:
        import numpy as np
        import torch

        from megatron_vlmr1.checkpoint.tensorfile import Entry
        from megatron_vlmr1.models import families

        self.directory = directory
        shape = families.read_shape(directory)
        sizes = families.of(shape).tensor_shapes(shape)
        self.entries = {name: Entry(name, size, torch.bfloat16) for name, size in sizes.items()}
        self._rng = np.random.default_rng(0)

    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self.entries)

    def entry(self, name: str, dtype: torch.dtype | None = None) -> Entry:
        """Return a tensor's name, shape and type."""
        assert dtype is None
        return self.entries[name]

    def pieces(self, name: str, nbytes: int) -> Iterator[torch.Tensor]:
        """Make a tensor of random bits in pieces of at most so many bytes (or one row)."""
        import torch

        from megatron_vlmr1.checkpoint.tensorfile import row_ranges

        rest = self.entries[name].shape[1:]
        for start, stop in row_ranges(self.entries[name], nbytes):
            bits = bytearray(self._rng.bytes((stop - start) * prod(rest) * 2))
            yield torch.frombuffer(bits, dtype=torch.bfloat16).view(stop - start, *rest)

    def files(self) -> list[Path]:
        """Return nothing: they are in no file."""
        return []


if __name__ == "__main__":
    main()
