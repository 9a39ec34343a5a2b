"""The frozen reference policy: a second set of values for the same parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch

from megatron_vlmr1.models.policy import Policy
from megatron_vlmr1.runtime import device


class Reference:
    """Values of this rank's parameters, kept in host memory and exchanged with the policy's for a pass."""

    def __init__(self, policy: Policy) -> None:
        """Remember the policy's present weights."""
        self._policy = policy
        self._values = [device.host_empty(p.shape, p.dtype).copy_(p.detach()) for p in policy.parameters()]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the policy the reference's weights; afterwards its own again, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @cached_property
    def _same_tower(self) -> bool:
        """Whether image embeddings are the reference's as well: a frozen tower that has its weights."""
        tower = self._policy.chunks[0].vision
        if tower is None or not self._policy.freeze_vision:
            return False
        mine = {id(parameter) for parameter in tower.parameters()}
        pairs = zip(self._policy.parameters(), self._values, strict=True)
        return all(torch.equal(parameter.cpu(), value) for parameter, value in pairs if id(parameter) in mine)

    @torch.no_grad()
    def _exchange(self) -> None:
        if not self._same_tower:
            self._policy.forget_features()
        for parameter, value in zip(self._policy.parameters(), self._values, strict=True):
            mine = parameter.detach().clone()
            parameter.copy_(value, non_blocking=True)
            value.copy_(mine, non_blocking=True)
