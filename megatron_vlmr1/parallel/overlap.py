"""megatron-core's data-parallel wrapper, whose collectives may run beside the computation in an order that is safe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel


class DataParallel(DistributedDataParallel):
    """One chunk of the model with its gradient buffers.

    With `overlap_grad_reduce` a bucket is summed as soon as backward has all of its gradients. megatron-core starts a
    bucket whenever that is, and waits for gradients that a first step has had. But a micro-batch without images has
    none for the tower, and the tower's backward comes before that of the embedding, which lies in an earlier bucket:
    data-parallel ranks would sum unlike buckets with each other, or wait for ever. So buckets are started in the order
    in which they lie, and what is left when backward is done is started then.

    With `overlap_param_gather` parameters are gathered from `gather` on, until `settle` has waited for them.
    megatron-core waits in hooks of the modules that use them; log-probs, generation and checksums use them without.
    """

    def enable_forward_pre_hook(self) -> None:
        """Do without megatron-core's hooks."""

    def zero_grad_buffer(self) -> None:
        """Set all gradients to zero, and begin a step."""
        for group in self.bucket_groups:
            group.per_param_grad_ready_counts = {}  # so that megatron-core learns no pattern from it
        super().zero_grad_buffer()
        self._missing = [set(group.params) for group in self.bucket_groups]
        self._started = 0  # buckets

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Wait until all gradients are summed over the data-parallel ranks."""
        super().finish_grad_sync(force_all_reduce=force_all_reduce)
        self._missing = []

    def gather(self) -> bool:
        """Begin to gather the parameters that the optimizer has just changed; say whether that is left to do."""
        if self.ddp_config.overlap_param_gather:
            self.start_param_sync()
        return bool(self.ddp_config.overlap_param_gather)

    def settle(self) -> None:
        """Wait until no parameter is being gathered."""
        for group in self.bucket_groups:
            if group.param_gather_handle is not None:
                group.finish_param_sync(skip_next_bucket_dispatch=True)

    def _make_backward_post_hook(self, param: torch.nn.Parameter) -> Callable[..., None]:
        add: Callable[..., None] = super()._make_backward_post_hook(param)
        if not self.ddp_config.overlap_grad_reduce:
            return add

        def hook(*unused: Any) -> None:
            add(*unused)
            self._ready(param)

        return hook

    def _ready(self, param: torch.nn.Parameter) -> None:
        """Start what can be, now that a parameter's gradient is whole if this is the last micro-batch."""
        group = self.param_to_bucket_group[param]
        if not group.is_last_microbatch:
            return
        number = self.bucket_groups.index(group)
        assert number >= self._started, "a gradient that came after its bucket was summed"
        self._missing[number].discard(param)
        while self._started < len(self._missing) and not self._missing[self._started]:
            self.bucket_groups[self._started].start_grad_sync(self.force_all_reduce)
            self._started += 1
