"""The largest step that a config allows, rank by rank: prompts, images, micro-batches and when they are in memory.

Every prompt has data.max_prompt_tokens, an image of data.max_pixels among them, and every completion
rollout.max_new_tokens. No torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_vlmr1.config import Config
from megatron_vlmr1.config.rules import token_multiple
from megatron_vlmr1.data.bins import fill
from megatron_vlmr1.models.segments import Segment, alike
from megatron_vlmr1.models.shape import VisionShape
from megatron_vlmr1.plan.shapes import PlanShape

Grid = tuple[int, int, int]  # frames, rows and columns of patches

MAX_PIXELS = 12_845_056  # of the published image processors, where data.max_pixels is empty
TEXT_TOKENS = 64  # of a prompt, at the least: template and question; an image has the rest at the most


@dataclass(frozen=True)
class Bucket:
    """Pieces of a packed row that attention pads to one shape: `batch` times `queries` that see `keys`."""

    batch: int
    queries: int
    keys: int
    masked: bool
    copies_queries: bool  # they do not lie one after another in the row
    copies_keys: bool

    @property
    def query_rows(self) -> int:
        """Rows of queries, with padding."""
        return self.batch * self.queries

    @property
    def key_rows(self) -> int:
        """Rows of keys, with padding and repetitions of prompts."""
        return self.batch * self.keys

    @property
    def mask(self) -> int:
        """Numbers in its mask; none where all is seen, or what causality lets through."""
        return self.batch * self.queries * self.keys if self.masked else 0


@dataclass(frozen=True)
class MicroBatch:
    """One packed row of the update, or of a prefill."""

    tokens: int
    labels: int
    buckets: tuple[Bucket, ...]
    grids: tuple[Grid, ...]  # of its unique images


@dataclass(frozen=True)
class Load:
    """What one copy of the model has to do in a step."""

    prompts: int
    generations: int
    prompt_tokens: int
    new_tokens: int
    grids: tuple[Grid, ...]  # of the images of one prompt
    flash: bool = False  # whether attention goes through `models.flash`

    def micro_batches(self, cfg: Config) -> list[MicroBatch]:
        """Return the micro-batches of an update, as `Updater.micro_batches` cuts them."""
        layout, train = cfg.parallel, cfg.train
        multiple = token_multiple(cfg.precision, layout)
        at_least = train.micro_batches or layout.pipeline_model_parallel_size
        turns = layout.pipeline_model_parallel_size if layout.virtual_pipeline_model_parallel_size > 1 else 1
        return list(self._cut(train.micro_batch_tokens // multiple * multiple, at_least, turns, multiple))

    @lru_cache(maxsize=1024)  # noqa: B019  # few, small and frozen; every stage and many plans ask for the same
    def _cut(self, budget: int, at_least: int, turns: int, multiple: int) -> tuple[MicroBatch, ...]:
        """Return micro-batches of at most `budget` tokens, their number a multiple of `turns`."""
        fed = self.new_tokens - 1
        whole = self.prompt_tokens + self.generations * fed
        parts = [self.generations] * self.prompts
        if whole > budget and self.generations > 1:
            cut = fill([fed] * self.generations, [fed] * self.generations, budget - self.prompt_tokens)
            parts = [len(part) for part in cut] * self.prompts
        sizes = [self.prompt_tokens + part * fed for part in parts]
        found = [[parts[i] for i in items] for items in fill(sizes, sizes, budget, at_least)] if parts else [[]]
        found += [[] for _ in range(-len(found) % turns)]
        alike: dict[tuple[int, ...], MicroBatch] = {}
        for completions in found:
            if tuple(completions) not in alike:
                alike[tuple(completions)] = self._packed(completions, multiple)
        return tuple(alike[tuple(completions)] for completions in found)

    def _packed(self, completions: Sequence[int], multiple: int) -> MicroBatch:
        """Pack groups of so many completions each; groups of one micro-batch are of different prompts."""
        p, fed = self.prompt_tokens, self.new_tokens - 1
        segments, end = [], 0
        for count in completions:
            start, end = end, end + p
            segments.append(Segment(start, end))
            for _ in range(count):
                segments.append(Segment(end, end + fed, (start, start + p)))
                end += fed
        if padding := -end % multiple if end else multiple:
            segments.append(Segment(end, end + padding))
        labels = sum(completions) * self.new_tokens
        total = end + padding
        made = (unpadded(total),) if self.flash else buckets(segments)
        return MicroBatch(total, labels, made, self.grids * len(completions))

    def prefill(self, prompts: int) -> MicroBatch:
        """Return so many prompts, packed for generation."""
        return self._packed([0] * prompts, 1)


def largest(cfg: Config, shape: PlanShape, world: int) -> Load:
    """Return what the dearest data-parallel rank has to do in the largest step that the config allows."""
    dp = cfg.parallel.data_parallel_size(world)
    grids = () if shape.vision is None else (largest_grid(cfg, shape.vision),)
    return Load(
        prompts=-(-cfg.train.prompts_per_step // dp),
        generations=cfg.rollout.num_generations if cfg.method == "grpo" else 1,
        prompt_tokens=cfg.data.max_prompt_tokens,
        new_tokens=cfg.rollout.max_new_tokens,
        grids=grids,
    )


def largest_grid(cfg: Config, vision: VisionShape) -> Grid:
    """Return the patches of the largest image that fits a prompt: as square as can be, for attention's sake."""
    side = vision.patch_size * vision.spatial_merge_size
    room = max(1, cfg.data.max_prompt_tokens - TEXT_TOKENS)
    tokens = max(1, min((cfg.data.max_pixels or MAX_PIXELS) // side**2, room))
    rows = math.isqrt(tokens)
    return 1, rows * vision.spatial_merge_size, tokens // rows * vision.spatial_merge_size


def unpadded(rows: int) -> Bucket:
    """Return a packed row as `models.flash` takes it: in one piece and as it lies, without padding or a mask."""
    return Bucket(1, rows, rows, masked=False, copies_queries=False, copies_keys=False)


def buckets(segments: Sequence[Segment]) -> tuple[Bucket, ...]:
    """Return the batches that a causal `models.attention.PaddedPlan` makes of them."""
    out = []
    for members in alike(segments):
        queries = [s.stop - s.start for s in members]
        prefixes = [s.prefix[1] - s.prefix[0] if s.prefix else 0 for s in members]
        lq, lk = max(queries), max(q + p for q, p in zip(queries, prefixes, strict=True))
        uniform = min(queries) == lq
        plain = uniform and lk == lq
        all_seen = uniform and lq == 1 and min(prefixes) == max(prefixes)
        joined = uniform and all(a.stop == b.start for a, b in zip(members, members[1:], strict=False))
        out.append(Bucket(len(members), lq, lk, not (plain or all_seen), not joined, not (joined and plain)))
    return tuple(out)


def windows(vision: VisionShape, grids: Sequence[Grid]) -> tuple[Bucket, ...]:
    """Return the batches of windowed attention, as `models.vision` cuts images: the last windows may be smaller."""
    window = vision.window_size // vision.patch_size // vision.spatial_merge_size
    sizes: Counter[int] = Counter()
    for frames, height, width in grids:
        rows, columns = (_cut(n // vision.spatial_merge_size, window) for n in (height, width))
        for a, times in rows.items():
            for b, more in columns.items():
                sizes[a * b * vision.merge_unit] += frames * times * more
    return _bidirectional(sizes)


def whole_images(grids: Sequence[Grid]) -> tuple[Bucket, ...]:
    """Return the batches of full attention over images, frame by frame."""
    sizes: Counter[int] = Counter()
    for frames, height, width in grids:
        sizes[height * width] += frames
    return _bidirectional(sizes)


def _cut(length: int, window: int) -> dict[int, int]:
    whole, rest = divmod(length, window)
    return {size: count for size, count in ((window, whole), (rest, 1)) if size and count}


def _bidirectional(sizes: Counter[int]) -> tuple[Bucket, ...]:
    one = [Segment(0, size) for size in sizes]
    out = []
    for members in alike(one):
        lengths = [s.stop for s in members]
        batch, longest = sum(sizes[n] for n in lengths), max(lengths)
        uniform = min(lengths) == longest
        apart = not uniform or len(sizes) > 1
        out.append(Bucket(batch, longest, longest, not uniform, apart, apart))
    return tuple(out)


def in_flight(stage: int, pp: int, vp: int, micro_batches: int) -> Iterator[Counter[int]]:
    """Yield how many micro-batches of each chunk are kept for backward, whenever one more has become so.

    megatron-core's 1F1B: with V chunks on each of P stages, stage s runs so many forward passes ahead of the first
    backward pass: P - s - 1, or with virtual stages 2 (P - s - 1) + (V - 1) P (`get_pp_rank_microbatches`). Chunks
    take turns of P micro-batches; backward takes them from the last chunk to the first (`get_model_chunk_id`).
    """
    total = min(micro_batches, 4 * pp) * vp  # from then on it all comes again
    ahead = (pp - stage - 1) * 2 + (vp - 1) * pp if vp > 1 else pp - stage - 1
    ahead = min(ahead, total)
    kept: Counter[int] = Counter()
    for k in range(total):
        kept[k // pp % vp] += 1
        yield kept.copy()
        if k >= ahead:
            kept[vp - 1 - (k - ahead) // pp % vp] -= 1
