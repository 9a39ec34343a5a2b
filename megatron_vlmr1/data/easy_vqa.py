"""easy-VQA: questions about 64 x 64 pictures of one coloured shape each, from the PyPI package `easy-vqa` (MIT).

38,575 questions about 4,000 pictures to train on, 9,673 about 1,000 others to test with, and 13 answers in all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_vlmr1.data.written import write_rows

COLOURS = frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"})
SHAPES = frozenset({"circle", "rectangle", "triangle"})
ANSWERS = COLOURS | SHAPES | {"yes", "no"}

SplitName = Literal["train", "test"]
Question = tuple[str, str, int]  # question, answer, number of the picture


def write_split(directory: str | Path, split: SplitName, count: int | None = None) -> Path:
    """Write questions of a split as ``{split}.jsonl`` and their pictures as ``images/*.png``; return the jsonl's path.

    Args:
        directory: is made where it is missing.
        split: the package's own.
        count: so many questions, spread evenly over the split; all of them when None.

    Raises:
        ValueError: the package is not installed or not the one meant, more questions than there are, or `directory`
            cannot be written.
    """
    questions, paths = _load(split)
    count = len(questions) if count is None else count
    if not 0 < count <= len(questions):
        raise ValueError(f"--count {count}: split {split} of easy-vqa has {len(questions)} questions")
    thoughts = what_is_known(questions)
    chosen = (i * len(questions) // count for i in range(count))
    return write_rows(directory, split, _rows(split, questions, chosen, thoughts, paths))


def what_is_known(questions: Iterable[Question]) -> dict[int, str]:
    """Return what the questions about each picture and their answers say of it, such as "teal circle" or "teal".

    It is the text of an SFT row's think block: learned from the data alone, nobody has looked at the picture.
    """
    words: defaultdict[int, set[str]] = defaultdict(set)
    for question, answer, picture in questions:
        asked = set(question.rstrip("?").split())
        if answer not in ("yes", "no"):
            words[picture] |= {answer} | asked  # "what is the teal shape?" tells the colour, too
        elif (answer == "yes") == asked.isdisjoint({"no", "not"}):
            words[picture] |= asked
    return {picture: " ".join([*sorted(w & COLOURS), *sorted(w & SHAPES)]) for picture, w in words.items()}


def _rows(
    split: str, questions: list[Question], chosen: Iterable[int], thoughts: Mapping[int, str], paths: Mapping[int, str]
) -> Iterator[tuple[dict[str, Any], dict[str, bytes]]]:
    for number in chosen:
        question, answer, picture = questions[number]
        thought = f" {thoughts[picture]} " if thoughts.get(picture) else " "
        name = f"{split}-{picture:04d}.png"
        row = {
            "id": f"{split}-{number:05d}",
            "image": name,
            "conversations": [{"from": "human", "value": f"<image>{question}"}, {"from": "gpt", "value": answer}],
            "completion": f"<think>{thought}</think><answer>{answer}</answer>",
            "category": "color" if answer in COLOURS else "shape" if answer in SHAPES else "yes/no",
        }
        yield row, {name: Path(paths[picture]).read_bytes()}


def _load(split: SplitName) -> tuple[list[Question], dict[int, str]]:
    """Return a split's questions, and its pictures' paths by their numbers."""
    try:
        import easy_vqa  # in the extra [demo]
    except ImportError as error:
        raise ValueError('the package easy-vqa is not installed: pip install "easy-vqa>=1.0,<2"') from error
    if split == "train":
        found, paths = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    else:
        found, paths = easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
    questions = list(zip(*found, strict=True))
    if not {answer for _, answer, _ in questions} <= ANSWERS or not {p for *_, p in questions} <= paths.keys():
        raise ValueError("the package easy-vqa is not the data set meant here: other answers, or pictures are missing")
    return questions, paths
