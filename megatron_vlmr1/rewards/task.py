"""What a task is: a prompt, an answer, a reward recipe and a metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_vlmr1.rewards import answers
from megatron_vlmr1.rewards.boxes import Box
from megatron_vlmr1.rewards.item import Compat, RewardItem
from megatron_vlmr1.types import Prompt


@dataclass(frozen=True)
class Task:
    """One file of `rewards/tasks` holds one of these as ``TASK``."""

    name: str
    template: str  # `{question}` is where the question goes
    recipe: Mapping[str, float]  # weight of each reward by name
    parse: Callable[[str, Prompt], Box | None]  # text of a completion -> box in pixels of the original image
    metrics: Callable[[str, Prompt], dict[str, float]]  # text of a completion -> value of each metric
    aggregates: Mapping[str, str]  # name of a figure over a split -> the metric whose mean it is

    def render(self, question: str) -> str:
        """Return the text that the model is asked; `question` has no image markers."""
        return self.template.replace("{question}", question)

    def item(self, text: str, prompt: Prompt, compat: Compat = "none") -> RewardItem:
        """Return what the reward functions judge of one completion's `text`. Several images: the first counts."""
        image = prompt.images[0] if prompt.images else None
        return RewardItem(
            completion=text,
            solution=_tagged(prompt.truth) if compat == "vlm-r1" else prompt.truth,
            image_size=image.size if image else None,
            grid_thw=image.grid_thw if image else None,
            compat=compat,
        )


def _tagged(truth: str) -> str:
    """The published data pipeline tags a bare truth, and the published rewards rely on it."""
    return truth if answers.answer(truth) is not None else f"<answer> {truth.strip()} </answer>"
