"""Tasks: what each asks, reads, rewards and measures; and the user's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vlmr1.evaluate import results
from megatron_vlmr1.rewards import functions, tasks
from megatron_vlmr1.rewards.item import RewardFailure, RewardItem
from megatron_vlmr1.rewards.task import Task
from megatron_vlmr1.types import ImagePatches, Prompt

REC, OVD, COUNTING = tasks.get("rec"), tasks.get("ovd"), tasks.get("counting")
CASES = json.loads((Path(__file__).parent / "data" / "template_cases.json").read_text())["cases"]
TEXT_TASKS = {"math": "math", "mcq": "mcq", "vqa": "default", "gui": "all_match"}


def prompt(truth: str, size: tuple[int, int] | None = (1120, 560), accuracy: str | None = None) -> Prompt:
    empty = np.zeros((0, 0), np.float32)
    images = (ImagePatches(empty, (1, 40, 40), size, b""),) if size else ()
    return Prompt(0, "k", np.zeros(0, np.int64), np.zeros((3, 0), np.int64), images, "q", truth, accuracy)


def measured(task: Task, text: str, asked: Prompt, files: tuple[str, ...] = ()) -> Any:
    """What evaluation would find, which lets reward processes compute `measured_by`."""
    item = task.item(text, asked)
    found = {name: functions.get(task.reward(name, asked), files)(item) for name in task.measured_by}
    return task.metrics(text, asked, found)


def said(text: str) -> str:
    return f"<think>t</think><answer>{text}</answer>"


def test_template_is_the_published_one() -> None:
    question = (
        "Please provide the bounding box coordinate of the region this sentence describes: a {question} in braces"
    )
    assert REC.render(question) == (
        question + " First output the thinking process in <think> </think> tags and then output the final answer in"
        " <answer> </answer> tags. Output the final answer in JSON format."
    )


def test_recipe_names_known_rewards() -> None:
    assert REC.recipe == {"iou": 1.0, "format": 1.0}
    assert all(functions.get(name) for name in REC.recipe)


def test_parse_returns_original_pixels() -> None:
    text = said('{"bbox_2d": [50, 100, 150, 300]}')
    assert REC.parse(text, prompt("[100, 100, 300, 300]")) == (100.0, 100.0, 300.0, 300.0)
    assert REC.parse(text, prompt("", size=None)) == (50.0, 100.0, 150.0, 300.0)
    assert REC.parse(said("nothing"), prompt("")) is None
    assert REC.parse("[1, 2, 3, 4]", prompt("")) is None


@pytest.mark.parametrize(
    ("text", "iou", "acc50", "format_"),
    [
        (said("[50, 100, 150, 300]"), 1.0, 1.0, 1.0),
        ("<answer>[50, 100, 150, 300]</answer>", 1.0, 1.0, 0.0),
        (said("[100, 100, 200, 300]"), 1 / 3, 0.0, 1.0),
        (said("[50, 100, 100, 300]"), 0.5, 0.0, 1.0),  # one half does not exceed one half
        ("nonsense", 0.0, 0.0, 0.0),
    ],
)
def test_metrics(text: str, iou: float, acc50: float, format_: float) -> None:
    parsed = None if text == "nonsense" else pytest.approx(iou)
    expected = {"iou": pytest.approx(iou), "acc50": acc50, "acc75": float(iou > 0.75), "format": format_}
    expected["iou_parsed"] = parsed
    assert measured(REC, text, prompt("[100, 100, 300, 300]")) == expected
    assert set(REC.aggregates.values()) == set(expected)


def test_metrics_of_a_bad_truth_fail() -> None:
    with pytest.raises(RewardFailure, match="no box"):
        measured(REC, said("[1, 2, 3, 4]"), prompt("none"))


@pytest.mark.parametrize("truth", ["[100, 100, 300, 300]", "<answer> [100, 100, 300, 300] </answer>"])
def test_compat_item_is_tagged_like_the_published_rows(truth: str) -> None:
    item = REC.item(said("[50, 100, 150, 300]"), prompt(truth), "vlm-r1")
    assert json.loads(item.solution.removeprefix("<answer>").removesuffix("</answer>")) == [100, 100, 300, 300]
    assert functions.get("iou")(item) == 1.0


def test_unknown_task() -> None:
    with pytest.raises(ValueError, match="no task named ocr; known: counting, gui, "):
        tasks.get("ocr")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_published_templates(case: dict[str, Any]) -> None:
    rendered = tasks.get(case["inputs"]["task_type"]).render("{q} <image>")
    assert rendered == case["expected"].replace("{Question}", "{q} <image>")


def test_ovd_puts_the_instruction_first_and_asks_for_json_or_none() -> None:
    before, _, after = OVD.render("Find all cats.").partition("Find all cats.")
    assert "<think>" in before and "<answer>" in before and "<" not in after
    assert "bbox_2d" in after and "label" in after and "None" in after


@pytest.mark.parametrize("name", tasks.names())
def test_every_task_is_whole(name: str) -> None:
    task = tasks.get(name)
    tasks.check(name)
    results.check(task)
    assert task.name == name and task.template.count("{question}") == 1
    assert set(task.recipe) & {task.accuracy, "accuracy"} and task.recipe["format"] == 1.0
    wrong = tasks.get(name).parse("no tags", prompt("1"))
    assert wrong is None


def boxes(*items: tuple[list[float], str]) -> str:
    return json.dumps([{"bbox_2d": box, "label": label} for box, label in items])


A, B = [100.0, 100.0, 300.0, 300.0], [400.0, 0.0, 500.0, 100.0]  # original pixels: twice the resized ones across


def halved(box: list[float]) -> list[float]:
    return [box[0] / 2, box[1], box[2] / 2, box[3]]


@pytest.mark.parametrize(
    ("answer", "f1", "parsed"),
    [
        (boxes((halved(A), "cat"), (halved(B), "Dog")), 1.0, 1.0),
        ("```json\n" + boxes((halved(A), "cat")) + "\n```", 2 / 3, 1.0),
        (boxes((halved(A), "cat"), (halved(A), "cat"), (halved(B), "dog")), 4 / 5, 1.0),  # a duplicate costs
        (boxes((halved(A), "cow"), (halved(B), "dog")), 1 / 2, 1.0),  # so does an unknown class
        (boxes((A, "cat")), 0.0, 1.0),  # not scaled to the resized image
        ("None", 0.0, 1.0),
        ("two animals", 0.0, 0.0),
    ],
)
def test_ovd_metrics(answer: str, f1: float, parsed: float) -> None:
    truth = prompt(boxes((A, "cat"), (B, "dog")))
    found = measured(OVD, said(answer), truth)
    assert found == {"f1": pytest.approx(f1), "parsed": parsed, "format": 1.0}
    assert OVD.objects is not None
    objects = OVD.objects(said(answer), truth)
    assert [(list(box or ()), label) for label, box in objects.true] == [(A, "cat"), (B, "dog")]


def test_ovd_of_nothing() -> None:
    assert measured(OVD, said("None"), prompt("None"))["f1"] == 1.0
    assert measured(OVD, said(boxes((A, "cat"))), prompt("None"))["f1"] == 0.0
    assert measured(OVD, "silence", prompt("None"))["f1"] == 0.0


@pytest.mark.parametrize("truth", ["a cat", boxes(([3.0, 3.0, 1.0, 1.0], "cat")), '[{"bbox_2d": [1, 2, 3, 4]}]'])
def test_ovd_of_a_bad_truth_fails(truth: str) -> None:
    with pytest.raises(RewardFailure):
        measured(OVD, said("None"), prompt(truth))


@pytest.mark.parametrize(
    ("answer", "accuracy", "error"),
    [("3", 1.0, 0.0), ("three", 1.0, 0.0), ("5 dogs", 0.0, 2.0), ("many", 0.0, None)],
)
def test_counting_metrics(answer: str, accuracy: float, error: float | None) -> None:
    found = measured(COUNTING, said(answer), prompt("3"))
    assert (found["accuracy"], found["abs_error"]) == (accuracy, error)
    assert COUNTING.aggregates["mae"] == "abs_error"


def test_counting_without_a_true_number_fails() -> None:
    with pytest.raises(RewardFailure, match="the solution holds no"):
        measured(COUNTING, said("3"), prompt("some"))


def equal(item: RewardItem) -> float:
    """Stands for the text rewards: 1, or a half where the answer is only near."""
    said_, _, _ = item.completion.partition("<answer>")[2].partition("</answer>")
    if item.solution == "unclear":
        raise RewardFailure("cannot say")
    return 1.0 if said_ == item.solution else 0.5 if item.solution in said_ else 0.0


@pytest.mark.parametrize(("name", "reward"), TEXT_TASKS.items())
def test_text_tasks_measure_by_their_reward(name: str, reward: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    known = functions.get

    def get(name: str, files: tuple[str, ...] = ()) -> Any:
        asked.append(name)
        return known(name) if name == "format" else equal

    monkeypatch.setattr(functions, "get", get)
    task = tasks.get(name)
    assert measured(task, said("B"), prompt("B")) == {"accuracy": 1.0, "score": 1.0, "format": 1.0}
    assert measured(task, said("a B"), prompt("B")) == {"accuracy": 0.0, "score": 0.5, "format": 1.0}
    assert task.parse(said(" B "), prompt("B")) == "B"
    assert set(asked) == {reward, "format"}
    with pytest.raises(RewardFailure, match="cannot say"):
        measured(task, said("B"), prompt("unclear"))


@pytest.mark.parametrize(
    ("name", "answer", "truth", "accuracy"),
    [
        ("mcq", "(B)", "B", 1.0),
        ("mcq", "C", "B", 0.0),
        ("math", "1/2", r"\frac{1}{2}", 1.0),
        ("math", "2", r"\frac{1}{2}", 0.0),
        ("vqa", "Red Bus.", "red bus", 1.0),
        ("vqa", "green car", "red bus", 0.0),
        ("gui", "Operation Error.", "Operation Error", 1.0),
        ("gui", "Display Error", "Operation Error", 0.0),
    ],
)
def test_text_tasks_with_their_own_rewards(name: str, answer: str, truth: str, accuracy: float) -> None:
    found = measured(tasks.get(name), said(answer), prompt(truth))
    assert (found["accuracy"], found["format"]) == (accuracy, 1.0)


def test_a_row_chooses_its_own_accuracy_reward() -> None:
    vqa = tasks.get("vqa")
    assert vqa.weights(vqa.recipe, prompt("B")) == {"default": 1.0, "format": 1.0}
    assert vqa.weights(vqa.recipe, prompt("B", accuracy="mcq")) == {"mcq": 1.0, "format": 1.0}
    assert vqa.weights({"accuracy": 1.0, "iou": 2.0}, prompt("B", accuracy="iou")) == {"iou": 3.0}
    assert REC.weights(REC.recipe, prompt("", accuracy="mcq")) == {"iou": 1.0, "format": 1.0}
    assert REC.weights({"accuracy": 1.0}, prompt("")) == {"iou": 1.0}


def test_items_carry_length_and_family() -> None:
    item = REC.item("text", prompt("[1, 2, 3, 4]"), num_tokens=7, family="glm")
    assert (item.num_tokens, item.family, item.image_size) == (7, "glm", (1120, 560))


OWN = """
from megatron_vlmr1.rewards import answers
from megatron_vlmr1.rewards.task import INSTRUCTION, Task


def shout(item):
    return float((answers.answer(item.completion) or "").isupper())


def metrics(text, prompt, measured):
    return {"loud": float((answers.answer(text) or "").isupper())}


TASK = Task(
    name="shouting",
    template="{question} " + INSTRUCTION,
    recipe={"shout": 1.0, "format": 0.5},
    parse=lambda text, prompt: answers.answer(text),
    metrics=metrics,
    aggregates={"loud_rate": "loud"},
    accuracy="shout",
)
"""


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "my_task.py"
    path.write_text(OWN)
    tasks.check(str(path))
    task = tasks.get(str(path))
    assert isinstance(task, Task) and task.name == "shouting"
    assert measured(task, said("YES"), prompt("")) == {"loud": 1.0}
    assert tasks.files(str(path)) == (str(path),)
    assert functions.get("shout", tasks.files(str(path)))(RewardItem(said("YES"), "")) == 1.0
    tasks.check(str(path), ["shout", "accuracy", "iou"])
    with pytest.raises(ValueError, match="no reward named whisper and none in"):
        tasks.check(str(path), ["whisper"])
    assert tasks.files("rec") == ()


def test_a_job_reads_its_copy_of_a_task_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "my_task.py"
    path.write_text("raise RuntimeError('edited while the job was waiting')")
    other = tmp_path / "other" / path.name
    copy = functions.copy_in(tmp_path / "files", str(path))
    for folder in (copy.parent, other.parent):
        folder.mkdir(parents=True)
    copy.write_text(OWN + "WHERE = __file__\n")
    other.write_text("TASK = 3")
    code = (
        "import sys; from megatron_vlmr1.rewards import functions, tasks\n"
        "path = sys.argv[1]; print(tasks.get(path).name, functions.load_file(path).WHERE)"
    )
    words, env = [sys.executable, "-c", code, str(path)], {**os.environ, "VLMR1_FILES": str(tmp_path / "files")}
    for _ in range(2):
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
        assert done.stdout == f"shouting {path}\n"
        path.unlink(missing_ok=True)
    done = subprocess.run([*words[:3], str(other)], env=env, capture_output=True, text=True, check=False)
    assert "its TASK is a int" in done.stderr, "another file of that name is itself"


def test_the_example_of_the_readme_works(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "README.md").read_text()
    path = tmp_path / "my_task.py"
    path.write_text(page.partition("```python\n")[2].partition("```")[0])
    tasks.check(str(path))
    task = tasks.get(str(path))
    files = tasks.files(str(path))
    assert measured(task, said("28"), prompt("30"), files) == {"near": pytest.approx(0.8), "format": 1.0}
    with pytest.raises(RewardFailure, match="the truth is no number"):
        measured(task, said("28"), prompt("old"), files)


def test_a_reward_process_loads_ones_own_task_without_numpy(tmp_path: Path) -> None:
    (tmp_path / "my_task.py").write_text(OWN)
    code = (
        "import sys; from megatron_vlmr1.rewards import functions\n"
        f"functions.get('shout', ({str(tmp_path / 'my_task.py')!r},))\n"
        "sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no such file"),
        ("X = 1", "it has no TASK; expected TASK = "),
        ("TASK = 3", "its TASK is a int; expected TASK = "),
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        ("def (", "SyntaxError: "),
    ],
)
def test_a_bad_task_of_ones_own_is_one_line(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "my_task.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError) as caught:
        tasks.get(str(path))
    assert str(caught.value).startswith(f"task: {path}: {says}") and "\n" not in str(caught.value)


def test_split_metrics_need_boxes() -> None:
    wrong = Task("t", "{question}", {}, OVD.parse, OVD.metrics, {}, split_metrics=("detection",))
    with pytest.raises(ValueError, match="needs the task's objects"):
        results.check(wrong)
    with pytest.raises(ValueError, match="no split metric named recall; known: detection"):
        results.check(Task("t", "{question}", {}, OVD.parse, OVD.metrics, {}, split_metrics=("recall",)))
