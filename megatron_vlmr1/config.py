"""Every setting, validated. A default lives here and nowhere else.

A run is described by one YAML file and dotted overrides (``train.steps=5``). Unknown keys are errors that name
the nearest known key. String literals below a field document it.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from yaml import YAMLError

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Base of all sections: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelConfig(Section):
    """Which weights to start from."""

    path: str
    """Hugging Face directory, or a checkpoint directory of this program."""
    reference_path: str | None = None
    """Weights of the KL reference; the starting weights when empty. Used when grpo.beta > 0."""
    freeze_vision: bool = False
    """Keep the vision tower and its merger fixed."""


class DataConfig(Section):
    """Where samples come from and how they become prompts."""

    train: str
    """Directory of indexed WebDataset shards."""
    evaluate: dict[str, str] = {}
    """Named splits, each a directory of indexed shards."""
    lanes: PositiveInt = 8
    """Fixed number of lanes of the data order; the data-parallel size must divide it."""
    shuffle_window: PositiveInt = 1024
    """Samples of a lane are permuted within windows of this many."""
    min_pixels: PositiveInt | None = None
    """Smallest image area after resizing; the checkpoint's own when empty."""
    max_pixels: PositiveInt | None = None
    """Largest image area after resizing; the checkpoint's own when empty."""
    max_prompt_tokens: PositiveInt = 2048
    """A longer prompt is left out of its batch and written to the ledger."""
    system_prompt: str | None = None
    """System message of the chat; the chat template's own when empty."""


class ParallelConfig(Section):
    """How ranks share the model. Data parallelism takes what is left of the world."""

    tensor_model_parallel_size: PositiveInt = 1
    pipeline_model_parallel_size: PositiveInt = 1
    sequence_parallel: bool = False
    """Split norms and residuals over the tensor-parallel group along the sequence."""
    timeout_s: PositiveInt = 600
    """A collective that takes longer ends the job."""


class OptimizerConfig(Section):
    """Adam with decoupled weight decay, through megatron-core's distributed optimizer."""

    lr: PositiveFloat = 1e-6
    beta1: NonNegativeFloat = 0.9
    beta2: NonNegativeFloat = 0.999
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    warmup_steps: NonNegativeInt = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after the warm-up, over train.steps."""
    min_lr_ratio: NonNegativeFloat = 0.0
    """Last learning rate divided by the first."""


class RolloutConfig(Section):
    """How completions are sampled."""

    num_generations: PositiveInt = 8
    """Completions per prompt (G)."""
    max_new_tokens: PositiveInt = 256
    temperature: PositiveFloat = 1.0
    max_cache_tokens: PositiveInt = 262_144
    """Tokens of key/value cache per rank; prompts wait until they fit."""


class GrpoConfig(Section):
    """Group relative policy optimisation as VLM-R1 publishes it (arXiv 2504.07615, section 3)."""

    beta: NonNegativeFloat = 0.04
    """Weight of the KL term; 0 needs no reference model."""
    epsilon_low: PositiveFloat = 0.2
    epsilon_high: PositiveFloat = 0.2
    num_iterations: PositiveInt = 1
    """Optimizer steps on each batch of completions."""


class RewardsConfig(Section):
    """What is rewarded, and the processes that compute it."""

    weights: dict[str, NonNegativeFloat] = {}
    """Weight of each named reward; the task's own recipe when empty."""
    compat: Literal["none", "vlm-r1"] = "none"
    """vlm-r1 reproduces the published functions, quirks included."""
    workers: PositiveInt = 2
    """Reward processes per node."""
    deadline_s: PositiveFloat = 10.0
    """An item that takes longer is killed and tried once more."""
    memory_bytes: PositiveInt = 2 << 30
    """Address space of a reward process."""
    max_failed_frac: Annotated[float, Field(ge=0, le=1)] = 0.2
    """A step with a larger share of failed scores ends the run with exit code 17."""


class TrainConfig(Section):
    """Length of the run and size of a step."""

    steps: PositiveInt = 100
    prompts_per_step: PositiveInt = 16
    """Prompts (grpo) or samples (sft) of one optimizer step, over all data-parallel ranks."""
    micro_batch_tokens: PositiveInt = 8192
    """Packed tokens of one micro-batch per rank, at most. A longer group is cut between completions, its prompt
    repeated; only a single completion that is too long together with its prompt gets more."""
    micro_batches: PositiveInt | None = None
    """At least this many micro-batches a step; the pipeline size when empty."""
    balance: bool = True
    """Exchange groups between data-parallel ranks before the update, so that each has about as much to compute."""
    save_every: NonNegativeInt = 100
    """Checkpoint after every so many steps, and after the last; 0 saves only the last."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that are kept."""
    evaluate_every: NonNegativeInt = 0
    """Evaluate on data.evaluate after every so many steps; 0 never."""
    sample_every: NonNegativeInt = 10
    """Write samples/step_N.jsonl after every so many steps; 0 never."""


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
    skip_update: bool = False
    """Generate and score, but leave the policy as it is."""


class Config(Section):
    """One run."""

    method: Literal["grpo", "sft"] = "grpo"
    run_dir: str = "runs/default"
    seed: NonNegativeInt = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    """Type of parameters and activations; the optimizer keeps fp32 masters."""
    task: str = "rec"
    """Prompt template, answer parser, reward recipe and metric."""
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    rollout: RolloutConfig = RolloutConfig()
    grpo: GrpoConfig = GrpoConfig()
    rewards: RewardsConfig = RewardsConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    debug: DebugConfig = DebugConfig()

    @model_validator(mode="after")
    def _debug_fits(self) -> Config:
        if self.method != "grpo" and self.debug != DebugConfig():
            raise ValueError("debug.* is about rollouts: it needs method=grpo")
        if self.debug.replay_rollouts is not None and self.train.evaluate_every:
            raise ValueError("debug.replay_rollouts starts no rewards: it needs train.evaluate_every=0")
        return self

    @model_validator(mode="after")
    def _group_of_two(self) -> Config:
        if self.method == "grpo" and self.rollout.num_generations < 2:
            raise ValueError("rollout.num_generations must be at least 2: an advantage compares completions")
        if self.parallel.sequence_parallel and self.parallel.tensor_model_parallel_size == 1:
            raise ValueError("parallel.sequence_parallel needs parallel.tensor_model_parallel_size > 1")
        return self


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply dotted overrides, validate.

    Raises:
        ValueError: one line naming the file and the key, with the nearest known key for a typo.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such config file")
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        raw = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable config: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: a config is a mapping of sections")
    return parse({str(key): value for key, value in raw.items()}, str(path))


def parse(raw: dict[str, Any], origin: str) -> Config:
    """Validate a nested dict; `origin` names it in errors.

    Raises:
        ValueError: one line with the first few problems.
    """
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        problems = [_explain(e["loc"], e["type"], e["msg"]) for e in error.errors()]
        raise ValueError(f"{origin}: " + "; ".join(problems[:3])) from error


def dump(config: Config) -> str:
    """Return the resolved config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def _explain(loc: tuple[int | str, ...], kind: str, message: str) -> str:
    key = ".".join(str(part) for part in loc)
    if kind != "extra_forbidden":
        return f"{key}: {message}" if key else message.removeprefix("Value error, ")
    section: Any = Config
    for part in loc[:-1]:
        section = section.model_fields[str(part)].annotation
    near = difflib.get_close_matches(str(loc[-1]), section.model_fields, n=1, cutoff=0.5)
    return f"unknown key {key}" + (f"; did you mean {'.'.join(str(p) for p in (*loc[:-1], near[0]))}?" if near else "")
