"""What can be refused before any rank loads a model. No torch: the launcher asks first."""

from __future__ import annotations

from pathlib import Path

from megatron_vlmr1.checkpoint.locate import hf_directory
from megatron_vlmr1.config import Config, decoding_layout
from megatron_vlmr1.config.rules import check_cache, check_shares
from megatron_vlmr1.data.cache import open_cache
from megatron_vlmr1.data.index import ShardSet
from megatron_vlmr1.data.mixture import Mixture
from megatron_vlmr1.models import fp8
from megatron_vlmr1.models.families import read_shape
from megatron_vlmr1.rewards import tasks
from megatron_vlmr1.telemetry.wandb_sink import check_installed


def check_inputs(cfg: Config, world: int, trains: bool = True) -> None:
    """Check that model, layout, task, rewards and what belongs to training fit together; `check_data` is the rest.

    Args:
        cfg: the run's config.
        world: number of ranks that will be started.
        trains: whether it is for training, or else for evaluation only.

    Raises:
        ValueError: one line that names the key, file or directory.
    """
    tasks.check(cfg.task, cfg.rewards.weights)
    shape = read_shape(hf_directory(cfg.model.path, check=False))
    shape.check_layout(cfg.parallel)
    if (layout := decoding_layout(cfg)) is not None:
        shape.check_layout(layout)
    check_cache(cfg)
    fp8.check(cfg, shape.text)
    cfg.recompute.check(cfg.parallel.layers_by_chunk(shape.text.num_layers))
    copies = cfg.parallel.data_parallel_size(world)
    if trains:
        check_shares(cfg, copies)
        if cfg.telemetry.wandb_project:
            check_installed(cfg.telemetry.wandb_project)
        if cfg.model.reference_path is not None:
            read_shape(hf_directory(cfg.model.reference_path, check=False))
        if cfg.debug.replay_rollouts is not None and not Path(cfg.debug.replay_rollouts).is_dir():
            raise ValueError(f"debug.replay_rollouts={cfg.debug.replay_rollouts}: no such directory")


def check_machine(cfg: Config) -> None:
    """Check that what the config needs is installed on this machine, where ranks will be started.

    Raises:
        ValueError: one line that says what to install.
    """
    fp8.check_installed(cfg)


def check_data(cfg: Config, trains: bool = True) -> None:
    """Check that the splits are there and hold samples; that of training only if it `trains`.

    Raises:
        ValueError: one line that names the directory.
    """
    remote = open_cache(cfg.data)
    for path in cfg.data.evaluate.values():
        if not len(ShardSet.open(path, remote)):
            raise ValueError(f"{path}: the split is empty")
    if trains:
        Mixture.open(cfg.data.sources, remote)
