"""Memory of every pipeline stage, phase by phase, in the largest step that a config allows. No torch.

What is counted is what the program's tensors take when they are needed most; what a caching allocator cannot use
between them comes on top, and a plan leaves room for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_vlmr1.config import Config, ParallelConfig, decoding_layout
from megatron_vlmr1.models import fp8
from megatron_vlmr1.models.shape import padded
from megatron_vlmr1.plan.activations import FP32, INDEX, Layer, Widths, chunk_kept, norm
from megatron_vlmr1.plan.counts import Chunk, stage_chunks
from megatron_vlmr1.plan.generation import Generation
from megatron_vlmr1.plan.load import Load, MicroBatch, in_flight, largest
from megatron_vlmr1.plan.parts import Parts, dearest, joined, present, total
from megatron_vlmr1.plan.shapes import PlanShape
from megatron_vlmr1.plan.tower import Tower, patches

Device = Literal["cpu", "cuda"]
PHASES = ("rollout", "logprobs", "update", "save")

MASTER_BYTES, GRADIENT_BYTES = 4, 4  # of a parameter: fp32 master, fp32 gradient
MOMENT_BYTES = {"fp32": 8, "bf16": 4, "fp8": 3}  # two moments, by `optimizer.moments_dtype`
STATE_BYTES = MASTER_BYTES + MOMENT_BYTES["fp32"]  # as it is saved, in fp32 training too
TILES = {"cpu": (1024, 512), "cuda": (4096, 8192)}  # `models.logprobs.TILES`: positions x tokens of one tile of logits
CHECKSUM_NUMBERS = {"cpu": 1 << 16, "cuda": 1 << 22}  # `parallel.replicas`: weights of a checksum, int64
# Assumed, not measured here: a CUDA context with its libraries' kernels, NCCL's buffers, and cuBLAS's workspace.
RUNTIME_BYTES = {"cpu": 0, "cuda": 1_500_000_000}
FP8_COPIES = 2  # assumed: Transformer Engine keeps each weight of a layer in FP8, by rows and by columns
PROCESS_BYTES = 350_000_000  # measured on a CPU: Python with torch, megatron-core and transformers
REWARD_PROCESS_BYTES = 150_000_000  # assumed: a Python process with numpy, and without torch
REWARDS, STAGED, LAST = "reward processes of the node", "staged save", "last save"  # parts of host memory
SHARD_BYTES = 5 * 10**9  # `checkpoint.writer.MAX_SHARD_BYTES`


@dataclass(frozen=True)
class RankMemory:
    """The dearest rank of a pipeline stage."""

    stage: int
    parameters: int
    phases: dict[str, dict[str, int]]  # phase -> part -> bytes of the device, at that phase's peak
    host: dict[str, int]  # part -> bytes of host memory, of the stage's first rank, which saves the stage's weights
    other_host: int  # bytes of host memory of any other rank of the stage
    stage_ranks: int  # of all copies

    def peak(self, phase: str) -> int:
        """Bytes of the device at a phase's peak."""
        return total(self.phases[phase])

    def worst(self) -> tuple[str, int]:
        """Return the phase that needs the most, and its bytes."""
        phase = max(self.phases, key=self.peak)
        return phase, self.peak(phase)

    def node_host(self, ranks: int) -> int:
        """Bytes of host memory of a node with so many ranks like this one; they share the reward processes."""
        shared, firsts = self.host.get(REWARDS, 0), max(1, ranks // self.stage_ranks)
        return firsts * (self.host_peak - shared) + (ranks - firsts) * self.other_host + shared

    @property
    def host_peak(self) -> int:
        """Bytes of host memory of the stage's first rank; a last save begins when the staged one is given back."""
        return total(self.host) - min(self.host.get(STAGED, 0), self.host.get(LAST, 0))


def rank_memory(
    cfg: Config, shape: PlanShape, world: int, device: Device = "cuda", load: Load | None = None
) -> list[RankMemory]:
    """Count the dearest rank of each pipeline stage.

    Args:
        cfg: of the run.
        shape: of the model.
        world: ranks.
        device: that trains.
        load: of a copy of the model in a step; None: the largest that the config allows.

    Raises:
        ValueError: the ranks, the layout or the cache do not fit.
    """
    shape.check_layout(cfg.parallel)
    fp8.check(cfg, shape.text)
    cfg.recompute.check(cfg.parallel.layers_by_chunk(shape.text.num_layers))
    dp = cfg.parallel.data_parallel_size(world)
    given = replace(load or largest(cfg, shape, world), flash=device == "cuda" and cfg.precision.dtype != "fp32")
    decoding = decoding_layout(cfg)
    if decoding is not None:
        shape.check_layout(decoding)
    stages = range(cfg.parallel.pipeline_model_parallel_size)
    return [_Rank(cfg, shape, dp, stage, device, given).memory() for stage in stages]


@dataclass(frozen=True)
class _Rank:
    """One rank of a stage: the first of its tensor-parallel group, on data-parallel rank 0."""

    cfg: Config
    shape: PlanShape
    dp: int
    stage: int
    device: Device
    load: Load

    @property
    def item(self) -> int:
        return 2 if self.cfg.precision.dtype == "bf16" else 4

    @property
    def tp(self) -> int:
        return self.cfg.parallel.tensor_model_parallel_size

    @property
    def is_last(self) -> bool:
        return self.stage == self.cfg.parallel.pipeline_model_parallel_size - 1

    @property
    def trains_tower(self) -> bool:
        return not self.cfg.model.freeze_vision

    def chunks(self) -> list[Chunk]:
        return stage_chunks(self.shape, self.cfg.parallel, self.stage)

    def memory(self) -> RankMemory:
        chunks = self.chunks()
        batches = self.load.micro_batches(self.cfg)
        largest_batch = max(batches, key=lambda batch: batch.tokens)
        resident, gradients, optimizer = self._resident(chunks, largest_batch), *self._offloaded(chunks)
        rollout = self._rollout() if self.cfg.method == "grpo" else {}
        between = {} if self.cfg.optimizer.offload != "none" else joined(gradients, optimizer)
        phases = {
            "rollout": joined(resident, between, rollout),
            "logprobs": joined(resident, between, self._logprobs(chunks, batches)),
            "update": joined(resident, gradients, self._update(chunks, batches, optimizer)),
            "save": joined(resident, gradients, optimizer, self._saving(chunks)),
        }
        held = {phase: present(parts) for phase, parts in phases.items()}
        host, other = self._host(chunks)
        parameters = sum(chunk.parameters for chunk in chunks)
        return RankMemory(self.stage, parameters, held, host, other, self.tp * self.dp)

    def _buffer(self, chunks: Sequence[Chunk]) -> int:
        return sum(self._buckets(chunks))

    def _buckets(self, chunks: Sequence[Chunk]) -> list[int]:
        return [n for chunk in chunks for n in chunk.buckets(self.dp, self.trains_tower)]

    def _resident(self, chunks: Sequence[Chunk], batch: MicroBatch) -> Parts:
        """Return what is there from one step to the next."""
        buffer = self._buffer(chunks)
        fixed = 0 if self.trains_tower else sum(sum(chunk.tower) for chunk in chunks)
        out = {"weights": (buffer + fixed) * self.item, "runtime": RUNTIME_BYTES[self.device]}
        if self.cfg.precision.fp8 != "none":
            of_a_layer = sum(rows * columns for rows, columns in fp8.matrices(self.shape.text, self.tp).values())
            out["fp8 weights"] = FP8_COPIES * of_a_layer * sum(chunk.layers for chunk in chunks)
        if self.cfg.parallel.sequence_parallel:  # megatron-core's global memory buffer, never given back
            out["gather buffer"] = batch.tokens * self.shape.text.hidden_size * self.item
        # A chunk remembers the last input that another stage sent it, and that has its gradient.
        sent = len(chunks) - (self.stage == 0)
        out["pipeline input"] = 2 * sent * Layer(self._widths(), batch).input
        if self.cfg.train.replica_check_every:
            out["checksums"] = CHECKSUM_NUMBERS[self.device] * INDEX
        return out

    def _offloaded(self, chunks: Sequence[Chunk]) -> tuple[Parts, Parts]:
        """Return what `optimizer.offload` takes away: gradients, and the optimizer's state."""
        buffer = self._buffer(chunks)
        moments = MOMENT_BYTES[self.cfg.optimizer.moments_dtype]
        state = -(-buffer // self.dp) * (moments + (MASTER_BYTES if self.item < FP32 else 0))
        return {"gradients": buffer * GRADIENT_BYTES}, {"optimizer": state}

    def _rollout(self) -> Parts:
        layout = decoding_layout(self.cfg)
        if layout is None:
            generation = self._generation(self.cfg.parallel, self.stage, self.load)
            return joined(generation.peak(), self._quantised(self.cfg.parallel, self.stage))
        copies = self.cfg.parallel.ranks_of_a_copy // layout.ranks_of_a_copy
        load = replace(self.load, prompts=-(-self.load.prompts // copies))
        moments = []
        for stage in range(layout.pipeline_model_parallel_size):
            held = sum(chunk.parameters for chunk in stage_chunks(self.shape, layout, stage)) * self.item
            peak = self._generation(layout, stage, load).peak()
            moments.append({"decoding copy": held, **peak, **self._quantised(layout, stage)})
        return dearest(moments)

    def _quantised(self, layout: ParallelConfig, stage: int) -> Parts:
        """Return copies of the layers' matrices in FP8, and of one in fp32 where the product is emulated."""
        if self.cfg.rollout.quantization == "none":
            return {}
        sides = fp8.matrices(self.shape.text, layout.tensor_model_parallel_size).values()
        of_a_layer = sum(rows * columns + rows * FP32 for rows, columns in sides)  # numbers, and a scale for each row
        layers = sum(chunk.layers for chunk in stage_chunks(self.shape, layout, stage))
        emulated = max(rows * columns for rows, columns in sides) * FP32 if self.device == "cpu" else 0
        return {"FP8 copy": of_a_layer * layers, "emulated products": emulated}

    def _generation(self, layout: ParallelConfig, stage: int, load: Load) -> Generation:
        return Generation(self.cfg, self.shape, layout, stage, load, self.item, self.device == "cuda")

    def _widths(self) -> Widths:
        return Widths.of(self.shape.text, self.cfg.parallel, self.item)

    def _tower(self, batch: MicroBatch) -> Tower | None:
        if self.shape.vision is None or self.stage or not batch.grids:
            return None
        return Tower(self.shape.vision, batch.grids, self.tp, self.item, self.load.flash)

    def _logprobs(self, chunks: Sequence[Chunk], batches: Sequence[MicroBatch]) -> Parts:
        """Return what passes without gradients need: of the reference, and of the old policy."""
        cfg = self.cfg.grpo
        if self.cfg.method != "grpo" or (not cfg.beta and cfg.num_iterations == 1):
            return {}
        batch = max(batches, key=lambda batch: batch.tokens)
        layer = Layer(self._widths(), batch)
        moments: list[Parts] = [{"activations": layer.forward + layer.plan}]
        if self.is_last:
            moments.append({"activations": 2 * layer.input, "logits": self._head_forward(batch)})
        kept: Parts = {}
        if tower := self._tower(batch):
            moments.append({"vision tower": tower.forward, "activations": layer.input})
            images = tuple(grid for each in batches for grid in each.grids)
            kept = {"kept embeddings": Tower(tower.shape, images, self.tp, self.item).embeddings}
        return dearest([joined(kept, dearest(moments)), self._exchange(chunks)])

    def _exchange(self, chunks: Sequence[Chunk]) -> Parts:
        """Return the parameter that waits while the reference's takes its place."""
        if not self.cfg.grpo.beta:
            return {}
        return {"reference": max(chunk.largest for chunk in chunks) * self.item}

    def _head_forward(self, batch: MicroBatch) -> int:
        """Bytes of hidden states that labels are predicted from, and of a tile of logits."""
        positions, tokens = TILES[self.device]
        rows = padded(self.shape.text.vocab_size, self.tp) // self.tp
        tile = min(positions, batch.labels) * min(tokens, rows)
        return batch.labels * self.shape.text.hidden_size * self.item + 2 * tile * FP32

    def _update(self, chunks: Sequence[Chunk], batches: Sequence[MicroBatch], optimizer: Parts) -> Parts:
        """Return the dearest moment of forward and backward, or of the optimizer's step."""
        moments = self._passes(chunks, batches)
        if self.device == "cpu":  # gloo reduces and scatters a copy
            moments.append({"gradient reduction": max(self._buckets(chunks)) * GRADIENT_BYTES})
        if self.tp > 1 and self.trains_tower:  # laid one after another, and summed over the tensor-parallel group
            moments.append({"tower gradients": sum(chunks[0].tower) * GRADIENT_BYTES})
        if self.cfg.optimizer.offload != "always":
            moments = [joined(optimizer, moment) for moment in moments]
        moments.append(joined(optimizer, self._optimizer_step(chunks)))
        return joined(self._embeddings(), dearest(moments))

    def _embeddings(self) -> Parts:
        """Return image embeddings that are kept from the rollout.

        The reference's pass forgets those of a tower that is trained, and a decoding copy takes its own along.
        """
        vision, cfg = self.shape.vision, self.cfg
        forgotten = self.trains_tower and (cfg.grpo.beta > 0 or decoding_layout(cfg) is not None)
        if vision is None or self.stage or cfg.method != "grpo" or forgotten:
            return {}
        images = self.load.grids * self.load.prompts * max(1, cfg.grpo.dynamic_sampling_rounds)
        return {"kept embeddings": Tower(vision, images, self.tp, self.item).embeddings}

    def _passes(self, chunks: Sequence[Chunk], batches: Sequence[MicroBatch]) -> list[Parts]:
        batch = max(batches, key=lambda batch: batch.tokens)
        layer, recompute = Layer(self._widths(), batch), self.cfg.recompute
        kept = [chunk_kept(layer, chunk.layers, recompute) for chunk in chunks]
        pp, vp = self.cfg.parallel.pipeline_model_parallel_size, len(chunks)
        flights = list(in_flight(self.stage, pp, vp, len(batches)))
        tower = self._tower(batch)
        tower_kept = tower.kept(recompute.tower) if tower and self.trains_tower else 0
        shipped = layer.input * ((self.item < FP32) + (not self.is_last)) if pp > 1 else 0
        moments = []
        for flight in flights:
            acts = sum(count * (kept[c][0] + shipped) for c, count in flight.items())
            moments.append({"activations": acts, "vision tower": flight[0] * tower_kept})
        held = dearest(moments)
        again = max(extra for _, extra in kept)
        out = [joined(held, {"activations": again + layer.backward + layer.plan, **self._tied()})]
        if self.is_last:
            out = [joined(each, self._head_kept(batch)) for each in out]
            out.append(joined(held, self._head_kept(batch), self._head_backward(batch)))
        if tower and self.trains_tower:
            out.append({"vision tower": tower_kept + tower.backward(recompute.tower), **self._tied()})
        # A tied embedding's two gradients, and their sum.
        out.append({"output layer": 3 * self._tied().get("output layer", 0)})
        return out

    def _tied(self) -> Parts:
        """Return the output layer's gradient, which waits for the embedding's where both are one parameter."""
        text = self.shape.text
        if not text.tied or self.cfg.parallel.pipeline_model_parallel_size > 1:
            return {}
        return {"output layer": padded(text.vocab_size, self.tp) // self.tp * text.hidden_size * self.item}

    def _head_kept(self, batch: MicroBatch) -> Parts:
        width, rows = self.shape.text.hidden_size, batch.tokens // self._widths().shards
        last = norm(rows, width, self.item) + batch.labels * (width * self.item + 3 * INDEX + 4 * FP32)
        return {"activations": last + (batch.tokens * width * self.item if self._widths().shards > 1 else 0)}

    def _head_backward(self, batch: MicroBatch) -> Parts:
        """Return the gradients of the output layer and of its input, in fp32 and then in the type of activations."""
        text, width = self.shape.text, self.shape.text.hidden_size
        rows = padded(text.vocab_size, self.tp) // self.tp
        positions, tokens = TILES[self.device]
        each = FP32 + (self.item if self.item < FP32 else 0)
        tile = 3 * min(positions, batch.labels) * min(tokens, rows) * FP32
        return {"logits": tile + batch.labels * width * each, "output layer": rows * width * each}

    def _optimizer_step(self, chunks: Sequence[Chunk]) -> Parts:
        """Return what the step takes for a moment.

        On a CPU torch's Adam goes tensor by tensor: a root and its quotient. On a GPU its foreach kernels take the
        roots of all second moments at once; Transformer Engine's and apex's take nothing. For moments that are not in
        fp32 Transformer Engine's makes copies of all of them that are.
        """
        if copies := self._moments_in_fp32(chunks):
            return {"optimizer step": copies}
        if self.device == "cuda":
            return {"optimizer step": -(-self._buffer(chunks) // self.dp) * FP32}
        return {"optimizer step": 2 * max(chunk.largest for chunk in chunks) * FP32}

    def _moments_in_fp32(self, chunks: Sequence[Chunk]) -> int:
        """Bytes of fp32 copies of both moments, where they are kept in fewer."""
        if self.cfg.optimizer.moments_dtype == "fp32":
            return 0
        return -(-self._buffer(chunks) // self.dp) * MOMENT_BYTES["fp32"]

    def _saving(self, chunks: Sequence[Chunk]) -> Parts:
        """Return the parts of one parameter that the first rank of the tensor-parallel group gathers.

        With them what dp_reshardable state is saved from: moments in fp32.
        """
        largest_tensor = max(max((*c.layer, c.embedding, c.output)) for c in chunks)
        gathered = self.tp * largest_tensor * self.item if self.tp > 1 else 0
        return {"gathered": gathered, "saved moments": self._moments_in_fp32(chunks)}

    def _published(self) -> int:
        """Parameters of the whole stage as they are published, neither cut nor padded."""
        whole = self.cfg.parallel.model_copy(update={"tensor_model_parallel_size": 1})
        return sum(chunk.parameters for chunk in stage_chunks(self.shape, whole, self.stage))

    def _host(self, chunks: Sequence[Chunk]) -> tuple[Parts, int]:
        """Return this rank's host memory, and that of a rank that saves no weights, without the node's processes."""
        cfg = self.cfg
        out: Parts = {"process": PROCESS_BYTES}
        if cfg.method == "grpo" and cfg.grpo.beta > 0:
            out["reference"] = sum(chunk.parameters for chunk in chunks) * self.item
        if cfg.optimizer.offload != "none":
            out["offloaded optimizer"] = total(self._offloaded(chunks)[1])
        out |= self._prompts()
        staged = -(-self._buffer(chunks) // self.dp) * STATE_BYTES if cfg.train.async_save else 0
        # `get_parameter_state_dp_zero`: all of the state; of one bucket besides this rank's shard, and one kind of
        # numbers from every rank, in order, and the kind before it in order; or this rank's shard of the next bucket in
        # place of one of these. Weights are gathered before that, a file at a time.
        first, second = max(self._buckets(chunks)), 0
        if cfg.parallel.overlap_grad_reduce and self.stage == 0:
            largest = cfg.parallel.bucket_size + max(chunk.largest for chunk in chunks)
            first, second = min(first, largest), min(max(first - largest, 0), largest)
        parts = [-(-bucket // self.dp) * STATE_BYTES for bucket in (first, second)]
        state = self._buffer(chunks) * STATE_BYTES + parts[0] + 2 * first * FP32 + max(first * FP32, parts[1])
        other = total(out) + max(staged, state)
        if staged:
            out[STAGED] = self._published() * self.item + staged
        out[LAST] = max(state, min(self._published() * self.item, SHARD_BYTES))
        if cfg.method == "grpo" and cfg.rewards.address is None:
            out[REWARDS] = (cfg.rewards.workers + 1) * REWARD_PROCESS_BYTES
        return out, other

    def _prompts(self) -> Parts:
        """Return the images of a step's prompts, and of those that are read ahead: one frame in fp32."""
        vision, data = self.shape.vision, self.cfg.data
        if vision is None:
            return {}
        each = patches(self.load.grids) * vision.patch_dim // vision.temporal_patch_size * FP32
        rounds = max(1, self.cfg.grpo.dynamic_sampling_rounds)
        ahead = min(data.prefetch * each, data.prefetch_bytes) if data.workers else 0
        return {"pixels": self.load.prompts * rounds * each, "prompts ahead": ahead}
