"""The data stream: a worker beside a bare loop, our image processor beside transformers', start and seek at scale.

Cases: `worker`, prompts a second through stream, one worker process and shared memory, against a loop over our own
decode and preprocess function on the same JPEGs; `processor`, that function against transformers' PIL image processor,
bits equal, each in a process of its own, as what one frees changes what memory costs the other, ours without the copy
of a still's only frame, which the vision tower makes; `startup` and `seek`, on the index of a million samples, against
what was asked for: 2 s and 300 MB from opening to the first position, in a process of its own, and 50 ms to any other.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image

from megatron_vlmr1 import config
from megatron_vlmr1.checkpoint.locate import hf_directory
from megatron_vlmr1.data import reading
from megatron_vlmr1.data.images import ImageProcessor, pixel_values
from megatron_vlmr1.data.index import ShardIndex, ShardSet, index_path, write_index
from megatron_vlmr1.data.prompts import PromptBuilder
from megatron_vlmr1.data.shards import build
from megatron_vlmr1.data.stream import Stream
from megatron_vlmr1.data.tokens import VisionTokens, load_tokenizer
from megatron_vlmr1.rewards import tasks
from megatron_vlmr1.train import loader
from megatron_vlmr1.types import Damage
from tools.bench import common

CASES = ("worker", "processor", "startup", "seek")
SIZE = (640, 480)
PICTURES = 60
PASSES = 4  # over the pictures in a turn of the worker
AHEAD = 8
SHARD_BYTES = 4_000_000
MAX_PIXELS = 28 * 28 * 1280
SAMPLES, SHARDS = 1_000_000, 500
ASKED_START_S, ASKED_SEEK_S, ASKED_BYTES = 2.0, 0.05, 300e6
SEEKS = 200

_START = """
import json, re, sys, time
from megatron_vlmr1.data.index import ShardSet
from megatron_vlmr1.data.stream import Stream
started = time.perf_counter()
stream = Stream(ShardSet.open(sys.argv[1]), 0, 64, 1024, 0, 64)
stream.reference(stream.positions(64)[0])
seconds = time.perf_counter() - started
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())  # getrusage's is the parent's, if larger
print(json.dumps([seconds, 1024 * int(peak[1])]))
"""


_RATE = """
import io, pathlib, sys, time
from PIL import Image
side, folder, cap = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
jpegs = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
if side == "ours":
    from megatron_vlmr1.data.images import ImageProcessor
    process = ImageProcessor(max_pixels=cap).process
else:
    from transformers import Qwen2VLImageProcessorPil
    processor = Qwen2VLImageProcessorPil(max_pixels=cap)
    process = lambda data: processor(images=[Image.open(io.BytesIO(data))], return_tensors="np")["pixel_values"]
for data in jpegs:
    process(data)
started = time.perf_counter()
for data in jpegs:
    process(data)
print(len(jpegs) / (time.perf_counter() - started))
"""


def main() -> None:
    """Measure the cases that were asked for."""
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="bench-stream-") as folder:
        common.finish("stream", measure(Path(folder), args), args)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options, the process's own by default."""
    parser = common.parser(__doc__, CASES)
    parser.add_argument("--pictures", type=int, default=PICTURES, help="JPEGs of a turn (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of the large index (default: %(default)s)")
    return parser.parse_args(words)


def measure(folder: Path, args: argparse.Namespace) -> list[common.Case]:
    """Return the figures of the cases, made in an empty folder."""
    names = common.chosen(args, CASES)
    cases = []
    if {"worker", "processor"} & set(names):
        shards = ShardSet.open(pictures(folder, args.pictures))
        cases += [worker(shards, args.pairs)] if "worker" in names else []
        cases += [processor(folder, shards, args.pairs)] if "processor" in names else []
    if {"startup", "seek"} & set(names):
        directory = large_index(folder / "large", args.samples)
        cases += [startup(directory, args)] if "startup" in names else []
        cases += [seek(directory, args)] if "seek" in names else []
    return cases


def worker(shards: ShardSet, pairs: int) -> common.Case:
    """Measure prompts a second of one worker process; what it had ready at the start does not count."""
    checkpoint = hf_directory("asset:tiny_vlm", check=False)
    data = {"train": shards.place, "workers": 1, "prefetch": AHEAD, "max_pixels": MAX_PIXELS}
    cfg = config.parse({"model": {"path": "-"}, "data": data}, "bench")
    images = ImageProcessor.from_pretrained(checkpoint, None, MAX_PIXELS)
    tokens = VisionTokens.from_pretrained(checkpoint)
    render = tasks.get(cfg.task).render
    builder = PromptBuilder(load_tokenizer(checkpoint), images, render, None, cfg.data.max_prompt_tokens, tokens)
    stream = Stream(shards, 0, 8, 64, 0, 1)
    jpegs = compressed(shards)
    reader = loader.reader(stream, builder, cfg, checkpoint)

    def ours() -> float:
        started = time.perf_counter()
        for _ in range(PASSES * len(jpegs)):
            (item,) = reader.read(stream.take(1))
            assert not isinstance(item, Damage), item
        return (PASSES * len(jpegs) - AHEAD) / (time.perf_counter() - started)

    try:
        found = common.alternate(ours, lambda: rate(images.process, jpegs), pairs)
    finally:
        reader.close()
    setting = (
        f"{len(jpegs)} JPEGs of {SIZE[0]} x {SIZE[1]}, one worker, prompts through shared memory; peer: a bare loop"
    )
    return common.case("worker", found, "samples/s", setting, more_is_better=True)


def processor(folder: Path, shards: ShardSet, pairs: int) -> common.Case:
    """Measure images a second of decode and preprocessing, and check that both sides' bits are equal."""
    from transformers import Qwen2VLImageProcessorPil

    ours, theirs = ImageProcessor(max_pixels=MAX_PIXELS), Qwen2VLImageProcessorPil(max_pixels=MAX_PIXELS)
    for data in compressed(shards):
        made = theirs(images=[Image.open(io.BytesIO(data))], return_tensors="np")
        assert np.array_equal(pixel_values(ours.process(data)), made["pixel_values"])

    def side(name: str) -> float:
        command = [sys.executable, "-c", _RATE, name, str(folder), str(MAX_PIXELS)]
        return float(subprocess.run(command, capture_output=True, check=True, cwd=common.ROOT).stdout)  # noqa: S603

    found = common.alternate(lambda: side("ours"), lambda: side("theirs"), pairs)
    setting = f"{len(shards)} JPEGs of {SIZE[0]} x {SIZE[1]}, bits equal; peer: transformers' PIL image processor"
    return common.case("processor", found, "images/s", setting, more_is_better=True)


def startup(directory: Path, args: argparse.Namespace) -> common.Case:
    """Measure the time from opening a large index to the first sample's place, and the process's peak memory."""
    peak = 0.0

    def ours() -> float:
        nonlocal peak
        command = [sys.executable, "-c", _START, str(directory)]
        done = subprocess.run(command, capture_output=True, check=True, cwd=common.ROOT)  # noqa: S603 - our own code
        seconds, memory = json.loads(done.stdout)
        peak = max(peak, float(memory))
        return float(seconds)

    found = common.alternate(ours, lambda: ASKED_START_S, args.pairs)
    if args.samples <= SAMPLES and peak > ASKED_BYTES:
        raise SystemExit(f"startup: peak resident memory {peak / 1e6:.0f} MB; limit {ASKED_BYTES / 1e6:.0f} MB")
    setting = (
        f"{args.samples} samples in {SHARDS} shards, peak memory of the process {peak / 1e6:.0f} MB; peer: the limit"
    )
    return common.case("startup", found, "s", setting, more_is_better=False)


def seek(directory: Path, args: argparse.Namespace) -> common.Case:
    """Measure the longest of many jumps to an arbitrary position, each from a state without that lane's tables."""
    rng = np.random.default_rng(0)
    shards = ShardSet.open(directory)

    def ours() -> float:
        longest = 0.0
        for position in rng.integers(0, 10**12, SEEKS).tolist():
            stream = Stream(shards, 0, 64, 1024, position % 64, 64, consumed=position)
            started = time.perf_counter()
            stream.reference(stream.positions(64)[0])
            longest = max(longest, time.perf_counter() - started)
        return longest

    found = common.alternate(ours, lambda: ASKED_SEEK_S, args.pairs)
    setting = f"longest of {SEEKS} jumps among {args.samples} samples; peer: the limit"
    return common.case("seek", found, "s", setting, more_is_better=False)


def rate(function: Callable[[bytes], object], jpegs: Sequence[bytes]) -> float:
    """Return images a second."""
    started = time.perf_counter()
    for data in jpegs:
        function(data)
    return len(jpegs) / (time.perf_counter() - started)


def compressed(shards: ShardSet) -> list[bytes]:
    """Return the image of every sample."""
    items = [reading.read(shards.reference(i)) for i in range(len(shards))]
    return [data for item in items if not isinstance(item, Damage) for data in item.images]


def pictures(folder: Path, count: int) -> Path:
    """Build shards of JPEGs with detail on several scales."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        total = np.zeros((SIZE[1], SIZE[0], 3))
        for scale in (2, 7, 30, 120):
            grain = rng.integers(0, 256, (scale, scale, 3), dtype=np.uint8)
            total += np.asarray(Image.fromarray(grain).resize(SIZE, Image.Resampling.BICUBIC)) / 4
        Image.fromarray(total.astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
        turns = [{"from": "human", "value": f"question {i}"}, {"from": "gpt", "value": "[1, 2, 3, 4]"}]
        rows.append(json.dumps({"image": f"{i}.jpg", "conversations": turns}) + "\n")
    (folder / "rows.jsonl").write_text("".join(rows))
    build([folder / "rows.jsonl"], [folder], folder / "shards", SHARD_BYTES)
    return folder / "shards"


def large_index(directory: Path, samples: int) -> Path:
    """Write the indexes of shards that are not there: a JSON text and a JPEG a sample."""
    directory.mkdir()
    each = samples // SHARDS
    rng = np.random.default_rng(0)
    sizes = rng.integers(200, 200_000, 2 * each).astype(np.uint64)
    one = ShardIndex(
        shard="shard-000000.tar",
        starts=np.arange(0, 2 * each + 1, 2),
        offsets=np.cumsum(sizes + 1024) - sizes,
        sizes=sizes,
        kinds=np.tile(np.array([0, 1], np.uint8), each),
        key_ends=9 * np.arange(1, each + 1),
        keys="".join(f"{i:09d}" for i in range(each)).encode(),
        sha256=rng.integers(0, 256, (2 * each, 32)).astype(np.uint8),
    )
    for i in range(SHARDS):
        write_index(one, index_path(directory / f"shard-{i:06d}.tar"))
    return directory


if __name__ == "__main__":
    main()
