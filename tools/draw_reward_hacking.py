"""Draws docs/results/reward_hacking.png and prints the table of docs/reward_hacking.md.

Usage: python tools/draw_reward_hacking.py
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_vlmr1.rewards import functions
from megatron_vlmr1.rewards.item import Compat, RewardItem

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "results" / "reward_hacking.png"
OBJECTS = [("cat", [40, 60, 180, 220]), ("cat", [200, 80, 330, 240]), ("cat", [360, 40, 520, 200])]
MOST = 24
REWARDS: list[tuple[str, Compat]] = [
    ("map", "vlm-r1"),
    ("odLength", "vlm-r1"),
    ("weighted_sum", "vlm-r1"),
    ("map", "none"),
    ("odLength", "none"),
    ("weighted_sum", "none"),
]

Boxes = list[tuple[str, list[int]]]


def duplicates(count: int) -> Boxes:
    """The right boxes, again and again."""
    return (OBJECTS * count)[:count]


def invented(count: int) -> Boxes:
    """The right boxes, then boxes of a class that the image lacks."""
    return (OBJECTS + [("bird", [40, 60, 180, 220])] * count)[:count]


SCENES = {"duplicates of the right boxes": duplicates, "boxes of an absent class": invented}


def value(name: str, compat: Compat, boxes: Boxes) -> float:
    """Return the reward of an answer of `boxes` where OBJECTS is the truth."""
    return functions.get(name)(RewardItem(f"<think>t</think>{_answer(boxes)}", _answer(OBJECTS), compat=compat))


def table() -> str:
    """Return the rewards of 3 and of MOST boxes as a Markdown table."""
    rows = [
        "| reward | 3 right boxes | " + " | ".join(f"+ {MOST - 3} {scene}" for scene in SCENES) + " |",
        "|---|---|" + "---|" * len(SCENES),
    ]
    for name, compat in REWARDS:
        values = [value(name, compat, OBJECTS), *(value(name, compat, scene(MOST)) for scene in SCENES.values())]
        rows.append(f"| {_title(name, compat)} | " + " | ".join(f"{number:.3f}" for number in values) + " |")
    return "\n".join(rows)


def draw() -> None:
    """Write PICTURE: each reward against the number of boxes in the answer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(SCENES), figsize=(11, 4.2), sharey=True, layout="constrained")
    counts = range(len(OBJECTS), MOST + 1)
    for axis, (scene, boxes) in zip(axes, SCENES.items(), strict=True):
        for name, compat in REWARDS:
            values = [value(name, compat, boxes(count)) for count in counts]
            colour = {"map": "tab:red", "odLength": "tab:blue", "weighted_sum": "tab:green"}[name]
            axis.plot(counts, values, "--" if compat == "vlm-r1" else "-", color=colour, label=_title(name, compat))
        axis.set_title(scene)
        axis.set_xlabel(f"boxes in the answer; the image has {len(OBJECTS)} objects")
        axis.set_ylim(0, 1.05)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("reward")
    handles, titles = axes[0].get_legend_handles_labels()
    figure.legend(handles, titles, loc="outside lower center", ncols=len(REWARDS), fontsize="small")
    figure.savefig(PICTURE, dpi=110)


def _answer(boxes: Boxes) -> str:
    return f"<answer>```json\n{json.dumps([{'bbox_2d': box, 'label': label} for label, box in boxes])}\n```</answer>"


def _title(name: str, compat: Compat) -> str:
    return f"{name}, {'published' if compat == 'vlm-r1' else 'default'}"


if __name__ == "__main__":
    draw()
    print(table())
