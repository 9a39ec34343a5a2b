"""Generated detection scenes: several coloured shapes, and a question that names classes, some of them absent.

A class is a colour and a shape, such as "red circle"; a picture may hold several of one class. Splits are those of
`scenes`: train and held-out pictures never hold the unseen classes, and out-of-domain ones ask for one that is there,
among more objects. As there, everything is a function of (split, index), and no layout is in two splits.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_vlmr1.data.scenes import (
    BARE_SHARE,
    COLOURS,
    SHAPES,
    UNSEEN,
    Box,
    SceneObject,
    Split,
    Style,
    free_box,
    layout_hash,
    numbers,
    paint,
    png,
    pushed,
    recipe_of,
)
from megatron_vlmr1.data.written import write_rows

QUESTION = "Detect every object of these classes in the picture: {classes}."
CLASSES = tuple(itertools.product(sorted(COLOURS), SHAPES))
LARGEST, SMALLEST = 36, 20  # pixels
OBJECTS: Mapping[str, tuple[int, ...]] = {"train": (2, 3, 4), "heldout": (3, 4), "ood": (4, 5)}
MOST_ASKED = 4  # classes that a question names
NONE_SHARE = 0.15  # questions, in domain, of which no class is there
REPEAT_SHARE = 0.4  # objects after the first of the class of an earlier one
_STREAM = 1  # keeps the random numbers apart from those of `scenes`


@dataclass(frozen=True)
class DetectionScene:
    """A picture and the classes that are asked for."""

    split: str
    index: int
    image: Image.Image  # RGB, scenes.SIZE x scenes.SIZE
    objects: tuple[SceneObject, ...]
    asked: tuple[str, ...]
    loose: tuple[Box, ...]  # box of each object as a rough SFT answer has it
    bare: bool  # whether a rough SFT answer is JSON without tags

    @property
    def found(self) -> tuple[int, ...]:
        """Numbers of the objects of the asked classes, class by class as the question names them."""
        return tuple(i for name in self.asked for i, item in enumerate(self.objects) if label(item) == name)

    @property
    def key(self) -> str:
        """Name of the row and its picture."""
        return f"ovd-{self.split}-{self.index:06d}"


def label(item: SceneObject) -> str:
    """Return an object's class."""
    return f"{item.colour} {item.shape}"


def scene(split: str, index: int) -> DetectionScene:
    """Draw scene `index` >= 0 of `split`, always the same.

    Raises:
        ValueError: unknown split, or a negative index.
    """
    recipe = recipe_of(split, index)
    rng = np.random.RandomState([recipe.seed, index, _STREAM])
    while True:
        objects = _layout(rng, recipe, OBJECTS[split])
        if objects and int(layout_hash(objects)[-1], 16) % 8 in recipe.residues:
            break
    asked = _asked(rng, recipe, [label(item) for item in objects])
    loose = tuple(pushed(rng, item.box) for item in objects)
    bare = bool(rng.random_sample() < BARE_SHARE)
    return DetectionScene(split, index, paint(rng, objects), objects, asked, loose, bare)


def _layout(rng: np.random.RandomState, recipe: Split, counts: Sequence[int]) -> tuple[SceneObject, ...]:
    """Place objects without overlap, the first of an unseen class where the split has them; empty without room."""
    objects: list[SceneObject] = []
    for position in range(int(counts[rng.randint(len(counts))])):
        wanted = recipe.unseen and position == 0
        choices = [kind for kind in CLASSES if (kind in UNSEEN) == wanted]
        colour, shape = choices[rng.randint(len(choices))]
        if objects and rng.random_sample() < REPEAT_SHARE:
            earlier = objects[rng.randint(len(objects))]
            colour, shape = earlier.colour, earlier.shape
        box = free_box(rng, [item.box for item in objects], SMALLEST, LARGEST)
        if box is None:
            return ()
        objects.append(SceneObject(colour, shape, box))
    return tuple(objects)


def _asked(rng: np.random.RandomState, recipe: Split, present: list[str]) -> tuple[str, ...]:
    """Choose up to MOST_ASKED classes in random order; of an unseen class that is there, that one."""
    here = list(dict.fromkeys(present))
    # In domain an unseen class is not even named: a question must not tell what training never shows.
    absent = [
        " ".join(kind) for kind in CLASSES if " ".join(kind) not in here and (recipe.unseen or kind not in UNSEEN)
    ]
    named = 1 + int(rng.randint(MOST_ASKED))
    of_these = 0 if not recipe.unseen and rng.random_sample() < NONE_SHARE else 1 + int(rng.randint(named))
    first = here[:1] if recipe.unseen else []
    others = [here[i] for i in rng.permutation(len(here)) if here[i] not in first]
    chosen = (first + others)[:of_these]
    chosen += [absent[i] for i in rng.permutation(len(absent))[: named - len(chosen)]]
    return tuple(chosen[i] for i in rng.permutation(len(chosen)))


def answer(item: DetectionScene, boxes: Sequence[Box]) -> str:
    """Return the asked objects as JSON, each with its one of `boxes`, or "None" where there are none."""
    found = [{"bbox_2d": list(boxes[i]), "label": label(item.objects[i])} for i in item.found]
    return json.dumps(found) if found else "None"


def sft_text(item: DetectionScene, style: Style) -> str:
    """What SFT teaches: ``caption`` says which class is where, ``clean`` adds true boxes, ``rough`` loose ones."""
    places: dict[str, list[str]] = {name: [] for name in item.asked}
    for i in item.found:
        places[label(item.objects[i])].append(item.objects[i].place)
    caption = (
        "<think> " + ", ".join(f"{n} {' and '.join(where) or 'none'}" for n, where in places.items()) + " </think>"
    )
    if style == "caption":
        return caption
    found = answer(item, item.loose if style == "rough" else [thing.box for thing in item.objects])
    return found if style == "rough" and item.bare else f"{caption}<answer>{found}</answer>"


def row(item: DetectionScene, style: Style = "rough") -> dict[str, Any]:
    """The scene as a row of VLM-R1's jsonl, with its SFT text (:func:`sft_text`) and the layout's hash beside it."""
    truth = answer(item, [thing.box for thing in item.objects])
    human = "<image>" + QUESTION.format(classes=", ".join(item.asked))
    return {
        "id": item.key,
        "image": f"{item.key}.png",
        "conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": truth}],
        "completion": sft_text(item, style),
        "scene_hash": layout_hash(item.objects),
    }


def write_split(directory: str | Path, split: str, count: int, start: int = 0, style: Style = "rough") -> Path:
    """Write scenes as `scenes.write_split` does; return the jsonl's path.

    Raises:
        ValueError: unknown split, a count below 1, or `directory` cannot be written.
    """
    drawn = (scene(split, index) for index in numbers(split, count, start))
    return write_rows(directory, split, ((row(item, style), {f"{item.key}.png": png(item.image)}) for item in drawn))
