"""Every setting: `settings` holds them with their meanings and defaults, `files` reads and writes them."""

from megatron_vlmr1.config.data import DataConfig, SourceConfig
from megatron_vlmr1.config.files import dump, flat, load, load_section, merged, parse, parse_saved, parse_section
from megatron_vlmr1.config.grpo import GrpoConfig
from megatron_vlmr1.config.optimizer import OptimizerConfig
from megatron_vlmr1.config.precision import PrecisionConfig
from megatron_vlmr1.config.settings import (
    Config,
    DebugConfig,
    EvaluateConfig,
    ModelConfig,
    ParallelConfig,
    RecomputeConfig,
    RewardsConfig,
    RolloutConfig,
    decoding_layout,
)
from megatron_vlmr1.config.telemetry import LaunchConfig, TelemetryConfig
from megatron_vlmr1.config.train import KeepBestConfig, TrainConfig

__all__ = [
    "Config",
    "DataConfig",
    "DebugConfig",
    "EvaluateConfig",
    "GrpoConfig",
    "KeepBestConfig",
    "LaunchConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "RecomputeConfig",
    "RewardsConfig",
    "RolloutConfig",
    "SourceConfig",
    "TelemetryConfig",
    "TrainConfig",
    "decoding_layout",
    "dump",
    "flat",
    "load",
    "load_section",
    "merged",
    "parse",
    "parse_saved",
    "parse_section",
]
