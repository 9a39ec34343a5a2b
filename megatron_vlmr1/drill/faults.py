"""What can go wrong, where and when: a fault is (rank, step, point, action). No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Point:
    """A function of the program, ``module:name`` or ``module:Class.name``; if `within` is set, only below that one."""

    function: str
    within: str = ""


_STEP = "megatron_vlmr1.grpo.update:Updater.step"
_SAVE = "megatron_vlmr1.train.checkpoints:Checkpoints.save"
POINTS = {
    "rollout": Point("megatron_vlmr1.rewards.judges:Judges.submit"),  # the first completion of the step has ended
    "reward": Point("megatron_vlmr1.rewards.judges:Judges.collect"),
    "forward": Point("megatron_vlmr1.models.attention:CoreAttention.forward", _STEP),
    "loss": Point("megatron_vlmr1.models.policy:Policy.logprobs", _STEP),
    "gradient": Point("megatron_vlmr1.parallel.optimizer:_finalize_gradients"),
    "all-reduce": Point("torch.distributed:all_reduce", _STEP),
    "optimizer": Point("megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.step_with_ready_grads"),
    "save": Point(_SAVE),
    "save-file": Point("megatron_vlmr1.checkpoint.state:_write_generators"),  # each rank's own file of a checkpoint
    "fsync": Point("os:fsync"),
    "after-step": Point("megatron_vlmr1.train.run:Run.after_step"),
}
# With the argument that each takes behind a colon.
ACTIONS = {
    "kill": "",
    "stop": "",
    "hang": "",
    "raise": "",
    "signal": "number",
    "oserror": "name, such as ENOSPC",
    "nan": "",  # loss: of the log-probs; gradient: of the last number of the gradient buffer
    "flip": "",  # after-step: a bit of the first parameter
    "flip-master": "",  # after-step: a bit of the first fp32 master
    "kill-at": "count",  # save: at its so-manieth file operation
    "remount": "options@directory",
    "chmod": "mode@directory",
}


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong, once.

    Attributes:
        rank: where.
        step: when; steps done before it, counted from 0. For what belongs to a save: the steps of the checkpoint.
        point: a name of `POINTS`.
        action: a name of `ACTIONS`, with its argument behind a colon.
    """

    rank: int
    step: int
    point: str
    action: str

    def __post_init__(self) -> None:
        name, _, argument = self.action.partition(":")
        if self.point not in POINTS:
            raise ValueError(f"fault point {self.point!r}: expected one of {', '.join(POINTS)}")
        if name not in ACTIONS or bool(argument) != bool(ACTIONS[name]):
            known = ", ".join(f"{key}:{value.upper()}" if value else key for key, value in ACTIONS.items())
            raise ValueError(f"fault action {self.action!r}: expected one of {known}")


def to_text(faults: Sequence[Fault]) -> str:
    """Return faults as JSON, for a command line."""
    return json.dumps([asdict(fault) for fault in faults])


def from_text(text: str) -> list[Fault]:
    """Read what `to_text` returned.

    Raises:
        ValueError: it is something else.
    """
    try:
        return [Fault(**row) for row in json.loads(text)]
    except TypeError as error:
        raise ValueError(f"faults {text!r}: {error}") from error
