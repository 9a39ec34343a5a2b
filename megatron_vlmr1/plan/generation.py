"""What generation needs besides the weights: key/value cache, embeddings, prefill, and the logits of a tick. No torch.

As `rollout.engine`, `rollout.pipe`, `rollout.bursts` and `rollout.forward` go about it.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vlmr1.config import Config, ParallelConfig
from megatron_vlmr1.config.rules import ticks_in_a_row
from megatron_vlmr1.models.shape import padded
from megatron_vlmr1.plan.activations import FP32, INDEX, Layer, Widths
from megatron_vlmr1.plan.counts import cache_numbers, stage_layers
from megatron_vlmr1.plan.load import Load
from megatron_vlmr1.plan.parts import Parts, dearest, joined
from megatron_vlmr1.plan.shapes import PlanShape
from megatron_vlmr1.plan.tower import Tower
from megatron_vlmr1.rollout.cache_size import CacheSize, fit

FP64 = 8
SMALL_VOCABULARY = 2048  # tokens of a rank up to which `rollout.sampling` adds all probabilities up in fp64


@dataclass(frozen=True)
class Generation:
    """One rank of a pipeline stage that generates; the layout is training's, or the decoding copy's."""

    cfg: Config
    shape: PlanShape
    layout: ParallelConfig
    stage: int
    load: Load  # of this copy of the model
    item: int
    cuda: bool

    @property
    def in_bursts(self) -> bool:
        """Whether several ticks follow each other without the host."""
        given, stages = self.cfg.rollout.decode_burst, self.layout.pipeline_model_parallel_size
        return ticks_in_a_row(given, stages, self.cuda) > 1

    @property
    def lanes(self) -> int:
        """Lanes of completions: one for each stage, so that none waits; one with virtual stages (`Engine.generate`)."""
        lanes = self.layout.pipeline_model_parallel_size if self.layout.virtual_pipeline_model_parallel_size == 1 else 1
        return min(lanes, self.load.prompts)

    def size(self) -> CacheSize:
        """Return the size of each lane's cache.

        Raises:
            ValueError: not even one completion fits.
        """
        load, limit = self.load, self.cfg.rollout.max_cache_tokens
        prompts = -(-load.prompts // self.lanes)
        size = fit(load.prompt_tokens, prompts, load.generations, load.new_tokens, limit // self.lanes)
        if size is None:
            raise ValueError(
                f"rollout.max_cache_tokens={limit} is too small for {self.lanes} lanes: a completion of "
                f"{load.new_tokens} tokens behind a prompt of {load.prompt_tokens} needs "
                f"{load.new_tokens + load.prompt_tokens}"
            )
        return size

    def peak(self) -> Parts:
        """Return what generation holds at its dearest moment, without weights."""
        size = self.size()
        text, tp = self.shape.text, self.layout.tensor_model_parallel_size
        layers = sum(map(len, stage_layers(self.layout, text.num_layers, self.stage)))
        cache = self.lanes * size.tokens * cache_numbers(text, tp, layers) * self.item
        held = {"KV cache": cache, "rotary tables": self._tables(), "kept embeddings": self._embeddings()}
        if self.cuda and self.in_bursts and self.cfg.rollout.cuda_graphs == "auto":
            # What captured ticks need in between is the graphs' own memory; the first tokens are drawn beside it.
            first = {"logits": size.rows * self._drawn()}
            return joined(held, self._tick(size), dearest([*self._prefill(size), first]))
        return joined(held, dearest([*self._prefill(size), self._tick(size)]))

    def _widths(self) -> Widths:
        return Widths.of(self.shape.text, self.layout, self.item)

    def _factors(self, rows: int) -> int:
        """Bytes of `Rotation` factors: a cosine and a sine for every number of a key/value group."""
        w = self._widths()
        group = w.query // w.key * w.head_dim + 2 * w.head_dim
        return rows * 2 * group * self.item

    def _tables(self) -> int:
        return self._factors(self.load.prompt_tokens + self.load.new_tokens)

    def _tower(self, prompts: int) -> Tower | None:
        vision = self.shape.vision
        if vision is None or self.stage or not self.load.grids:
            return None
        tp, load = self.layout.tensor_model_parallel_size, self.load
        return Tower(vision, load.grids * prompts, tp, self.item, load.flash)

    def _embeddings(self) -> int:
        tower = self._tower(self.load.prompts * max(1, self.cfg.grpo.dynamic_sampling_rounds))
        return tower.embeddings if tower else 0

    def _prefill(self, size: CacheSize) -> list[Parts]:
        """Return the moments of a prefill: of the tower, and of a layer."""
        load = self.load
        prompts = max(1, min(size.prompts, self.cfg.rollout.max_prefill_tokens // load.prompt_tokens))
        prompts = min(prompts, -(-size.rows // load.generations))
        batch = load.prefill(prompts)
        w, rows = self._widths(), batch.tokens
        layer = Layer(w, batch)
        held = rows * (w.fused + 2 * w.ffn) * self.item  # of the layer before, whose names still hold them
        wide = max(2 * rows * w.ffn * self.item, rows * w.ffn * self.item + self._quantised(rows))
        turned = 2 * rows * w.fused * self.item + layer.core
        moments: list[Parts] = [
            {"prefill": 2 * layer.input + held + max(wide, turned) + self._factors(rows) + layer.plan}
        ]
        if tower := self._tower(prompts):
            moments.append({"vision tower": tower.forward, "prefill": layer.input})
        return moments

    def _tick(self, size: CacheSize) -> Parts:
        """Return the moment in which tokens are drawn, on the last stage, or else that of a layer's scores."""
        load, w, rows = self.load, self._widths(), size.rows
        keys = load.prompt_tokens + load.new_tokens
        attended = rows * w.heads * (2 * keys * self.item + keys * FP32) + rows * (w.fused + 4 * w.ffn) * self.item
        attended += self._quantised(rows)
        attended += self._masked(size) if self.in_bursts else 0
        if self.stage < self.layout.pipeline_model_parallel_size - 1:
            return {"decoding": attended}
        return dearest([{"decoding": attended}, {"logits": rows * self._drawn()}])

    def _quantised(self, rows: int) -> int:
        """Bytes of the widest input of a product on its way to FP8: divided by its scales in fp32, and in e4m3."""
        return rows * self._widths().ffn * (FP32 + 1) if self.cfg.rollout.quantization == "fp8" else 0

    def _masked(self, size: CacheSize) -> int:
        """Bytes of what `rollout.step` adds to scores, and of prompts' scores in places that a grid is padded with."""
        load, text, tp = self.load, self.shape.text, self.layout.tensor_model_parallel_size
        keys = size.rows * load.new_tokens + size.prompts * load.prompt_tokens
        heads = max(1, text.num_kv_heads // tp)
        width = 1 << (min(load.generations, size.rows) - 1).bit_length()
        padding = max(0, size.prompts * width - size.rows)
        return self.item * (keys * heads + padding * self._widths().heads * load.prompt_tokens)

    def _drawn(self) -> int:
        """Bytes of logits and what comes of them, of one row (`rollout.sampling`, `rollout.filters`).

        All is fp32 but for sums over small vocabularies. Filters look at whole rows, which each rank puts together.
        """
        cfg, tp = self.cfg.rollout, self.layout.tensor_model_parallel_size
        whole = padded(self.shape.text.vocab_size, tp)
        own = whole // tp
        scaled = cfg.temperature != 1.0
        sums = FP64 if own <= SMALL_VOCABULARY else 0
        # The logits, divided by the temperature, less their largest, and the exponentials.
        plain = own * ((3 + scaled) * FP32 + max(0, sums - FP32))
        if (cfg.repetition_penalty, cfg.top_k, cfg.top_p, cfg.min_p) == (1.0, 0, 1.0, 0.0):
            return plain
        moments = [4 * FP32 + sums]  # whole rows, those that are kept, less their largest, and the exponentials
        if tp > 1:
            moments.append(3 * FP32)  # every rank's part, stacked, and side by side
        if cfg.top_p < 1.0:  # whole rows, sorted with their order, probabilities and their running sums
            moments.append((4 + scaled) * FP32 + INDEX)
        if cfg.repetition_penalty != 1.0:  # whole rows and which are seen, both ways of changing them, and the choice
            moments.append(4 * FP32 + 2)
        return max(moments) * whole + (own * FP32 if tp > 1 else 0)
