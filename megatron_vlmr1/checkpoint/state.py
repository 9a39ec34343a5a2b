"""The training state beside the weights: optimizer, every rank's random generators, and the position in the run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from pickle import UnpicklingError  # noqa: S403 - the exception only
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.optimizer import MegatronOptimizer
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megatron_vlmr1 import config
from megatron_vlmr1.checkpoint import scaling
from megatron_vlmr1.checkpoint.background import Writes
from megatron_vlmr1.checkpoint.pickles import guarded
from megatron_vlmr1.checkpoint.sharded import Sharded
from megatron_vlmr1.checkpoint.staging import Staging
from megatron_vlmr1.config import ParallelConfig
from megatron_vlmr1.models.policy import Policy
from megatron_vlmr1.models.shape import padded
from megatron_vlmr1.parallel.optimizer import initialise
from megatron_vlmr1.runtime import device, distributed

logger = logging.getLogger(__name__)

FORMATS = ("dp_reshardable", "fully_reshardable")  # of the optimizer, as megatron-core names them
_BY_BUCKET = "optimizer.distributed.dp_group_idx_"  # begins the names of tensors in dp_reshardable


def sharding(kind: str) -> dict[str, Any]:
    """Return what megatron-core wants to be told of an optimizer format, for manifests too.

    ``dp_reshardable``: each rank writes its own part as it lies, and only the data-parallel size may change.
    ``fully_reshardable``: each data-parallel group gathers its buffers first, and any layout may go on.
    """
    assert kind in FORMATS, kind
    return {"distrib_optim_sharding_type": kind, "distrib_optim_fully_reshardable_mem_efficient": False}


def save(
    policy: Policy,
    optimizer: MegatronOptimizer,
    progress: dict[str, Any],
    directory: Path,
    kind: str = "fully_reshardable",
) -> None:
    """Write the state into an existing directory; all ranks call it.

    Args:
        policy: the model, wrapped for training.
        optimizer: its optimizer.
        progress: what `load` returns again: JSON values, the same on all ranks.
        directory: on a file system that all ranks share.
        kind: of the optimizer's format, as in `sharding`.

    Raises:
        OSError: some rank could not write; the same line on every rank.
    """
    writes = Writes(directory, later=False)
    staged = stage(policy, optimizer, progress, directory, kind, writes, None)
    problem, _ = writes.wait()
    distributed.agree(problem)
    results = distributed.gathered(staged.results)
    distributed.together(lambda: staged.finish(results), only_first=True)


def stage(
    policy: Policy,
    optimizer: MegatronOptimizer,
    progress: dict[str, Any],
    directory: Path,
    kind: str,
    writes: Writes,
    staging: Staging | None,
) -> Sharded:
    """Add each rank's part of what `save` writes to `writes`; all ranks call it, then the first one `finish`.

    Args:
        policy: as `save`, and so are `optimizer`, `progress`, `directory` and `kind`.
        writes: takes what this rank writes.
        staging: memory for a copy of the optimizer's state; None where it stays as it is until it is written.

    Raises:
        OSError: some rank could not begin; the same line on every rank.
    """
    optimizer_directory = directory / "optimizer"
    distributed.together(optimizer_directory.mkdir, only_first=True)
    rank = policy.mesh.rank
    if rank == 0:
        text = json.dumps(progress, indent=1) + "\n"
        writes.add(partial(_write_progress, text, directory / "progress.json"))
    writes.add(partial(_write_generators, _generators(), directory / f"rng_{rank:05d}.safetensors"))
    if remembered := scaling.remembered(policy.chunks):
        writes.add(partial(scaling.write, remembered, policy.mesh, scaling.path(directory, rank)))
    initialise(optimizer)  # there may have been no step yet
    return Sharded(_sharded(policy, optimizer, kind, is_loading=False), optimizer_directory, writes, staging)


def load(policy: Policy, optimizer: MegatronOptimizer, directory: Path) -> dict[str, Any]:
    """Restore what `save` wrote, on a layout that the optimizer's format allows. The weights must be loaded before.

    Generators are restored where this rank had some; a rank that is new keeps its seed.

    Returns:
        The progress that was saved.

    Raises:
        ValueError: the state is not what `save` writes, or does not fit this layout; one line.
    """
    source = directory / "optimizer"
    initialise(optimizer)
    with guarded(source) as metadata:
        progress = _read_progress(directory / "progress.json")
        kind = _kind(metadata, source)
        if kind == "dp_reshardable":
            _check_same_parts(progress, policy, directory)
        _check_width(progress, policy, directory)
        try:
            state = dist_checkpointing.load(_sharded(policy, optimizer, kind, is_loading=True), str(source))
        except UnpicklingError as error:
            raise ValueError(f"{source}: refused before loading: {' '.join(str(error).split())[:300]}") from error
        except CheckpointException as error:  # no Exception to Python
            why = "; ".join(str(reason) for reason, _ in error.failures.values())
            raise ValueError(f"{source}: refused: {' '.join(why.split())[:300]}") from error
    _restore(optimizer, state["optimizer"], kind)
    _restore_scaling(policy, directory)
    generators = directory / f"rng_{policy.mesh.rank:05d}.safetensors"
    if generators.is_file():
        saved = load_file(generators)
        torch.set_rng_state(saved["cpu"])
        if device.has_cuda() and "cuda" in saved:
            torch.cuda.set_rng_state(saved["cuda"])
    return progress


def _restore_scaling(policy: Policy, directory: Path) -> None:
    """Go on with the scales of delayed FP8, where they were saved on this layout."""
    if policy.layers.precision.fp8 != "delayed":
        return
    recipe = partial(get_fp8_recipe, policy.chunks[0].config)
    if not scaling.restore(policy.chunks, policy.mesh, scaling.path(directory, policy.mesh.rank), recipe):
        logger.warning("%s: no FP8 scales of this layout and history: scaling begins anew", directory)


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


def _kind(metadata: Any, source: Path) -> str:
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{source / '.metadata'}: refused: not the metadata of a checkpoint")
    by_bucket = any(str(name).startswith(_BY_BUCKET) for name in metadata.state_dict_metadata)
    return "dp_reshardable" if by_bucket else "fully_reshardable"


def _check_same_parts(progress: dict[str, Any], policy: Policy, directory: Path) -> None:
    """Refuse to resume from parts of the model that this layout cuts, or this layer spec orders, differently."""
    try:
        saved = config.parse_section(
            config.ParallelConfig, progress["config"]["parallel"], f"{directory}/progress.json"
        )
    except (KeyError, TypeError):
        return  # not a run's
    before, now = _cut(saved), _cut(policy.mesh.layout)
    before["model.spec"], now["model.spec"] = progress.get("layer_spec", "torch"), policy.layers.spec
    if before != now:
        differs = ", ".join(f"{key}={before[key]}, not {now[key]}" for key in before if before[key] != now[key])
        raise ValueError(
            f"{directory}: its optimizer state was saved as dp_reshardable, for another data-parallel size only, at "
            f"{differs}: resume with that, or save once with that and train.optimizer_format=fully_reshardable"
        )


def _cut(layout: ParallelConfig) -> dict[str, Any]:
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size")
    cut = {f"parallel.{name}": getattr(layout, name) for name in (*names, "pipeline_layers", "overlap_grad_reduce")}
    return cut | {"parallel.bucket_size": layout.bucket_size if layout.overlap_grad_reduce else None}


def _write_progress(text: str, path: Path) -> list[Path]:
    path.write_text(text, encoding="utf-8")
    return [path]


def _write_generators(states: dict[str, torch.Tensor], path: Path) -> list[Path]:
    path.write_bytes(safetensors_bytes(states))
    return [path]


def _sharded(policy: Policy, optimizer: MegatronOptimizer, kind: str, is_loading: bool) -> dict[str, Any]:
    model = {f"chunk_{i}": chunk.sharded_state_dict() for i, chunk in enumerate(policy.chunks)}
    with _padding_counted(optimizer) if kind == "fully_reshardable" else nullcontext():
        state = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=sharding(kind))
    if kind == "dp_reshardable" and not is_loading:
        _clear_padding(state["param_state"])
    return {"optimizer": state}


@contextmanager
def _padding_counted(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Let the padding behind a bucket be a part of it.

    megatron-core 0.16 gathers buckets one behind the other without it, but takes parameters from places that count it:
    those of the second bucket and the next would be cut out of their neighbours.
    """
    buffers = [b for inner in optimizer.chained_optimizers if not inner.is_stub_optimizer for b in inner.buffers]
    before = [(part, part.numel_unpadded) for buffer in buffers for part in (buffer, *buffer.buckets)]
    for buffer in buffers:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
    try:
        yield
    finally:
        for part, size in before:
            part.numel_unpadded = size


def _clear_padding(param_state: dict[Any, Any]) -> None:
    """Write zeros between parameters, where megatron-core has whatever was in memory: files shall be reproducible."""
    buffers = (by_dtype for index, by_dtype in param_state.items() if isinstance(index, int))
    for part in (
        part for by_dtype in buffers for buckets in by_dtype.values() for bucket in buckets for part in bucket
    ):
        if part["padding"].unwrap():
            for value in part.values():
                if isinstance(value, ShardedTensor):
                    value.data.zero_()


@contextmanager
def _tensors_alone(inner: Any) -> Iterator[None]:
    """Let an optimizer be given what it keeps of a parameter, without what else was saved of that.

    megatron-core 0.16 hands Adam with moments in fewer bytes the place in the buffer and whether it is padding, too.
    """
    give = inner._set_main_param_and_optimizer_states

    def given(parameter: torch.nn.Parameter, saved: dict[str, Any]) -> None:
        give(parameter, {name: value for name, value in saved.items() if isinstance(value, torch.Tensor)})

    inner._set_main_param_and_optimizer_states = given
    try:
        yield
    finally:
        del inner._set_main_param_and_optimizer_states


@torch.no_grad()
def _restore(optimizer: MegatronOptimizer, state: dict[str, Any], kind: str) -> None:
    """Load the optimizer's state.

    With torch's Adam (no Transformer Engine, no apex) megatron-core 0.16 looks for a "step" among the saved tensors,
    where it is not or is this process's own, and gives all parameters one and the same step tensor, which each of them
    would then advance.
    """
    (inner,) = optimizer.chained_optimizers
    param_state = state.pop("param_state")
    optimizer.load_state_dict(state)
    torch_state = [s for s in inner.optimizer.state.values() if isinstance(s.get("step"), torch.Tensor)]
    steps = [s.pop("step").clone() for s in torch_state]
    with _tensors_alone(inner):
        getattr(inner, f"load_parameter_state_from_{kind}")(param_state)
    for parameter_state, step in zip(torch_state, steps, strict=True):
        parameter_state["step"] = step


def _generators() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.has_cuda():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
