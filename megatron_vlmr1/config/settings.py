"""Every setting, validated. A default lives here, or in the modules beside it.

A run is described by one YAML file and dotted overrides (``train.steps=5``). Unknown keys are errors that name
the nearest known key. String literals below a field document it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_vlmr1.config.data import DataConfig
from megatron_vlmr1.config.grpo import GrpoConfig
from megatron_vlmr1.config.optimizer import OptimizerConfig
from megatron_vlmr1.config.precision import PrecisionConfig
from megatron_vlmr1.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section
from megatron_vlmr1.config.telemetry import LaunchConfig, TelemetryConfig
from megatron_vlmr1.config.train import TrainConfig


class ModelConfig(Section):
    """Which weights to start from."""

    path: str
    """Hugging Face directory, or a checkpoint directory of this program."""
    reference_path: str | None = None
    """Weights of the KL reference; the starting weights when empty. Used when grpo.beta > 0."""
    freeze_vision: bool = False
    """Keep the vision tower and its merger fixed."""
    spec: Literal["auto", "torch", "te"] = "auto"
    """What the language model's layers are made of. torch: megatron-core's own modules; te: Transformer Engine's, on
    CUDA; auto: te where both are there. Checkpoints are the same."""


class ParallelConfig(Section):
    """How ranks share the model. Data parallelism takes what is left of the world."""

    tensor_model_parallel_size: PositiveInt = 1
    pipeline_model_parallel_size: PositiveInt = 1
    virtual_pipeline_model_parallel_size: PositiveInt = 1
    """Chunks of layers on each pipeline stage, which take turns (interleaved 1F1B); more of them, a smaller bubble."""
    pipeline_layers: list[PositiveInt] | None = None
    """Layers of each chunk in the order in which a token meets them: the first chunk of every stage, then the second
    of every stage, and so on (pipeline x virtual numbers); equal shares when empty."""
    sequence_parallel: bool = False
    """Split norms and residuals over the tensor-parallel group along the sequence."""
    overlap_grad_reduce: bool = False
    """Sum a bucket of gradients over the data-parallel ranks while backward still works on those before it, instead of
    all when it is done."""
    overlap_param_gather: bool = False
    """Gather the parameters that an optimizer step has changed while checksums, metrics and the next step's data are
    worked on, until something reads parameters, instead of within the step. Needs overlap_grad_reduce, for its
    buckets."""
    bucket_size: PositiveInt = 40_000_000
    """With overlap_grad_reduce: at least so many parameters in each bucket. Only the first pipeline stage has several,
    as others reduce while the first still computes. A dp_reshardable checkpoint goes on with the same buckets only."""
    timeout_s: Annotated[int, Field(gt=0, le=10**7)] = 600
    """A collective that takes longer ends the job, and so does a rank that gets no further for about so long: no tick
    of generation, no micro-batch, no parameter read or written, no new phase."""

    @property
    def chunks(self) -> int:
        """Number of pieces that the layers are cut into: pipeline x virtual."""
        return self.pipeline_model_parallel_size * self.virtual_pipeline_model_parallel_size

    @property
    def ranks_of_a_copy(self) -> int:
        """Ranks that hold one copy of the model: tensor x pipeline."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    def data_parallel_size(self, world: int) -> int:
        """Return how many copies of the model `world` ranks hold.

        Raises:
            ValueError: some ranks would be left over.
        """
        if world % self.ranks_of_a_copy:
            raise ValueError(
                f"{world} ranks cannot hold parallel.tensor_model_parallel_size={self.tensor_model_parallel_size} x "
                f"parallel.pipeline_model_parallel_size={self.pipeline_model_parallel_size}: start a multiple of "
                f"{self.ranks_of_a_copy} ranks"
            )
        return world // self.ranks_of_a_copy

    def layers_by_chunk(self, num_layers: int) -> tuple[int, ...]:
        """Return how many of a model's layers each chunk has; chunk c is on pipeline stage c mod the pipeline size.

        Raises:
            ValueError: the layers do not divide, or do not add up.
        """
        if self.pipeline_layers is None:
            if num_layers % self.chunks:
                virtual = self.virtual_pipeline_model_parallel_size
                times = f" x virtual_pipeline_model_parallel_size={virtual}" if virtual > 1 else ""
                raise ValueError(
                    f"parallel.pipeline_model_parallel_size={self.pipeline_model_parallel_size}{times} does not divide "
                    f"the model's {num_layers} layers; say in parallel.pipeline_layers how to cut them"
                )
            return (num_layers // self.chunks,) * self.chunks
        if sum(self.pipeline_layers) != num_layers:
            raise ValueError(
                f"parallel.pipeline_layers={self.pipeline_layers} adds up to {sum(self.pipeline_layers)} layers, but "
                f"the model has {num_layers}"
            )
        return tuple(self.pipeline_layers)

    @model_validator(mode="after")
    def _chunks_fit(self) -> ParallelConfig:
        if self.virtual_pipeline_model_parallel_size > 1 and self.pipeline_model_parallel_size == 1:
            raise ValueError("virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size > 1")
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise ValueError("overlap_param_gather goes by the buckets of overlap_grad_reduce, which is off")
        if self.pipeline_layers is not None and len(self.pipeline_layers) != self.chunks:
            raise ValueError(
                f"pipeline_layers has {len(self.pipeline_layers)} numbers; pipeline x virtual pipeline size is "
                f"{self.chunks}"
            )
        return self


class RecomputeConfig(Section):
    """Activations that backward computes again instead of keeping them: less memory, more time, the same numbers."""

    granularity: Literal["none", "selective", "full"] = "none"
    """Of the language model. full: whole layers, of which only the input is kept; selective: parts of a layer."""
    modules: list[Literal["core_attn", "mlp"]] | None = None
    """The parts that selective computes again; core_attn when empty."""
    method: Literal["uniform", "block"] | None = None
    """With full. uniform (when empty): all layers, in units of num_layers; block: only the first num_layers layers of
    each pipeline chunk, each a unit."""
    num_layers: PositiveInt | None = None
    """With full; 1 when empty."""
    tower: bool = False
    """Compute the vision tower's blocks again, each a unit; without effect on a frozen tower, which has no backward."""

    @model_validator(mode="after")
    def _options_of_the_granularity(self) -> RecomputeConfig:
        given = {name for name in ("modules", "method", "num_layers") if getattr(self, name) is not None}
        takes = {"none": set(), "selective": {"modules"}, "full": {"method", "num_layers"}}[self.granularity]
        if given - takes:
            raise ValueError(f"granularity={self.granularity} does not take {min(given - takes)}")
        return self

    def megatron_core(self) -> dict[str, Any]:
        """Return the language model's part as megatron-core's own settings."""
        if self.granularity == "selective":
            return {"recompute_granularity": "selective", "recompute_modules": list(self.modules or ["core_attn"])}
        if self.granularity == "full":
            method, num_layers = self.method or "uniform", self.num_layers or 1
            return {
                "recompute_granularity": "full",
                "recompute_method": method,
                "recompute_num_layers": num_layers,
            }
        return {}

    def check(self, layers_by_chunk: Sequence[int]) -> None:
        """Refuse units that do not divide a pipeline chunk.

        Raises:
            ValueError: names the chunk's layers.
        """
        unit = 1 if self.method == "block" else self.num_layers or 1
        for layers in layers_by_chunk:
            if layers % unit:
                raise ValueError(f"recompute.num_layers={unit} does not divide the {layers} layers of a pipeline chunk")


class RolloutConfig(Section):
    """How completions are sampled."""

    num_generations: PositiveInt = 8
    """Completions per prompt (G)."""
    max_new_tokens: PositiveInt = 256
    temperature: PositiveFloat = 1.0
    top_k: NonNegativeInt = 0
    """Sample among so many likeliest tokens; 0 among all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample among the likeliest tokens whose probabilities reach this."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Sample among tokens of at least this share of the likeliest one's probability."""
    repetition_penalty: PositiveFloat = 1.0
    """Above 1, tokens of the prompt and of the completion so far become less likely."""
    tensor_model_parallel_size: PositiveInt | None = None
    """With this or the next one set, generation runs on a copy of the weights in this layout: 1 x 1 where one is empty.
    The training layout's own ranks hold it, so tensor x pipeline must divide theirs; the rest share out the prompts."""
    pipeline_model_parallel_size: PositiveInt | None = None
    max_cache_tokens: PositiveInt = 262_144
    """Tokens of key/value cache per rank; completions wait until they fit."""
    max_prefill_tokens: PositiveInt = 32_768
    """Packed prompt tokens of one forward pass of the rollout; a single longer prompt gets one of its own."""
    quantization: Literal["none", "fp8"] = "none"
    """What completions that are trained on are sampled with. fp8: copies of the layers' matrices in e4m3 with a scale
    for each row, made after each update, and inputs with a scale for each token; on CPUs, on GPUs before Hopper and in
    fp32 the same numbers are emulated, which saves no time. Needs grpo.truncated_importance; never in evaluation."""
    decode_burst: PositiveInt | None = None
    """Ticks of decoding in a row on the device, before the host takes all their tokens; the completions are the same.
    Empty: 8 on CUDA; 1 on a CPU, and where several pipeline stages generate, which take no other number."""
    cuda_graphs: Literal["auto", "none"] = "auto"
    """auto: on CUDA the ticks of bursts are captured, once for each of a few shapes, and replayed; none: their kernels
    are launched one by one."""


class RewardsConfig(Section):
    """What is rewarded, and the processes that compute it."""

    weights: dict[str, NonNegativeFloat] = {}
    """Weight of each named reward; the task's own recipe when empty. `accuracy` is the one that a row names in its
    `accu_reward_method`, else the task's."""
    compat: Literal["none", "vlm-r1"] = "none"
    """vlm-r1 reproduces the published functions, quirks included."""
    address: str | None = None
    """tcp://HOST:PORT (or ipc://PATH) of a service that `vlmr1 rewards serve` runs, in place of one on each node. It
    has its own workers, deadline and memory limit; deadline_s and workers here say how long to wait for it."""
    keys: str | None = None
    """Folder of `vlmr1 rewards keys`; a service on tcp asks for them."""
    workers: PositiveInt = 2
    """Reward processes per node."""
    deadline_s: PositiveFloat = 10.0
    """An item that takes longer is killed and tried once more."""
    memory_bytes: PositiveInt = 2 << 30
    """Address space of a reward process."""
    max_failed_frac: Annotated[float, Field(ge=0, le=1)] = 0.2
    """A step with a larger share of failed scores ends the run with exit code 17."""


class EvaluateConfig(Section):
    """How splits are evaluated."""

    batch_prompts: PositiveInt = 64
    """Prompts in flight per data-parallel rank."""
    limit: PositiveInt | None = None
    """Evaluate only the first so many samples of each split."""
    sampled: bool = True
    """Besides greedy answers, sample one at the rollout's temperature for reward_mean."""


class DebugConfig(Section):
    """Half a GRPO step at a time: generate without training, train without generating."""

    save_rollouts: bool = False
    """Write each step's completions and scores to run_dir/rollouts."""
    replay_rollouts: str | None = None
    """Directory of saved rollouts; steps take completions and scores from there, and neither generate nor score. Same
    data, seed and prompts per step as the run that saved them; any data-parallel size."""
    first_step: NonNegativeInt = 0
    """Begin with this step, at its place in the data and with the weights of model.path: to replay a bad batch."""
    skip_update: bool = False
    """Generate and score, but leave the policy as it is."""


class Config(Section):
    """One run."""

    method: Literal["grpo", "sft"] = "grpo"
    run_dir: str = "runs/default"
    seed: NonNegativeInt = 0
    precision: PrecisionConfig = PrecisionConfig()
    task: str = "rec"
    """Prompt template, answer parser, reward recipe and metrics: a name, or the path of your own Python file of them,
    which is executed."""
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    rollout: RolloutConfig = RolloutConfig()
    grpo: GrpoConfig = GrpoConfig()
    rewards: RewardsConfig = RewardsConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    launch: LaunchConfig = LaunchConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    debug: DebugConfig = DebugConfig()

    @model_validator(mode="after")
    def _debug_fits(self) -> Config:
        if self.method != "grpo" and self.debug != DebugConfig(first_step=self.debug.first_step):
            raise ValueError("debug.* but first_step is about rollouts: it needs method=grpo")
        if self.debug.first_step >= self.train.steps:
            raise ValueError(f"debug.first_step={self.debug.first_step} is not before train.steps={self.train.steps}")
        if self.debug.replay_rollouts is not None and self.train.evaluate_every:
            raise ValueError("debug.replay_rollouts starts no rewards: it needs train.evaluate_every=0")
        return self

    @model_validator(mode="after")
    def _offload_has_an_occasion(self) -> Config:
        if self.optimizer.offload == "rollout" and self.method != "grpo" and not self.train.evaluate_every:
            raise ValueError(
                f"optimizer.offload=rollout changes nothing: method={self.method} with train.evaluate_every=0 never "
                "generates; optimizer.offload=always is for training"
            )
        return self

    @model_validator(mode="after")
    def _moments_have_their_masters(self) -> Config:
        if self.optimizer.moments_dtype != "fp32" and self.precision.dtype == "fp32":
            raise ValueError(
                f"optimizer.moments_dtype={self.optimizer.moments_dtype} needs precision.dtype=bf16: fp32 parameters "
                "are their own masters, beside which Transformer Engine's Adam keeps no such moments"
            )
        return self

    @model_validator(mode="after")
    def _fp8_has_its_layers(self) -> Config:
        if self.precision.fp8 != "none" and self.model.spec == "torch":
            raise ValueError(f"precision.fp8={self.precision.fp8} needs model.spec=te or auto: torch computes no FP8")
        return self

    @model_validator(mode="after")
    def _quantized_rollouts_are_corrected(self) -> Config:
        if self.rollout.quantization == "none":
            return self
        chosen = f"rollout.quantization={self.rollout.quantization}"
        if self.method != "grpo":
            raise ValueError(f"{chosen} changes nothing: method={self.method} samples no completions to train on")
        if self.grpo.truncated_importance is None:
            raise ValueError(
                f"{chosen} samples by other probabilities than those that are trained: set grpo.truncated_importance, "
                "to 2.0 say, which weighs the difference"
            )
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> Config:
        best, every = self.train.keep_best, self.train.evaluate_every
        if best is not None and best.metric.startswith("evaluate/"):
            if best.metric.split("/")[1] not in self.data.evaluate:
                raise ValueError(f"train.keep_best.metric={best.metric}: no split of that name in data.evaluate")
            if not every or self.train.save_every % every:
                raise ValueError(
                    f"train.keep_best.metric={best.metric} is measured every train.evaluate_every={every} steps, which "
                    f"must divide train.save_every={self.train.save_every}"
                )
        return self

    @model_validator(mode="after")
    def _group_of_two(self) -> Config:
        if self.method == "grpo" and self.rollout.num_generations < 2:
            raise ValueError("rollout.num_generations must be at least 2: an advantage compares completions")
        if self.grpo.overlong_buffer_tokens >= self.rollout.max_new_tokens:
            raise ValueError(
                f"grpo.overlong_buffer_tokens={self.grpo.overlong_buffer_tokens} must be less than "
                f"rollout.max_new_tokens={self.rollout.max_new_tokens}"
            )
        decoding, training = decoding_layout(self), self.parallel
        if decoding is not None and training.ranks_of_a_copy % decoding.ranks_of_a_copy:
            raise ValueError(
                f"rollout.tensor_model_parallel_size={decoding.tensor_model_parallel_size} x rollout."
                f"pipeline_model_parallel_size={decoding.pipeline_model_parallel_size} does not divide the "
                f"{training.ranks_of_a_copy} ranks that hold one copy of the model in training"
            )
        stages = (decoding or training).pipeline_model_parallel_size
        if stages > 1 and (self.rollout.decode_burst or 1) > 1:
            raise ValueError(f"rollout.decode_burst={self.rollout.decode_burst} is for one stage; {stages} generate")
        if self.parallel.sequence_parallel and self.parallel.tensor_model_parallel_size == 1:
            raise ValueError("parallel.sequence_parallel needs parallel.tensor_model_parallel_size > 1")
        return self


def decoding_layout(cfg: Config) -> ParallelConfig | None:
    """Return the layout that generates, where it is not the training layout."""
    tensor, pipeline = cfg.rollout.tensor_model_parallel_size, cfg.rollout.pipeline_model_parallel_size
    if tensor is None and pipeline is None:
        return None
    return ParallelConfig(
        tensor_model_parallel_size=tensor or 1,
        pipeline_model_parallel_size=pipeline or 1,
        timeout_s=cfg.parallel.timeout_s,
    )
