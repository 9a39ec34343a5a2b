"""The optimizer, and where its state is."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from megatron_vlmr1.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, Section


class OptimizerConfig(Section):
    """Adam with decoupled weight decay, through megatron-core's distributed optimizer."""

    lr: PositiveFloat = 1e-6
    beta1: NonNegativeFloat = 0.9
    beta2: NonNegativeFloat = 0.999
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    warmup_steps: NonNegativeInt = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after the warm-up, over train.steps."""
    min_lr_ratio: NonNegativeFloat = 0.0
    """Last learning rate divided by the first."""
    moments_dtype: Literal["fp32", "bf16", "fp8"] = "fp32"
    """What Adam's moments are kept in between steps; masters stay in fp32. bf16: the first in bf16, the second in fp16;
    fp8: the first in e4m3, the second in fp16 (arXiv 2310.18313); e4m3 and fp16 with a scale for each tensor. Saved in
    fp32, so that a run may go on with another. Needs precision.dtype=bf16 and Transformer Engine's Adam."""
    offload: Literal["none", "rollout", "always"] = "none"
    """Where gradients and the optimizer's state (fp32 masters, moments) are while nothing needs them. none: on the
    device; rollout: until a step's update the gradients' memory is given back, and the state is in host memory, pinned
    on a GPU; always: the state is there in forward and backward too, and on the device for the optimizer's step and
    saves alone. The bits are the same; it costs two copies of the state over the bus in a step."""

    @model_validator(mode="after")
    def _moments_decay(self) -> OptimizerConfig:
        """Refuse moments whose digits end before what a step takes away: they would only ever grow."""
        for key, digits in zip(("beta1", "beta2"), MOMENT_DIGITS.get(self.moments_dtype, ()), strict=False):
            most = 1 - 2.0**-digits  # half a unit in the last digit, of a number that begins with one
            if getattr(self, key) > most:
                raise ValueError(
                    f"moments_dtype={self.moments_dtype} with {key}={getattr(self, key)}: so small a decay is lost in "
                    f"{digits} binary digits; {key} may be {most:.6g} at most"
                )
        return self


# Binary digits of the first and of the second moment.
MOMENT_DIGITS = {"bf16": (8, 11), "fp8": (4, 11)}
