"""A run that goes on with another config than it was started with: what differs, and whether it may."""

from __future__ import annotations

import logging
from typing import Any

from megatron_vlmr1 import config
from megatron_vlmr1.config import Config

logger = logging.getLogger(__name__)

# What may differ without asking: it does not change what a step computes.
_FREE_SECTIONS = ("parallel.", "recompute.", "evaluate.", "data.evaluate.", "train.keep_best.", "launch.", "telemetry.")
_FREE_KEYS = {
    "run_dir",
    "model.spec",
    "rollout.max_cache_tokens",
    "rollout.max_prefill_tokens",
    "rollout.decode_burst",
    "rollout.cuda_graphs",
    "rollout.tensor_model_parallel_size",
    "rollout.pipeline_model_parallel_size",
    "optimizer.offload",
    "rewards.address",
    "rewards.keys",
    "rewards.workers",
    "rewards.deadline_s",
    "train.steps",
    "train.micro_batch_tokens",
    "train.micro_batches",
    "train.balance",
    "train.replica_check_every",
    "train.spike_factor",
    "train.spike_window",
    "train.save_every",
    "train.async_save",
    "train.optimizer_format",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.keep_best",
    "train.evaluate_every",
    "train.sample_every",
    "train.exit_before",
    "debug.save_rollouts",
    "data.workers",
    "data.prefetch",
    "data.prefetch_bytes",
    "data.worker_timeout_s",
    "data.cache_dir",
    "data.cache_bytes",
    "data.fetch_timeout_s",
}
# What may not differ even when asked: what is saved would not fit, or mean nothing (model, method, precision), or the
# position in the data would be one in another order.
_FIXED_SECTIONS = ("model.",)
_FIXED_KEYS = {"method", "task", "seed", "precision.dtype", "data.train", "data.lanes", "data.shuffle_window"}


def check_config(cfg: Config, saved: dict[str, Any], allow: bool = False) -> list[str]:
    """Compare a config with the one that its run directory was started with, perhaps by another version.

    Args:
        cfg: as it is now.
        saved: as a checkpoint has it.
        allow: let changes pass that mean another run, but could be meant.

    Returns:
        What was let pass because of `allow`, a line for each key; that is logged, too.

    Raises:
        ValueError: they mean different runs; lists every key that differs so.
    """
    started, left_out = config.parse_saved(saved, f"{cfg.run_dir}: its config")
    if left_out:
        logger.warning("%s was started with keys that are not known here: %s", cfg.run_dir, ", ".join(left_out))
    before, now = config.flat(started), config.flat(cfg)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    changed = [key for key in changed if not _is_free(key, cfg)]
    lines = {key: f"{key}={before.get(key)}, not {now.get(key)}" for key in changed}
    fixed = [lines[key] for key in changed if key.startswith(_FIXED_SECTIONS) or key in _FIXED_KEYS]
    if fixed or (lines and not allow):
        wrong = fixed if allow else list(lines.values())
        hint = "" if fixed else ", or pass --allow-config-change"
        raise ValueError(
            f"{cfg.run_dir} was started with {'; '.join(wrong)}: use another run_dir, or the old "
            f"value{'s' * (len(wrong) > 1)} to go on{hint}"
        )
    for line in lines.values():
        logger.warning("config change let pass: %s was started with %s", cfg.run_dir, line)
    return list(lines.values())


def _is_free(key: str, cfg: Config) -> bool:
    if key == "train.steps":  # a decaying learning rate depends on it
        return cfg.optimizer.decay == "constant"
    return key.startswith(_FREE_SECTIONS) or key in _FREE_KEYS
