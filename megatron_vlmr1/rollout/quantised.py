"""Matrices of the language model's layers in FP8, for generation: half of bf16's bytes to read for each token.

A number of a row is a scale times one of e4m3 (arXiv 2209.05433), the row's largest becoming 448: each output row of a
weight has a scale, made once for each version of the weights, and each token's input has one, made as it comes. Norms,
embeddings, biases and the output layer stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from megatron_vlmr1.models.pieces import OF_A_LAYER, spec_free
from megatron_vlmr1.models.policy import Policy
from megatron_vlmr1.runtime import device

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
CAPABILITY = (9, 0)  # from here on torch multiplies with scales of rows
_LEAST = 1e-12  # so that a row of zeros has a scale
_NUMBERS = 1 << 24  # quantised at a time: in between they are fp32


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows [n, k] as numbers of e4m3 and scales [n, 1] in fp32, whose products are x but for rounding."""
    scales = torch.linalg.vector_norm(x, torch.inf, -1, True, dtype=torch.float32).clamp_(min=_LEAST).div_(LARGEST)
    return (x / scales).to(E4M3), scales


class QuantisedWeight:
    """A matrix [rows, columns]: numbers of e4m3, and a scale for each row."""

    def __init__(self, weight: torch.Tensor) -> None:
        """Take memory for the copy of a weight; `refresh` fills it."""
        self._weight = weight
        fits = weight.is_cuda and weight.dtype is torch.bfloat16
        self._multiplies = fits and device.capability() >= CAPABILITY  # in FP8; elsewhere the same numbers are emulated
        self.values = torch.empty(weight.shape, dtype=E4M3, device=weight.device)
        self.scales = torch.empty(1, len(weight), dtype=torch.float32, device=weight.device)

    @property
    def storages(self) -> tuple[tuple[torch.UntypedStorage, int], ...]:
        """The memory of both, and the bytes that they take."""
        return tuple((t.untyped_storage(), t.nbytes) for t in (self.values, self.scales))

    @torch.inference_mode()
    def refresh(self) -> None:
        """Quantise the weight as it is now, into the same memory."""
        rows = max(1, _NUMBERS // self._weight.shape[1])
        for start in range(0, len(self._weight), rows):
            part = slice(start, start + rows)
            values, scales = quantise(self._weight[part])
            self.values[part].copy_(values)
            self.scales[0, part].copy_(scales[:, 0])

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x weight^T + bias [n, rows] in the type of x [n, columns]."""
        values, scales = quantise(x)
        if self._multiplies:
            return multiply(values, scales, self.values, self.scales, bias)
        return emulate(values, scales, self.values, self.scales, bias).type_as(x)


def multiply(
    x: torch.Tensor, x_scales: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return (x x_scales) (weight scales^T)^T + bias [n, rows] in bf16, summed in fp32 on tensor cores.

    Args:
        x: [n, columns] in e4m3; both sides of the weight are multiples of 16.
        x_scales: [n, 1].
        weight: [rows, columns] in e4m3.
        scales: [1, rows].
        bias: [rows] in bf16.
    """
    return torch._scaled_mm(x.contiguous(), weight.t(), x_scales, scales, bias=bias, out_dtype=torch.bfloat16)


def emulate(
    x: torch.Tensor, x_scales: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return what `multiply` does, in fp32, on any device."""
    out = F.linear(x.float(), weight.float()).mul_(x_scales).mul_(scales)
    return out if bias is None else out.add_(bias)


def linear(x: torch.Tensor, weight: torch.Tensor | QuantisedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x weight^T + bias."""
    return weight.product(x, bias) if isinstance(weight, QuantisedWeight) else F.linear(x, weight, bias)


def tensors(weight: torch.Tensor | QuantisedWeight) -> tuple[torch.Tensor, ...]:
    """Return what a product reads of a weight."""
    return (weight.values, weight.scales) if isinstance(weight, QuantisedWeight) else (weight,)


class Matrices(NamedTuple):
    """Those of a layer, in the order of `OF_A_LAYER`."""

    qkv: QuantisedWeight
    out: QuantisedWeight
    gate_up: QuantisedWeight
    down: QuantisedWeight


class QuantisedWeights:
    """The copies of a rank's layers.

    `refresh` comes before each rollout and changes nothing while the weights stay what they are. Between two `release`s
    the copies keep their places in memory, whatever the weights' version: whoever has noted addresses, as CUDA graphs
    do, may go on with them. After one they may lie elsewhere.
    """

    def __init__(self, policy: Policy) -> None:
        """Refer to the policy's parameters; memory is taken by the first `refresh`."""
        self._policy = policy
        self._layers: list[list[Matrices]] | None = None
        self._version: int | None = None  # of the policy's weights that the copies are of; None: they have no memory

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the copies hold now."""
        return sum(storage.nbytes() for storage, _ in self._storages())

    @torch.inference_mode()
    def refresh(self) -> list[list[Matrices]]:
        """Return copies of the present weights, chunk by chunk and layer by layer."""
        chunks = self._policy.chunks  # whose parameters have all arrived
        if self._layers is None:
            self._layers = [[_matrices(layer) for layer in chunk.language.decoder.layers] for chunk in chunks]
        if self._version != self._policy.version:
            if self._version is None:
                for storage, size in self._storages():
                    storage.resize_(size)
            for weight in self._weights():
                weight.refresh()
            self._version = self._policy.version
        return self._layers

    def release(self) -> None:
        """Give their memory back; the next `refresh` quantises anew."""
        for storage, _ in self._storages():
            storage.resize_(0)
        self._version = None

    def _weights(self) -> Iterator[QuantisedWeight]:
        for layer in (layer for chunk in self._layers or [] for layer in chunk):
            yield from layer

    def _storages(self) -> Iterator[tuple[torch.UntypedStorage, int]]:
        for weight in self._weights():
            yield from weight.storages


def _matrices(module: torch.nn.Module) -> Matrices:
    held = {spec_free(name): parameter for name, parameter in module.named_parameters()}
    return Matrices(*(QuantisedWeight(held[name]) for name in OF_A_LAYER if held[name].dim() == 2))
