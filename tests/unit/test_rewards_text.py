"""Rewards of text answers: the published cases, the published code once more, each quirk and its mend."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
from rapidfuzz.distance import Indel

from megatron_vlmr1.rewards import functions, latex, texts
from megatron_vlmr1.rewards.functions import default
from megatron_vlmr1.rewards.item import RewardFailure, RewardItem

CASES = json.loads((Path(__file__).parent / "data" / "reward_cases_text.json").read_text())["cases"]
HELPERS = {
    "extract_choice": lambda given: texts.published_choice(given["text"]),
    "clean_text": lambda given: texts.clean_text(given["text"]),
    "numeric_reward": lambda given: default.numeric(given["content"], given["sol"]),
    "cosine_reward": lambda given: published("length", "", "x", num_tokens=given["gen_len_tokens"]),
    "repetition_reward": lambda given: published("repetition", given["content"], "x"),
    "accuracy_reward": lambda given: published(
        given["accu_reward_method"] or "default", given["completion"], given["solution"]
    ),
}


def reward(name: str, completion: str, solution: str, **rest: Any) -> float:
    return functions.get(name)(RewardItem(completion, solution, **rest))


def published(name: str, completion: str, solution: str, **rest: Any) -> float:
    return reward(name, completion, solution, compat="vlm-r1", **rest)


def said(text: str) -> str:
    return f"<think>t</think><answer>{text}</answer>"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_published_case(case: dict[str, Any]) -> None:
    value = HELPERS[case["function"]](case["inputs"])
    expected = case["expected"]
    assert value == (pytest.approx(expected, abs=1e-9) if isinstance(expected, float) else expected)


# The published helpers once more, written down from their description with the standard library's regexes.
def reference_clean(text: str) -> str:
    text = (re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL) or [text])[-1]
    for end in "\n\r":
        text = re.sub(rf"(?<!\s){end}", " ", re.sub(rf"(?<=\s){end}", "", text))
    return text.strip().rstrip(".").lower()


def reference_choice(text: str) -> str | None:
    text = re.sub(r"\s+", " ", text.upper())
    found = re.findall(r"(?<![A-Z])[A-Z](?=[.,?!:;]|$)", text)
    if len(set(found)) < 2:
        return found[0] if found else None
    words = "答案 选择 正确 是 对 认为 应该 觉得 answer correct choose select right think believe should".split()
    points = dict.fromkeys(found, 0)
    for letter in found:
        at = text.index(letter)
        around = text[max(at - 20, 0) : at + 20]
        points[letter] += len([word for word in words if word.upper() in around])
        points[letter] += (2 if at > 0.7 * len(text) else 0) + bool(re.match("[。.!！,，]", text[at + 1 :]))
    return max(points, key=points.__getitem__)


def reference_truth(text: str) -> str:
    match = re.search("<answer>(.*?)</answer>", text)
    return (match[1] if match else text).strip()


def reference_yes_no(completion: str, solution: str) -> float:
    match = re.search("<answer>(.*?)</answer>", completion.lower(), re.DOTALL)
    given = match[1] if match else completion.lower()
    return float(re.findall("yes|no", given)[:1] == re.findall("yes|no", reference_truth(solution.lower()))[:1])


def reference_repetition(text: str) -> float | None:
    fence = re.search("```json(.*?)```", text, re.DOTALL)
    source = fence[1].strip() if fence else None
    if fence is None:
        fence = re.search("```(.*?)```", text, re.DOTALL)
        source = fence[1].strip() if fence else None
        if not source:
            found = re.search(r'\[\s*{.*?"bbox_2d".*?"label".*?}\s*\]', text, re.DOTALL)
            source = found[0] if found else None
    try:
        data = json.loads(source) if source else None
    except json.JSONDecodeError:
        return None  # json_repair's turn
    if data and isinstance(data, list):
        grams: list[Any] = [f"{e['bbox_2d']}_{e['label']}" for e in data if {"bbox_2d", "label"} <= set(e)]
    else:
        words = text.lower().split()
        grams = [tuple(words[i : i + 6]) for i in range(len(words) - 5)]
    return -(1 - len(set(grams)) / len(grams)) if grams else 0.0


def random_texts(parts: list[str], count: int, longest: int = 12) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(parts, k=rng.randrange(longest))) for _ in range(count)]


def test_clean_text_on_random_text() -> None:
    parts = ["\n", "\r", " ", "\t", "\u3000", "\x1c", "A", "ß", ".", "<answer>", "</answer>", "\ud800"]
    for text in random_texts(parts, 30_000):
        assert texts.clean_text(text) == reference_clean(text), repr(text)
        assert texts.published_truth(text) == reference_truth(text), repr(text)


def test_choice_on_random_text() -> None:
    parts = [
        "A",
        "b",
        "C.",
        "D",
        "c,",
        " ",
        "\n",
        ". ",
        "!",
        ")",
        "answer is ",
        "think",
        "对",
        "ß",
        "x" * 9,
        " the dog ",
    ]
    values = set()
    for text in random_texts(parts, 30_000, 20):
        value = reference_choice(text)
        assert texts.published_choice(text) == value, repr(text)
        values.add(value)
    assert {None, "A", "B", "C", "D"} <= values


def test_repeated_option_gathers_its_points_again() -> None:
    """B stands first once, behind no keyword and with no full stop; A is worth 1, three times."""
    assert (
        texts.published_choice("b: " + "x" * 60 + " a. c. c.")
        == reference_choice("b: " + "x" * 60 + " a. c. c.")
        == "C"
    )


def test_mcq_and_yes_no_on_random_text() -> None:
    parts = ["A", "B.", "yes", "no", "ye", "s", " ", "\n", "<answer>", "</answer>", "K", "know"]
    drawn = random_texts(parts, 10_000)
    for text, solution in zip(drawn, reversed(drawn), strict=True):
        assert published("yes_no", text, solution) == reference_yes_no(text, solution), (text, solution)
        match = re.search("<answer>(.*?)</answer>", text, re.DOTALL)
        letter = reference_choice((match[1] if match else text).strip())
        truth = reference_choice(reference_truth(solution)) or solution.strip()
        assert published("mcq", text, solution) == float(letter == truth), (text, solution)


def test_default_on_random_words() -> None:
    """Truths without digits or LaTeX, of which math_verify makes nothing."""
    parts = ["A", "b.", "cat", "dog", " ", "\n", "\r", "<answer>", "</answer>"]
    drawn = random_texts(parts, 10_000)
    for text, solution in zip(drawn, reversed(drawn), strict=True):
        given = (re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL) or [text])[-1].strip()
        truth = reference_truth(solution)
        value = Indel.normalized_similarity(reference_clean(given), reference_clean(truth))
        if reference_choice(truth):
            value = float(reference_choice(given) == reference_choice(truth))
        assert published("default", text, solution) == pytest.approx(value, abs=1e-9), (text, solution)


def test_repetition_on_random_text() -> None:
    boxes = ['{"bbox_2d": [1, 2], "label": "a"}', '{"bbox_2d": [1,2], "label": "a"}', '{"label": 1}', '{"bbox_2d": 1}']
    parts = [*boxes, ",", "[", "]", "[ ", "\n]", "```json", "```", " a", " b", " A b c a b c a", "\ud800"]
    compared = 0
    rng = random.Random(1)
    lists = [f"{rng.choice(parts)}[{','.join(rng.choices(boxes, k=rng.randrange(5)))}]" for _ in range(3000)]
    for text in random_texts(parts, 20_000, 16) + lists + [f"```json{text[-9:]}{text}```" for text in lists]:
        value = reference_repetition(text)
        if value is not None:
            assert published("repetition", text, "") == pytest.approx(value, abs=1e-9), repr(text)
            compared += value < 0
    assert compared > 1000


@pytest.mark.parametrize(
    ("name", "completion", "truth", "quirk", "mended"),
    [
        # The first answer block, and only a block.
        ("default", said("dog") + said("cat"), "cat", 1.0, 0.0),
        ("default", "cat", "cat", 1.0, 0.0),
        ("all_match", said("dog") + said("cat"), "cat", 1.0, 0.0),
        ("math", said("1") + said("$2$"), "2", 1.0, 0.0),
        ("mcq", "A", "A", 1.0, 0.0),
        ("yes_no", "yes", "yes", 1.0, 0.0),
        # A truth over two lines.
        ("mcq", said("A"), "<answer>\nA\n</answer>", 0.0, 1.0),
        # Numbers.
        ("default", said("3 dogs"), "3 cats", 1.0, 0.0),
        ("default", said("13 brown dogs"), "12 brown dogs", 1 - 2 / 26, 0.0),
        ("default", said("42"), "42.0", 1.0, 1.0),
        ("default", said("there are 42 of them"), "42", 1.0, 1.0),
        ("default", said("41 dogs or 42"), "42", 1.0, 0.0),
        ("default", said("41"), "42", 0.0, 0.0),
        ("default", said("forty-two"), "42", 0.0, 0.0),
        ("default", said("\\frac{1}{2}"), "0.5", 1.0, 1.0),
        ("default", said("1e3"), "1000", 1.0, 1.0),
        ("default", said("1 000"), "1000", 1.0, 1.0),
        # Several numbers are a text.
        ("default", said("4-3"), "3-2", 1.0, 0.0),
        ("default", said("3 - 2"), "3-2", 1.0, 1.0),
        ("default", said("192.168.0.2"), "192.168.0.1", 1.0, 0.0),
        ("default", said("1, 2, 3"), "3", 1.0, 0.0),
        ("default", said("9 2 3"), "1 2 3", 1.0, 0.0),
        ("default", said("(4, 5)"), "(4,5)", 10 / 11, 1.0),
        # Letters.
        ("default", said("(A)"), "A", 0.0, 1.0),
        ("default", said("b"), "A", 0.0, 0.0),
        ("mcq", said("(A)"), "A", 0.0, 1.0),
        ("mcq", said("A) cat"), "A", 0.0, 1.0),
        ("mcq", said("a"), "<answer>(A)</answer>", 0.0, 1.0),
        ("mcq", said("the answer is (b)"), "B", 0.0, 1.0),
        ("mcq", said("The answer is B."), "B", 1.0, 1.0),
        ("mcq", said("a cat"), "A", 0.0, 0.0),
        ("mcq", said("Maybe A. Or B."), "A", 1.0, 0.0),
        # Texts: a wrong class earns nothing, a slip in writing little less than all.
        ("default", said("tabby cat"), "tiger cat", 10 / 18, 0.0),
        ("default", said("operation no responce"), "Operation No Response", 1 - 2 / 42, 1 - 2 / 42),
        # Words.
        ("yes_no", said("I know. Yes."), "yes", 0.0, 1.0),
        ("yes_no", said("nothing"), "no", 1.0, 0.0),
        ("yes_no", said("NO!"), "no", 1.0, 1.0),
        ("yes_no", said("yes_or_no"), "yes", 1.0, 0.0),
        # Spacing.
        ("all_match", said("no  response ."), "no response", 0.0, 1.0),
        # Mathematics.
        ("math", said("\\sqrt{8}"), "2\\sqrt{2}", 0.0, 1.0),
        ("math", said("\\fbox{x+1}"), "x+1", 0.0, 1.0),
        ("math", said("\\boxed{\\frac12}"), "\\frac{1}{2}", 1.0, 1.0),
        ("math", said("7"), "8", 0.0, 0.0),
        ("math", said("3"), "3\\pi", 1.0, 0.0),
        ("math", said("\\[3\\]"), "3\\text{cm}", 1.0, 1.0),
        ("math", said("6 \\text{ or } 7"), "6", 1.0, 0.0),
        ("math", said("\\text{ red}"), "\\text{ blue}", 1.0, 0.0),
        ("math", said("5\\text{ cm}"), "5", 1.0, 1.0),
    ],
)  # fmt: skip
def test_quirks_and_mends(name: str, completion: str, truth: str, quirk: float, mended: float) -> None:
    assert published(name, completion, truth) == pytest.approx(quirk, abs=1e-9)
    assert reward(name, completion, truth) == pytest.approx(mended, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "truth", "reason"),
    [(name, " <answer> </answer> ", "solution is empty") for name in ("default", "all_match", "math", "mcq", "yes_no")]
    + [(name, " . ", "solution is empty") for name in ("default", "all_match", "math")]
    + [("math", "\\boxed{}", "solution is empty")]
    + [("mcq", "dog", "no single option"), ("mcq", "A, B", "no single option"), ("yes_no", "know", "neither yes nor")],
)
def test_useless_truths_fail(name: str, truth: str, reason: str) -> None:
    with pytest.raises(RewardFailure, match=reason):
        reward(name, said("A"), truth)


@pytest.mark.parametrize("letter", "ABCDEFGHIJ")
def test_mcq_reads_every_usual_form(letter: str) -> None:
    for form in (
        "{}",
        "({})",
        "{})",
        "{}.",
        "{}: cat",
        "{}. cat",
        "[{}] cat",
        "**{}**",
        "Answer: {}",
        "option {}, I think",
        "\\boxed{{{}}}",
        "（{}）",
        "答案：{}。",
    ):
        assert reward("mcq", said(form.format(letter)), letter) == 1.0, form
        assert reward("mcq", said(form.format("Z")), letter) == 0.0, form


def test_repetition_quirks_and_mends() -> None:
    def fenced(*entries: str) -> str:
        return f"```json\n[{', '.join(entries)}]\n```"

    one, same, other = (f'{{"bbox_2d": {box}, "label": "{label}"}}' for box, label in
                        (("[1, 2]", "a"), ("[1.0, 2]", "A "), ("[3, 4]", "a")))  # fmt: skip
    assert (published("repetition", fenced(one, same), ""), reward("repetition", fenced(one, same), "")) == (0.0, -0.5)
    assert reward("repetition", fenced(one, other), "") == 0.0
    thought = f"<think>{fenced(one, other)}</think><answer>{fenced(one, one)}</answer>"
    assert (published("repetition", thought, ""), reward("repetition", thought, "")) == (0.0, -0.5)
    for odd in ("3", "null", "[1]", '"bbox_2d label"'):
        mixed = fenced(one, one, odd)
        assert reward("repetition", mixed, "") == -0.5
        if odd == "[1]":
            assert published("repetition", mixed, "") == -0.5
        else:
            with pytest.raises(RewardFailure, match="published reward raises TypeError"):
                published("repetition", mixed, "")
    deep = "```json" + "[" * 100_000 + "```"
    assert reward("repetition", deep, "") == 0.0
    with pytest.raises(RewardFailure, match="published reward raises RecursionError"):
        published("repetition", deep, "")


def test_length() -> None:
    wrong, right = said("dog"), said("cat")
    for tokens in range(0, 4096, 64):
        cosine = math.cos(math.pi * tokens / 1024)
        assert published("length", wrong, "cat", num_tokens=tokens) == pytest.approx(1 - 0.25 * (1 - cosine), abs=1e-9)
        cosine = math.cos(math.pi * min(tokens, 1024) / 1024)
        assert reward("length", right, "cat", num_tokens=tokens) == pytest.approx(0.75 + 0.25 * cosine)
        assert reward("length", wrong, "cat", num_tokens=tokens) == pytest.approx(-0.25 - 0.25 * cosine)
    assert published("length", wrong, "cat", num_tokens=2048) == pytest.approx(1.0)
    for compat in ("none", "vlm-r1"):
        with pytest.raises(RewardFailure, match="num_tokens"):
            reward("length", right, "cat", compat=compat)


def test_length_asks_the_detection_reward_about_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = '[{"bbox_2d": [1, 2, 3, 4], "label": "a"}]'
    for value, expected in ((0.7, 1.0), (0.69, -0.5)):
        monkeypatch.setattr(functions, "get", lambda name, value=value: lambda item: value * (name == "weighted_sum"))
        assert reward_of_length(boxes) == expected


@pytest.mark.parametrize("truth", ["[10, 10, 50, 50]", '{"bbox_2d": [10, 10, 50, 50]}'])
def test_length_asks_the_overlap_about_one_box(truth: str) -> None:
    assert reward("length", said('{"bbox_2d": [10, 10, 50, 49], "label": "a"}'), truth, num_tokens=0) == 1.0
    assert reward("length", said('{"bbox_2d": [60, 10, 90, 50], "label": "a"}'), truth, num_tokens=0) == -0.5


def reward_of_length(truth: str) -> float:
    from megatron_vlmr1.rewards.functions import length

    return length.score(RewardItem("", truth, num_tokens=0))


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("\\tfrac12", "\\frac{1}{2}"),
        ("\\dfrac1{72}", "\\frac{1}{72}"),
        ("\\left( x \\right)", "(x)"),
        ("5\\text{ cm}", "5"),
        ("50\\%", "50"),
        ("90^\\circ", "90"),
        ("k = .5", "\\frac{1}{2}"),
        ("\\sqrt3x", "\\sqrt{3}x"),
        ("3/4", "\\frac{3}{4}"),
        ("03/4", "03/4"),
        ("1/2/3", "1/2/3"),
        ("abc=1", "abc=1"),
        ("\\frac1", "\\frac1"),
        ("", ""),
    ],
)
def test_latex_normal_form(text: str, normal: str) -> None:
    assert latex.normal_form(text) == normal


@pytest.mark.parametrize("text", ["x/2", "\\sqrt", "\\frac", "1\\text{ a}\\text{ b}"])
def test_latex_that_the_benchmark_stumbles_over_is_compared_as_it_is(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        latex.normal_form(text)
    assert latex.equivalent(text, text)
    assert not latex.equivalent(text, text + " ")


def test_unboxed() -> None:
    assert latex.unboxed("\\boxed{1} and \\boxed{{2}}$") == "{2}"
    assert latex.unboxed("\\boxed 7$ so") == "7"
    assert latex.unboxed("\\boxed{1") == "\\boxed{1"
    assert latex.unboxed("1") == "1"
    for broken in ("\\fbox{1}", "\\boxedx{1}"):
        with pytest.raises(latex.NoBox):
            latex.unboxed(broken)
