"""In which types a run computes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from megatron_vlmr1.config.section import NonNegativeInt, PositiveInt, Section

# Gradients need range where one scale serves a whole tensor; where each block has its own, they need digits.
_FORMATS = {"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3"}


class PrecisionConfig(Section):
    """Types of numbers. A plain word in place of this section is its dtype: precision=bf16."""

    dtype: Literal["fp32", "bf16"] = "bf16"
    """Of parameters and activations; the optimizer keeps fp32 masters."""
    fp8: Literal["none", "delayed", "tensorwise", "blockwise"] = "none"
    """Recipe by which the matrix products of the language model's layers are computed in FP8 in training; vision tower,
    embeddings, attention, log-probs and generation stay in bf16. delayed: one scale a tensor, from earlier steps;
    tensorwise: one a tensor, from itself; blockwise: one for each 128 numbers of an activation and each 128 x 128 of a
    weight. Needs Transformer Engine and a GPU of compute capability 8.9, blockwise 9.0."""
    num_layers_at_start_in_bf16: NonNegativeInt = 0
    """With tensorwise or blockwise: so many first layers stay in bf16."""
    num_layers_at_end_in_bf16: NonNegativeInt = 0
    """With tensorwise or blockwise: so many last layers stay in bf16."""
    amax_history_len: PositiveInt | None = None
    """With delayed: largest values of so many passes are remembered; 1 when empty."""
    amax_compute_algo: Literal["most_recent", "max"] | None = None
    """With delayed: which of the remembered values sets the scale; most_recent when empty."""

    @model_validator(mode="before")
    @classmethod
    def _word_is_a_dtype(cls, raw: Any) -> Any:
        return {"dtype": raw} if isinstance(raw, str) else raw

    @model_validator(mode="after")
    def _as_megatron_core_allows(self) -> PrecisionConfig:
        in_bf16 = [name for name in _LAYERS_IN_BF16 if getattr(self, name)]
        amax = [name for name in ("amax_history_len", "amax_compute_algo") if getattr(self, name) is not None]
        if self.fp8 != "none" and self.dtype != "bf16":
            raise ValueError(f"fp8={self.fp8} needs dtype=bf16, which all but the products in FP8 are computed in")
        if self.fp8 == "none" and in_bf16 + amax:
            raise ValueError(f"{(in_bf16 + amax)[0]} is about FP8, but fp8=none")
        if self.fp8 == "delayed" and in_bf16:
            raise ValueError(
                f"fp8=delayed does not take {in_bf16[0]}: its largest values are exchanged once for all layers, so "
                "that none can be left out; tensorwise and blockwise take it"
            )
        if self.fp8 not in ("none", "delayed") and amax:
            raise ValueError(f"fp8={self.fp8} does not take {amax[0]}: only delayed remembers earlier values")
        return self

    @property
    def products(self) -> Literal["fp32", "bf16", "fp8"]:
        """What the language model's layers multiply matrices in, in training."""
        return self.dtype if self.fp8 == "none" else "fp8"

    def megatron_core(self) -> dict[str, Any]:
        """Return the FP8 part as megatron-core's own settings."""
        if self.fp8 == "none":
            return {}
        out: dict[str, Any] = {"fp8": _FORMATS[self.fp8], "fp8_recipe": self.fp8}
        if self.fp8 == "delayed":
            # Data-parallel ranks have unlike numbers of micro-batches, and this recipe exchanges values in each.
            return out | {
                "fp8_amax_history_len": self.amax_history_len or 1,
                "fp8_amax_compute_algo": self.amax_compute_algo or "most_recent",
                "tp_only_amax_red": True,
            }
        if any(getattr(self, name) for name in _LAYERS_IN_BF16):
            out |= {"first_last_layers_bf16": True} | {name: getattr(self, name) for name in _LAYERS_IN_BF16}
        return out


_LAYERS_IN_BF16 = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
