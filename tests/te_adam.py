"""A stand-in for Transformer Engine's FusedAdam, which needs a GPU: the same state and methods, computed by torch.

Written after `transformer_engine/pytorch/optimizers/fused_adam.py` of Transformer Engine 2. The state of a parameter is
`exp_avg`, `exp_avg_sq` and, with `master_weights`, `master_param`; fp16 and e4m3 ("uint8") have a scale for each
tensor; gradients are in `decoupled_grad`; a step makes fp32 copies of moments; state is given and taken in fp32. Where
the real one can be had, `install` leaves it in its place.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch
from packaging.version import Version

from megatron_vlmr1.runtime import device

_LARGEST = {torch.float16: torch.finfo(torch.float16).max / 2, torch.uint8: 448.0}


class Float8Tensor(torch.Tensor):
    """Numbers of e4m3, which nobody may look at but by its methods: as such it has no memory."""

    _data: torch.Tensor  # uint8

    @staticmethod
    def __new__(cls, shape: torch.Size) -> Float8Tensor:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)

    def __init__(self, shape: torch.Size) -> None:
        self._data, self._scale_inv = torch.zeros(shape, dtype=torch.uint8), torch.ones(1)

    def float(self) -> torch.Tensor:
        return self._data.view(torch.float8_e4m3fn).float() * self._scale_inv

    def quantize_(self, x: torch.Tensor, scale: torch.Tensor) -> None:
        self._data.copy_((x * scale).to(torch.float8_e4m3fn).view(torch.uint8))
        self._scale_inv.copy_(1 / scale)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise AssertionError(f"{function} of an FP8 tensor")


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        *,
        adam_w_mode: bool = True,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode and not (store_param_remainders or capturable) and master_weight_dtype is torch.float32
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.master_weights, self.use_decoupled_grad = master_weights, use_decoupled_grad
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype, "master_param": torch.float32}
        self._scales: dict[torch.Tensor, dict[str, torch.Tensor]] = {}

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool) -> None:
        assert not store_param_remainders
        for name in ("exp_avg", "exp_avg_sq"):
            self._make(param, name)
        if self.master_weights:
            self.set_scaled_state(param, "master_param", param.detach().clone().float())

    def _make(self, param: torch.Tensor, name: str) -> None:
        dtype = self.dtypes[name]
        made = Float8Tensor(param.shape) if dtype is torch.uint8 else torch.zeros(param.shape, dtype=dtype)
        self.state[param][name] = made
        if dtype is not torch.float32:
            self._scales.setdefault(param, {})[name] = torch.ones(())

    def get_unscaled_state(self, param: torch.Tensor, name: str) -> torch.Tensor:
        kept = self.state[param][name]
        assert kept.dtype is (torch.float32 if isinstance(kept, Float8Tensor) else self.dtypes[name])
        if self.dtypes[name] is torch.float32:
            return kept
        return kept.float() * self._scales[param][name] if self.dtypes[name] is torch.float16 else kept.float()

    def _apply_scale(self, name: str, unscaled: torch.Tensor, scaled: torch.Tensor, scale: torch.Tensor) -> None:
        """As Transformer Engine has it: a tensor of zeros has no scale in e4m3."""
        if scaled.dtype is torch.bfloat16:
            scaled.copy_(unscaled)
            return
        torch.div(unscaled.abs().max(), _LARGEST[self.dtypes[name]], out=scale)
        if isinstance(scaled, Float8Tensor):
            scaled.quantize_(unscaled, 1 / scale)
        else:
            scaled.copy_(unscaled * torch.where(scale > 0, scale.reciprocal(), 0.0))

    def set_scaled_state(self, param: torch.Tensor, name: str, value: torch.Tensor) -> None:
        assert value.dtype is torch.float32
        if name not in self.state[param]:
            self._make(param, name)
        if self.dtypes[name] is torch.float32:
            self.state[param][name].copy_(value)
        else:
            self._apply_scale(name, value, self.state[param][name], self._scales[param][name])

    def state_dict(self) -> dict[str, Any]:
        out = super().state_dict()
        params = [p for group in self.param_groups for p in group["params"]]
        for key, state in out["state"].items():
            out["state"][key] = {name: self.get_unscaled_state(params[key], name) for name in state}
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = state_dict["state"]
        super().load_state_dict({**state_dict, "state": {}})
        params = [p for group in self.param_groups for p in group["params"]]
        for key, values in state.items():
            self.state[params[key]] = {}
            for name, value in values.items():
                self.set_scaled_state(params[key], name, value.float())

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in (group for group in self.param_groups if group["params"]):
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), step = group["betas"], group["step"]
            for p in group["params"]:
                if not self.state[p]:
                    self.initialize_state(p, False)
                gradient = p.decoupled_grad if self.use_decoupled_grad else p.grad
                if gradient is None:
                    continue
                first, second = (self.get_unscaled_state(p, name).clone() for name in ("exp_avg", "exp_avg_sq"))
                first.lerp_(gradient, 1 - beta1)
                second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                master = self.state[p]["master_param"] if self.master_weights else p
                master.mul_(1 - group["lr"] * group["weight_decay"])
                root = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
                master.addcdiv_(first / (1 - beta1**step), root, value=-group["lr"])
                if self.master_weights:
                    p.copy_(master)
                for name, value in (("exp_avg", first), ("exp_avg_sq", second)):
                    self.set_scaled_state(p, name, value)


def install(monkeypatch: Any) -> None:
    """Let megatron-core find this Adam where Transformer Engine's would be, and is not."""
    if device.has_cuda() and importlib.util.find_spec("transformer_engine") is not None:
        return
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import distrib_optimizer

    monkeypatch.setattr(utils, "_te_version", Version("2.9.0"))
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["transformer_engine.pytorch.optimizers"], "FusedAdam", FusedAdam, raising=False)
    monkeypatch.setattr(optimizer, "Adam", FusedAdam)
    monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(distrib_optimizer, "Adam", FusedAdam)
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    monkeypatch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", True)
