"""What a task is: a prompt, an answer, a reward recipe and its metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_vlmr1.rewards import answers
from megatron_vlmr1.rewards.detections import Detection
from megatron_vlmr1.rewards.item import Compat, Family, RewardItem

if TYPE_CHECKING:
    from megatron_vlmr1.types import Prompt  # brings numpy, and a reward process loads a user's task without it

INSTRUCTION = (
    "First output the thinking process in <think> </think> tags and then output the final answer in "
    "<answer> </answer> tags."
)
"""VLM-R1's; the instruction is part of the method."""

ACCURACY = "accuracy"
"""In a recipe: the reward that a row names in its `accu_reward_method`, else the task's own `accuracy`."""


@dataclass(frozen=True)
class Objects:
    """What a picture is said to show, and what it shows; boxes in pixels of the original image."""

    predicted: tuple[Detection, ...]  # in the order of the answer
    true: tuple[Detection, ...]


@dataclass(frozen=True)
class Task:
    """One file of `rewards/tasks`, or one of the user's own, holds one of these as ``TASK``.

    Attributes:
        name: the task's.
        template: what is asked; `{question}` is where the question goes.
        recipe: weight of each reward by name.
        parse: text of a completion -> what it answers, as it is written to the evaluation's rows; None: nothing.
        aggregates: name of a figure over a split -> the metric whose mean it is.
        measured_by: rewards of which the metrics are made; the reward processes compute them, in the default mode.
        metrics: text of a completion and values of `measured_by` -> value of each metric, None where it has none; these
            values themselves when empty. It runs in the rank, so that it must be quick on any text. Raises
            `RewardFailure` where the row cannot be judged.
        accuracy: the reward that `accuracy` in a recipe means where the row names none.
        worst_by: metric whose smallest values are the worst answers; the first aggregate's when empty.
        objects: text of a completion -> boxes in pixels of the original image, predicted and true. As `metrics` raises.
        split_metrics: names of the metrics of `evaluate.metrics` that need a whole split, and `objects`.
    """

    name: str
    template: str
    recipe: Mapping[str, float]
    parse: Callable[[str, Prompt], Any]
    aggregates: Mapping[str, str]
    measured_by: tuple[str, ...] = ()
    metrics: Callable[[str, Prompt, Mapping[str, float]], Mapping[str, float | None]] = lambda text, prompt, measured: (
        measured
    )
    accuracy: str = "default"
    worst_by: str = ""
    objects: Callable[[str, Prompt], Objects] | None = None
    split_metrics: tuple[str, ...] = ()

    def render(self, question: str) -> str:
        """Return the text that the model is asked; `question` has no image markers."""
        return self.template.replace("{question}", question)

    def item(
        self,
        text: str,
        prompt: Prompt,
        compat: Compat = "none",
        num_tokens: int | None = None,
        family: Family = "qwen2_5_vl",
    ) -> RewardItem:
        """Return what the reward functions judge of one completion's `text`. Several images: the first counts."""
        image = prompt.images[0] if prompt.images else None
        return RewardItem(
            completion=text,
            solution=_tagged(prompt.truth) if compat == "vlm-r1" else prompt.truth,
            image_size=image.size if image else None,
            grid_thw=image.grid_thw if image else None,
            compat=compat,
            family=family,
            num_tokens=num_tokens,
        )

    def reward(self, name: str, prompt: Prompt | None = None) -> str:
        """Return the name of the reward function that `name` in a recipe means, for one row or for any."""
        if name != ACCURACY:
            return name
        return (prompt.accuracy if prompt is not None else None) or self.accuracy

    def weights(self, recipe: Mapping[str, float], prompt: Prompt) -> dict[str, float]:
        """Return the weight of each reward function for one row."""
        weights: dict[str, float] = {}
        for name, weight in recipe.items():
            function = self.reward(name, prompt)
            weights[function] = weights.get(function, 0.0) + weight
        return weights


def _tagged(truth: str) -> str:
    """The published data pipeline tags a bare truth, and the published rewards rely on it."""
    return truth if answers.answer(truth) is not None else f"<answer> {truth.strip()} </answer>"
