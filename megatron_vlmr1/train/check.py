"""What can be refused before any rank loads a model. No torch: the launcher asks first."""

from __future__ import annotations

from pathlib import Path

from megatron_vlmr1.checkpoint.locate import hf_directory
from megatron_vlmr1.config import Config, decoding_layout
from megatron_vlmr1.data.index import ShardSet
from megatron_vlmr1.models.families import read_shape
from megatron_vlmr1.rewards import functions, tasks


def check_inputs(cfg: Config) -> None:
    """Check that model, data, layout, task and rewards exist and fit together.

    Raises:
        ValueError: one line that names the key, file or directory.
    """
    tasks.get(cfg.task)
    for name in cfg.rewards.weights:
        functions.get(name)
    shape = read_shape(hf_directory(cfg.model.path, check=False))
    shape.check_layout(cfg.parallel)
    if (layout := decoding_layout(cfg)) is not None:
        shape.check_layout(layout)
    cfg.recompute.check(cfg.parallel.layers_by_chunk(shape.text.num_layers))
    if cfg.model.reference_path is not None:
        read_shape(hf_directory(cfg.model.reference_path, check=False))
    if cfg.debug.replay_rollouts is not None and not Path(cfg.debug.replay_rollouts).is_dir():
        raise ValueError(f"debug.replay_rollouts={cfg.debug.replay_rollouts}: no such directory")
    for path in (cfg.data.train, *cfg.data.evaluate.values()):
        if not len(ShardSet.open(path)):
            raise ValueError(f"{path}: the split is empty")
