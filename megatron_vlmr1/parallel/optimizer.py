"""megatron-core's data-parallel wrapper and distributed optimizer, set up for our models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed import finalize_model_grads as megatron_finalize
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from megatron_vlmr1.config import OptimizerConfig
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.parallel.overlap import DataParallel
from megatron_vlmr1.runtime import device

_MOMENTS: Final = {"bf16": (torch.bfloat16, torch.float16), "fp8": (torch.uint8, torch.float16)}
"""Types of the first and of the second moment, as Transformer Engine's Adam wants to be told of them; uint8 is e4m3."""

_NOTHING: Final = 1e-30  # of a first moment: with Adam's usual epsilon a step of 1e-22 learning rates


def wrap(chunks: Sequence[MegatronModule], mesh: Mesh) -> list[DataParallel]:
    """Put each chunk's gradients into flat fp32 buffers that are summed over data-parallel ranks.

    Transformer Engine's linear layers, where there are any, add the gradients of their weights to the buffers as they
    multiply, in fp32.
    """
    layout = mesh.layout
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=layout.overlap_grad_reduce,
        overlap_param_gather=layout.overlap_param_gather,
        bucket_size=layout.bucket_size,
    )
    ddp = [DataParallel(c.config, settings, c, pg_collection=mesh.groups) for c in chunks]
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = _finalize_gradients
        chunk.config.no_sync_func = [each.no_sync for each in ddp] if len(ddp) > 1 else ddp[0].no_sync
        for module in chunk.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):  # without buffers to add to, its forward pass would fail
                module.fuse_wgrad_accumulation = True
    return ddp


def build(cfg: OptimizerConfig, ddp: Sequence[DataParallel]) -> MegatronOptimizer:
    """Create Adam with fp32 masters, its state shared out over the data-parallel ranks.

    Matrices decay; biases and norms don't. The Adam is Transformer Engine's or apex's where megatron-core finds one.
    """
    dtype = ddp[0].config.params_dtype
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=cfg.lr,
            min_lr=0.0,
            weight_decay=cfg.weight_decay,
            adam_beta1=cfg.beta1,
            adam_beta2=cfg.beta2,
            adam_eps=cfg.eps,
            clip_grad=cfg.clip_grad,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=ddp[0].ddp_config.overlap_param_gather,
            **_moment_types(cfg),
        ),
        list(ddp),
    )
    if cfg.moments_dtype == "fp8":
        _mend_scaling(optimizer)
    if cfg.moments_dtype != "fp32":
        initialise(optimizer)  # this Adam holds the masters, too: they are there from the start, as others are
    for group in optimizer.param_groups:
        # megatron-core marks biases and norms with 0, and leaves it to its own scheduler to heed the mark.
        group["weight_decay"] = cfg.weight_decay * group["wd_mult"]
    return optimizer


def _moment_types(cfg: OptimizerConfig) -> dict[str, Any]:
    """Return what megatron-core calls a precision-aware optimizer.

    Without the FP8 recipe, which it asks for because of parameters that are in FP8 themselves: ours never are. Masters
    whole, not as what bf16 parameters lack of them: those could not be saved as masters.
    """
    if cfg.moments_dtype == "fp32":
        return {}
    first, second = _MOMENTS[cfg.moments_dtype]
    types = {"exp_avg_dtype": first, "exp_avg_sq_dtype": second, "main_params_dtype": torch.float32}
    return {"use_precision_aware_optimizer": True, "store_param_remainders": False, **types}


def _mend_scaling(optimizer: MegatronOptimizer) -> None:
    """Let a moment that is all zeros have a scale in e4m3, such as that of a tower which no prompt has needed yet.

    Transformer Engine's Adam takes the largest number of a tensor for its scale, and the inverse of that: zeros would
    become NaN. So one of them becomes a number that is lost beside any other.
    """
    (inner,) = optimizer.chained_optimizers
    apply = inner.optimizer._apply_scale

    def mended(name: str, numbers: torch.Tensor, *rest: torch.Tensor) -> None:
        if name == "exp_avg":  # the second is not in e4m3
            numbers.view(-1)[:1].add_(_NOTHING)
        apply(name, numbers, *rest)

    inner.optimizer._apply_scale = mended


def adam(optimizer: MegatronOptimizer) -> str:
    """Return which Adam it is: "apex", "torch" or "transformer_engine"."""
    (inner,) = optimizer.chained_optimizers
    return type(inner.optimizer).__module__.partition(".")[0]


def initialise(optimizer: MegatronOptimizer) -> None:
    """Give Adam its state before the first step, as that step would; a state that is there stays."""
    (inner,) = optimizer.chained_optimizers
    steps = isinstance(inner.optimizer, torch.optim.Adam | torch.optim.AdamW)  # counted for each parameter
    for shard in (shard for group in inner.optimizer.param_groups for shard in group["params"]):
        if inner.optimizer.state.get(shard):
            continue
        if inner.config.use_precision_aware_optimizer:
            inner.optimizer.initialize_state(shard, False)  # no remainders in place of masters
            continue
        inner.optimizer.state[shard] = {"step": torch.zeros((), dtype=torch.float32)} if steps else {}
        for name in ("exp_avg", "exp_avg_sq"):
            inner.optimizer.state[shard][name] = torch.zeros_like(shard)


def states(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, dict[str, torch.Tensor]]]:
    """Yield each parameter that this rank has a part of the state of, with that part: flat tensors, as they are stored.

    "master" is there always (in fp32 training it is a part of the parameter itself), what Adam keeps besides once there
    was a step, or `initialise`.
    """
    for inner in optimizer.chained_optimizers:
        if inner.is_stub_optimizer:
            continue
        for parameter in (p for group in inner.model_float16_groups + inner.model_fp32_groups for p in group):
            group, place = inner.model_param_group_index_map[parameter]
            shard = inner.optimizer.param_groups[group]["params"][place]
            state = {"master": shard, **inner.optimizer.state.get(shard, {})}
            state["master"] = state.pop("master_param", shard)  # where Adam holds it
            yield parameter, {k: _stored(t) for k, t in state.items() if isinstance(t, torch.Tensor) and t.dim()}


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    """Return the numbers of a tensor; those of Transformer Engine's FP8 tensors lie in another one within."""
    return getattr(tensor, "_data", tensor)


def _finalize_gradients(
    model: list[DataParallel],
    num_tokens: torch.Tensor | None = None,
    pg_collection: ProcessGroupCollection | None = None,
    force_all_reduce: bool = False,
) -> None:
    """Sum gradients over whatever ranks saw a part. Losses arrive normalised, so `num_tokens` is not used."""
    del num_tokens
    megatron_finalize(model, None, pg_collection=pg_collection, force_all_reduce=force_all_reduce)
    assert pg_collection is not None
    if pg_collection.tp.size() == 1:
        return
    shared = [
        p.main_grad
        for chunk in model
        for p in chunk.module.parameters()
        if p.requires_grad and getattr(p, "sum_gradients_across_tp", False)
    ]
    if shared:
        flat = torch.cat([g.reshape(-1) for g in shared])
        dist.all_reduce(flat, group=pg_collection.tp)
        for gradient, part in zip(shared, flat.split([g.numel() for g in shared]), strict=True):
            gradient.copy_(part.view_as(gradient))


def gradients_finite(ddp: Sequence[DataParallel], losses: Sequence[torch.Tensor] = ()) -> bool:
    """Whether every gradient, and loss [], on every rank of the world is finite; all ranks get the same answer.

    So must be the norm: by an infinite one, gradients would be scaled to zero and Adam would step by its momentum.
    """
    bad = torch.zeros(1, device=device.device())
    for loss in losses:
        bad += (~torch.isfinite(loss)).float()
    for buffer in (buffer for chunk in ddp for buffer in chunk.buffers):
        bad += (~torch.isfinite(torch.linalg.vector_norm(buffer.grad_data))).float()
    dist.all_reduce(bad, dist.ReduceOp.MAX)
    return not bool(bad)


def learning_rate(cfg: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate of optimizer step `step` (from 0) of `steps`: linear warm-up, then the decay."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / (cfg.warmup_steps + 1)
    if cfg.decay == "constant":
        return cfg.lr
    left = 1.0 - min(1.0, (step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps))
    shape = left if cfg.decay == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))
    return cfg.lr * (cfg.min_lr_ratio + (1.0 - cfg.min_lr_ratio) * shape)


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    """Use `lr` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr
