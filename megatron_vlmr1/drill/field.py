"""Where a drill takes place: a directory, drawn data, small configs, and the run that nobody disturbed."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from megatron_vlmr1.data.scenes import write_split
from megatron_vlmr1.data.shards import build
from megatron_vlmr1.drill.jobs import need, succeed
from megatron_vlmr1.telemetry.metrics import read_metrics

STEPS = 5
RANKS = 2
_SCENES = 96
_SHARD_BYTES = 1_000_000
_SMALL: dict[str, Any] = {
    "method": "grpo",
    "precision": "fp32",
    "model": {"path": "asset:tiny_vlm"},
    "data": {"workers": 1, "lanes": 12},  # lanes for 1 to 4 data-parallel ranks
    "optimizer": {"lr": 7e-4},
    "rollout": {"num_generations": 4, "max_new_tokens": 30},
    "grpo": {"beta": 0.0},
    "train": {"steps": STEPS, "prompts_per_step": 4, "save_every": 2, "sample_every": 1, "keep_checkpoints": 99},
    "parallel": {"timeout_s": 60},
    "rewards": {"workers": 1},
}


class Field:
    """A directory in which jobs are run; each row of the matrix makes runs of its own in it."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    @cached_property
    def shards(self) -> Path:
        """Drawn scenes as shards."""
        jsonl = write_split(self.root / "scenes", "train", _SCENES)
        build([jsonl], [self.root / "scenes" / "images"], self.root / "shards", _SHARD_BYTES)
        return self.root / "shards"

    def config(self, name: str, **sections: Any) -> Path:
        """Write a small config whose run directory is ``root/name``; `sections` change it key by key."""
        config = {**_SMALL, "run_dir": str(self.root / name)}
        config["data"] = {**_SMALL["data"], "train": str(self.shards)}
        for key, value in sections.items():
            config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    @cached_property
    def whole(self) -> Path:
        """The directory of a run that nobody disturbed: GRPO, two data-parallel ranks."""
        succeed(self.config("whole"), RANKS)
        run_dir = self.root / "whole"
        norms = [row["train/grad_norm"] for _, row in read_metrics(run_dir)]
        need(len(norms) == STEPS and min(norms) > 0, f"the undisturbed run has nothing to compare: {norms}")
        return run_dir
