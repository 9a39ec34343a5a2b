"""The training state beside the weights: optimizer, every rank's random generators, and the position in the run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from pickle import UnpicklingError  # noqa: S403 - the exception only
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_vlmr1.checkpoint import sharded
from megatron_vlmr1.checkpoint.pickles import guarded
from megatron_vlmr1.models.policy import Policy
from megatron_vlmr1.models.shape import padded
from megatron_vlmr1.runtime import device, distributed

logger = logging.getLogger(__name__)

# Resharding over any layout; megatron-core gathers each buffer on data-parallel rank 0 for it.
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}


def save(policy: Policy, optimizer: MegatronOptimizer, progress: dict[str, Any], directory: Path) -> None:
    """Write the state into an existing directory; all ranks call it.

    Args:
        policy: the model, wrapped for training.
        optimizer: its optimizer.
        progress: what `load` returns again: JSON values, the same on all ranks.
        directory: on a file system that all ranks share.

    Raises:
        OSError: some rank could not write; the same line on every rank.
    """
    optimizer_directory = directory / "optimizer"
    distributed.agree(_write_own(progress, directory, optimizer_directory, policy.mesh.rank))
    _initialise(optimizer)  # there may have been no step yet
    sharded.save(_sharded(policy, optimizer, is_loading=False), optimizer_directory)


def load(policy: Policy, optimizer: MegatronOptimizer, directory: Path) -> dict[str, Any]:
    """Restore what `save` wrote, on any layout that pads the model alike. The weights must be loaded before.

    Generators are restored where this rank had some; a rank that is new keeps its seed.

    Returns:
        The progress that was saved.

    Raises:
        ValueError: the state is not what `save` writes, or of a model that was padded to another size.
    """
    source = directory / "optimizer"
    _initialise(optimizer)
    with guarded(source):
        progress = _read_progress(directory / "progress.json")
        _check_width(progress, policy, directory)
        try:
            state = dist_checkpointing.load(_sharded(policy, optimizer, is_loading=True), str(source))
        except UnpicklingError as error:
            raise ValueError(f"{source}: refused before loading: {' '.join(str(error).split())[:300]}") from error
    _restore(optimizer, state["optimizer"])
    generators = directory / f"rng_{policy.mesh.rank:05d}.safetensors"
    if generators.is_file():
        saved = load_file(generators)
        torch.set_rng_state(saved["cpu"])
        if device.has_cuda() and "cuda" in saved:
            torch.cuda.set_rng_state(saved["cuda"])
    return progress


def _read_progress(path: Path) -> dict[str, Any]:
    try:
        progress = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable: {error}") from error
    if not isinstance(progress, dict):
        raise ValueError(f"{path}: not an object")
    return progress


def _check_width(progress: dict[str, Any], policy: Policy, directory: Path) -> None:
    """Refuse to resume where another tensor-parallel size padded the feed-forward layers to another width."""
    try:
        before = int(progress["config"]["parallel"]["tensor_model_parallel_size"])
    except (KeyError, TypeError, ValueError):
        return  # not a run's
    width, now = policy.shape.text.ffn_hidden_size, policy.mesh.tp_size
    if padded(width, before) != padded(width, now):
        raise ValueError(
            f"{directory}: saved at parallel.tensor_model_parallel_size={before}, which pads the feed-forward width "
            f"{width} to {padded(width, before)}; {now} pads it to {padded(width, now)}: resume at {before}"
        )


def _write_own(progress: dict[str, Any], directory: Path, optimizer_directory: Path, rank: int) -> str:
    """Write this rank's own files; return what went wrong, or nothing."""
    try:
        if rank == 0:
            optimizer_directory.mkdir()
            (directory / "progress.json").write_text(json.dumps(progress, indent=1) + "\n", encoding="utf-8")
        save_file(_generators(), directory / f"rng_{rank:05d}.safetensors")
    except (OSError, SafetensorError) as error:
        return str(error)
    return ""


def _sharded(policy: Policy, optimizer: MegatronOptimizer, is_loading: bool) -> dict[str, Any]:
    model = {f"chunk_{i}": chunk.sharded_state_dict() for i, chunk in enumerate(policy.chunks)}
    return {"optimizer": optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=SHARDING)}


def _initialise(optimizer: MegatronOptimizer) -> None:
    """Give torch's Adam its state before the first step: megatron-core 0.16 reads "step" from it."""
    (inner,) = optimizer.chained_optimizers
    if isinstance(inner.optimizer, torch.optim.Adam | torch.optim.AdamW) and not inner.optimizer.state:
        for group in inner.optimizer.param_groups:
            for parameter in group["params"]:
                inner.optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _restore(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load the optimizer's state.

    With torch's Adam (no Transformer Engine, no apex) megatron-core 0.16 looks for a "step" among the saved tensors,
    where it is not, and gives all parameters one and the same step tensor, which each of them would then advance.
    """
    (inner,) = optimizer.chained_optimizers
    param_state = state.pop("param_state")
    optimizer.load_state_dict(state)
    torch_state = [s for s in inner.optimizer.state.values() if isinstance(s.get("step"), torch.Tensor)]
    steps = [s.pop("step").clone() for s in torch_state]
    inner.load_parameter_state_from_fully_reshardable(param_state)
    for parameter_state, step in zip(torch_state, steps, strict=True):
        parameter_state["step"] = step


def _generators() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.has_cuda():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
