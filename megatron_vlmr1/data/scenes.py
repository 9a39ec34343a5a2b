"""Generated grounding scenes: coloured shapes on a noisy background, and a sentence that means one of them.

Everything is a function of (split, index): the scene, its sentence, its true box and the rough answer for SFT.
Shapes are painted as numpy masks from a frozen random stream, so pixels depend on no library's drawing code.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from megatron_vlmr1.data.written import write_rows

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (205, 45, 45),
    "green": (45, 165, 60),
    "blue": (50, 75, 205),
    "yellow": (225, 200, 45),
}
SHAPES = ("circle", "square", "triangle")
UNSEEN = frozenset({("red", "square"), ("green", "triangle"), ("blue", "circle")})
"""Combinations kept out of every training and held-out picture; the target of every out-of-domain one."""

QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: {expression}"
"""VLM-R1's question for referring expression comprehension."""

SIZE = 112  # pixels; a multiple of patch * merge = 28, so that answers need no rescaling
MARGIN = 2  # pixels between two objects, and between an object and the edge
LARGEST, SMALLEST = 50, 28
PUSH = 0.32  # rough boxes: each side moves outward by up to this share of the object's size
BARE_SHARE = 0.3  # rough answers that are JSON without tags

Style = Literal["caption", "clean", "rough"]
Box = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels; x2 and y2 are the first pixel beyond


@dataclass(frozen=True)
class Split:
    """How the scenes of a split are drawn.

    `residues`: classes of the scene hash modulo 8 that belong to the split. They are disjoint between splits, so no
    layout can be in two of them whatever their lengths.
    """

    seed: int
    residues: frozenset[int]
    objects: tuple[int, ...]
    unseen: bool = False


SPLITS: Mapping[str, Split] = {
    "train": Split(seed=11, residues=frozenset(range(6)), objects=(1, 2, 3)),
    "heldout": Split(seed=23, residues=frozenset({6}), objects=(2, 3)),
    "ood": Split(seed=37, residues=frozenset({7}), objects=(3, 4), unseen=True),
}


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape and its tight box."""

    colour: str
    shape: str
    box: Box

    @property
    def place(self) -> str:
        """The quarter of the picture that holds the box's centre, such as ``top left``."""
        x1, y1, x2, y2 = self.box
        vertical = "top" if y1 + y2 < SIZE else "bottom"
        return f"{vertical} {'left' if x1 + x2 < SIZE else 'right'}"


@dataclass(frozen=True)
class Scene:
    """A picture and a sentence about one of its objects (`objects[0]`)."""

    split: str
    index: int
    image: Image.Image  # RGB, SIZE x SIZE
    objects: tuple[SceneObject, ...]
    expression: str
    completion: str  # rough answer for SFT, see rough_completion

    @property
    def box(self) -> Box:
        """True box of the object that is meant."""
        return self.objects[0].box

    @property
    def scene_hash(self) -> str:
        """SHA-256 of the layout, without noise and sentence."""
        return layout_hash(self.objects)

    @property
    def key(self) -> str:
        """Name of the row and its picture."""
        return f"{self.split}-{self.index:06d}"


def scene(split: str, index: int) -> Scene:
    """Draw scene `index` >= 0 of `split`, always the same.

    Raises:
        ValueError: unknown split, or a negative index.
    """
    recipe = recipe_of(split, index)
    # RandomState's stream is frozen by numpy's compatibility policy; Generator's is not.
    rng = np.random.RandomState([recipe.seed, index])
    place_kind = rng.random_sample() < 1 / 3
    while True:
        objects = _layout(rng, recipe, place_kind)
        if objects and int(layout_hash(objects)[-1], 16) % 8 in recipe.residues:
            break
    target = objects[0]
    noun = f"{target.colour} shape"
    if place_kind:
        noun += f" at the {target.place}"
    elif rng.random_sample() < 0.5:
        noun = f"{target.colour} {target.shape}"
    completion = rough_completion(rng, target)
    return Scene(split, index, paint(rng, objects), objects, f"the {noun}", completion)


def recipe_of(split: str, index: int) -> Split:
    """Return how scene `index` of `split` is drawn.

    Raises:
        ValueError: unknown split, or a negative index.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if index < 0:
        raise ValueError(f"scene index {index} of split {split} is negative")
    return SPLITS[split]


def layout_hash(objects: tuple[SceneObject, ...]) -> str:
    """SHA-256 (hex) of the objects, whatever their order."""
    layout = sorted((o.colour, o.shape, *o.box) for o in objects)
    return hashlib.sha256(json.dumps(layout).encode()).hexdigest()


def _layout(rng: np.random.RandomState, recipe: Split, place_kind: bool) -> tuple[SceneObject, ...]:
    """Place objects without overlap, the meant one first; empty when there was no room."""
    count = int(recipe.objects[rng.randint(len(recipe.objects))])
    colours = [str(c) for c in rng.permutation(sorted(COLOURS))[:count]]
    if place_kind and count > 1 and rng.random_sample() < 0.5:
        colours[1] = colours[0]  # only the place tells the two apart
    objects: list[SceneObject] = []
    for position, colour in enumerate(colours):
        wanted = recipe.unseen and position == 0
        choices = [s for s in SHAPES if ((colour, s) in UNSEEN) == wanted]
        if not choices:
            return ()
        shape = choices[rng.randint(len(choices))]
        box = free_box(rng, [o.box for o in objects], SMALLEST, LARGEST)
        if box is None:
            return ()
        objects.append(SceneObject(colour, shape, box))
    same = [o for o in objects[1:] if o.colour == colours[0] and o.place == objects[0].place]
    return () if same else tuple(objects)


def free_box(rng: np.random.RandomState, taken: list[Box], smallest: int, largest: int) -> Box | None:
    """Return a square box of a side from `smallest` to `largest`, apart from those that are taken, if room is found."""
    for _ in range(20):
        side = int(rng.randint(smallest, largest + 1))
        x, y = (int(v) for v in rng.randint(MARGIN, SIZE - MARGIN - side + 1, size=2))
        if all(
            x >= x2 + MARGIN or x + side + MARGIN <= x1 or y >= y2 + MARGIN or y + side + MARGIN <= y1
            for x1, y1, x2, y2 in taken
        ):
            return x, y, x + side, y + side
    return None


def _mask(shape: str, side: int) -> npt.NDArray[np.bool_]:
    """Pixels [side, side] of a shape that touches all four sides of its box."""
    centre = (np.arange(side) + 0.5) / side * 2 - 1  # -1 .. 1 over pixel centres
    y, x = centre[:, None], centre[None, :]
    if shape == "circle":
        return x * x + y * y <= 1
    if shape == "triangle":
        return np.abs(x) <= np.maximum((y + 1) / 2, 1 / side)
    assert shape == "square", shape
    return np.ones((side, side), dtype=np.bool_)


def paint(rng: np.random.RandomState, objects: tuple[SceneObject, ...]) -> Image.Image:
    """Grey to slightly coloured background with a gentle wave, the shapes, then noise over everything."""
    level = rng.uniform(95, 115) + rng.uniform(-6, 6, size=3)
    wave, phase = rng.uniform(-0.15, 0.15, size=2), rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    texture = rng.uniform(0, 6) * np.sin(wave[0] * x + wave[1] * y + phase)
    canvas = level[None, None, :] + texture[:, :, None]
    for item in objects:
        x1, y1, x2, y2 = item.box
        paint = np.asarray(COLOURS[item.colour]) + rng.uniform(-15, 15, size=3)
        canvas[y1:y2, x1:x2][_mask(item.shape, x2 - x1)] = paint
    # The sum of three bytes is nearly normal, with deviation 128, and much faster to draw.
    noise = rng.randint(0, 256, size=(3, *canvas.shape), dtype=np.uint8).sum(axis=0, dtype=np.int16) - 382.5
    canvas = canvas + noise * (rng.uniform(3, 14) / 128)
    return Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8), "RGB")


def rough_completion(rng: np.random.RandomState, target: SceneObject) -> str:
    """SFT text of one object: each side of the box pushed outward, and sometimes bare JSON without tags.

    A model trained on it can do the task, but not well: there is something left for GRPO to mend.
    """
    answer = _json_answer(pushed(rng, target.box))
    return answer if rng.random_sample() < BARE_SHARE else _tagged(target, answer)


def pushed(rng: np.random.RandomState, box: Box) -> Box:
    """Return `box` with each side moved outward, by up to PUSH of its width."""
    x1, y1, x2, y2 = box
    left, top, right, bottom = (round(float(push)) for push in rng.uniform(0, PUSH, size=4) * (x2 - x1))
    return max(x1 - left, 0), max(y1 - top, 0), min(x2 + right, SIZE), min(y2 + bottom, SIZE)


def _json_answer(box: Box) -> str:
    return json.dumps({"bbox_2d": list(box)})


def _caption(target: SceneObject) -> str:
    # The place straight after the colour: so the model learns to find before it names.
    return f"<think> {target.colour} {target.place} {target.shape} </think>"


def _tagged(target: SceneObject, answer: str) -> str:
    return f"{_caption(target)}<answer>{answer}</answer>"


def sft_text(item: Scene, style: Style) -> str:
    """What SFT teaches for a scene: ``caption`` says what and where, ``clean`` and ``rough`` add a box."""
    target = item.objects[0]
    if style == "caption":
        return _caption(target)
    return item.completion if style == "rough" else _tagged(target, _json_answer(target.box))


def row(item: Scene, style: Style = "rough") -> dict[str, Any]:
    """The scene as a row of VLM-R1's jsonl, with its SFT text (:func:`sft_text`) and the layout's hash beside it."""
    human = "<image>" + QUESTION.format(expression=item.expression)
    return {
        "id": item.key,
        "image": f"{item.key}.png",
        "conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": json.dumps(list(item.box))}],
        "completion": sft_text(item, style),
        "scene_hash": item.scene_hash,
    }


def write_split(directory: str | Path, split: str, count: int, start: int = 0, style: Style = "rough") -> Path:
    """Write scenes `start` .. `start + count` as ``{split}.jsonl`` and ``images/*.png`` below `directory`.

    `style` chooses the SFT text of the rows. Each file appears whole or not at all, the jsonl last; its path is
    returned. The rows name pictures relative to ``images``.

    Raises:
        ValueError: unknown split, a count below 1, or `directory` cannot be written.
    """
    drawn = (scene(split, index) for index in numbers(split, count, start))
    return write_rows(directory, split, ((row(item, style), {f"{item.key}.png": png(item.image)}) for item in drawn))


def numbers(split: str, count: int, start: int) -> range:
    """Return the numbers of `count` scenes.

    Raises:
        ValueError: there would be none.
    """
    if count < 1:
        raise ValueError(f"split {split}: a count of {count} scenes makes no file")
    return range(start, start + count)


def png(image: Image.Image) -> bytes:
    """Return the picture as a PNG file."""
    out = io.BytesIO()
    image.save(out, format="PNG", compress_level=1)
    return out.getvalue()
