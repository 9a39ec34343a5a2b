"""Rewards of text answers under hostile text: values in range or failures, in bounded time, and nothing else."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_vlmr1.rewards import deadline, functions, mathematics
from megatron_vlmr1.rewards.deadline import within
from megatron_vlmr1.rewards.functions import math as math_reward
from megatron_vlmr1.rewards.item import MAX_TEXT_BYTES, RewardFailure, RewardItem

RANGE = dict.fromkeys(("default", "mcq", "yes_no", "math", "all_match", "llm"), (0.0, 1.0))
RANGE |= {"length": (-0.5, 1.0), "repetition": (-1.0, 0.0)}
TRUTHS = {"default": ["42", "$x^2$", "A", "yes cat"], "math": ["42", "$x^2$"], "mcq": ["A"], "yes_no": ["yes"]}
HOSTILE = {
    "brackets": "[",
    "tags": "<think></think><answer>",
    "boxed": "\\boxed{",
    "braces": "{",
    "digits": "9",
    "powers": "9**9**9**9 ",
    "numbers": "1 ",
    "words": "a b c d e f g ",
    "spaces": " ",
    "line ends": "\n",
    "both ends": "\r\n",
    "options": "A. ",
    "capitals": "A",
    "grows in upper case": "ß",
    "nul": "\0",
    "surrogate": "\ud800",
    "right to left": "\u202e\u05d0[1,",
    "no": "no ",
    "dots": ".",
    "fences": "```",
    "json fences": "```json[",
    "boxes": '[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, ',
    "half boxes": '[{"bbox_2d"',
}


@pytest.fixture(autouse=True)
def no_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("URL", "MODEL", "KEY"):
        monkeypatch.delenv(f"VLMR1_JUDGE_{name}", raising=False)


def outcome(name: str, completion: str, truth: str, compat: Any, num_tokens: int = 5) -> str | None:
    """The reason of a failure, or None for a value in the documented range."""
    try:
        value = functions.get(name)(RewardItem(completion, truth, compat=compat, num_tokens=num_tokens))
    except RewardFailure as failure:
        return str(failure)
    low, high = RANGE[name]
    assert type(value) is float and low <= value <= high, value
    return None


@pytest.mark.parametrize("compat", ["none", "vlm-r1"])
@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", RANGE)
def test_hostile_text(name: str, kind: str, compat: str) -> None:
    """The shorter of two times of the processor, which others use too: 50 ms (100 here), 500 ms for a megabyte."""
    mathematics._library()  # its import is not the text's fault
    for truth in TRUTHS.get(name, ["cat"]):
        for size, limit_s in ((MAX_TEXT_BYTES // 4 - 60, 0.1), (1_000_000, 0.5)):
            repeated = (HOSTILE[kind] * size)[:size]
            for text in (repeated, f"<think>t</think><answer>{repeated}</answer>"):
                times = []
                for _ in range(2):
                    start = time.process_time()
                    reason = outcome(name, text, truth, compat)
                    times.append(time.process_time() - start)
                    if times[-1] < limit_s:
                        break
                assert min(times) < (0.5 if compat == "vlm-r1" else limit_s)
                if compat == "none" and len(text.encode("utf-8", "surrogatepass")) > MAX_TEXT_BYTES:
                    assert reason is not None and reason.startswith("too_long")
                elif name in ("mcq", "yes_no", "all_match"):
                    assert reason is None


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", ["default", "mcq", "yes_no", "all_match", "repetition"])
def test_published_values_take_linear_time(name: str, kind: str) -> None:
    def took(size: int) -> float:
        text = (HOSTILE[kind] * size)[:size]
        times = []
        for _ in range(3):
            start = time.process_time()
            outcome(name, text, "cat", "vlm-r1")
            times.append(time.process_time() - start)
        return min(times)

    assert took(800_000) <= 2.5 * took(400_000) + 0.01


FORMULAS = [
    "9**9**9**9",
    "$9^{9^{9^9}}$",
    "(9^{99999}+0)^{99999}",
    "$9^{(9*9*9*9*9*9*9*9*9)}$",
    "9^9999999",
    "999999!",
    "$((9!)!)!$",
    "$9^{9!}$",
    "$\\binom{100000000}{50000000}$",
    "$\\int_0^1 \\sin(x^x) e^{x^2} dx$",
    "$\\prod_{i=1}^{1000000} i$",
    "$(x+y+z+w)^{40}$",
    "$" + "(" * 190 + "1" + ")" * 190 + "$",
    "{" * 100_000 + "}" * 100_000,
    "9" * 4200,
    "9" * 1_000_000,
    "NaN",
    "Infinity",
    "1e400",
    "1 " * 3999,
    "$" + "x+" * 3900 + "1$",
]


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda text: text[:24])
def test_mathematics_ends_in_time(formula: str) -> None:
    mathematics._library()
    for compat in ("none", "vlm-r1"):
        for name, limit_s in (("math", math_reward.DEADLINE_S + 0.5), ("default", 0.9)):
            start = time.process_time()
            reason = outcome(name, f"<answer>{formula}</answer>", "$5$", compat)
            assert time.process_time() - start < limit_s
            assert reason is None or reason.startswith(("too_hard", "too_long"))


@pytest.mark.parametrize("formula", [*FORMULAS[:8], "{" * 201 + "1", "9" * 4301, "1 " * 4001, "2" + "x^" * 201])
def test_hopeless_formulas_are_refused_at_once(formula: str) -> None:
    start = time.process_time()
    with pytest.raises(RewardFailure, match="too_hard"):
        mathematics.equal(formula, "5", 60.0)
    assert time.process_time() - start < 0.2


@pytest.mark.parametrize(
    "formula", ["2^{2024}", "(x^2)^3", "(x+1)^2(x-2)^3", "\\sqrt{2}^2", "e^{-x^2/2}", "10!", "x**2"]
)
def test_sensible_formulas_are_not_refused(formula: str) -> None:
    mathematics.refuse_hopeless(formula)
    assert mathematics.equal(f"${formula}$", f"${formula}$", 5.0)


def test_the_first_formula_of_a_process_is_no_slower() -> None:
    script = """
import time
from megatron_vlmr1.rewards import mathematics
mathematics._library()
start = time.process_time()
assert mathematics.equal("$x^2+4x+4$", "$(x+2)^2$", 30.0)
print(time.process_time() - start)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.15


def test_formulas_in_another_thread() -> None:
    """There is no timer there, so the answer must be one that needs none."""
    found: list[Any] = []
    ask = lambda: found.extend(outcome("math", f"<answer>{text}</answer>", "$5$", "vlm-r1") for text in FORMULAS[:8])  # noqa: E731
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(20)
    assert len(found) == 8 and all(reason.startswith("too_hard") for reason in found)


def test_deadline() -> None:
    fired: list[float] = []
    before = signal.signal(signal.SIGALRM, lambda *_: fired.append(time.monotonic()))
    outer = signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        assert within(5.0, lambda: 7) == 7
        start = time.monotonic()

        def swallow() -> None:
            while True:
                try:
                    time.sleep(5)
                except Exception:  # noqa: BLE001
                    pass

        with pytest.raises(RewardFailure, match="too_hard: no result within 0.1 s"):
            within(0.1, swallow)
        assert time.monotonic() - start < 2
        with pytest.raises(ZeroDivisionError):
            within(0.1, lambda: 1 // 0)
        assert not fired
        time.sleep(0.3)
        assert len(fired) == 1  # the timer that ran before went on
    finally:
        signal.setitimer(signal.ITIMER_REAL, *outer)
        signal.signal(signal.SIGALRM, before)


def test_a_timer_that_rings_again_and_again_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine it may ring while it is being switched off."""
    monkeypatch.setattr(deadline, "_AGAIN_S", 1e-4)

    def busy() -> None:
        end = time.monotonic() + 5
        while time.monotonic() < end:
            pass

    for _ in range(1000):
        with pytest.raises(RewardFailure, match="too_hard"):
            within(2e-4, busy)


SLOW_TO_LOOK = """
import sys, time
from megatron_vlmr1.rewards import deadline

def busy(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass

sys.addaudithook(lambda event, _: busy(3e-4) if event == "object.__getattr__" else None)  # what frame.f_code tells
deadline._AGAIN_S = 1e-4
for _ in range(20):
    try:
        deadline.within(2e-4, lambda: busy(5))
    except deadline.RewardFailure:
        continue
    sys.exit("it was not interrupted")
"""


def test_a_timer_that_rings_before_its_handler_is_done() -> None:
    done = subprocess.run([sys.executable, "-c", SLOW_TO_LOOK], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_repair_is_bounded() -> None:
    for source in ("[" * 15_000, '{"a":' * 3000, '[{"bbox_2d": [1' * 1000, "\\" * 15_000, '"' * 15_000, "[{'" * 5000):
        for compat in ("none", "vlm-r1"):
            start = time.process_time()
            reason = outcome("repetition", f"```json{source}x```", "", compat)
            assert time.process_time() - start < 1.0
            assert reason is None or reason.startswith(("too_hard", "the published reward raises"))
    long = '```json[{"bbox_2d": [1, 2], "label": "a"}, ' + '{"bbox_2d": [1, 2], "label": "a"}, ' * 1000 + "```"
    assert str(outcome("repetition", long, "", "vlm-r1")).startswith("too_hard")
    assert outcome("repetition", long, "", "none") is None


FRAGMENTS = (
    ["<answer>", "</answer>", "<think>", "```json", "```", "[{", "}]", '"bbox_2d"', '"label"', ":", ",", "[1, 2]", "]"]
    + ["\\boxed{", "\\boxed ", "\\frac", "\\sqrt", "\\text{ ", "{", "}", "$", "=", "/", "^", "**", "!", "%", "9", "0.5"]
    + [
        "A",
        "b)",
        "yes",
        "NO",
        "cat",
        " ",
        "\n",
        "\r",
        ".",
        "\0",
        "\ud800",
        "\u0663",
        "²",
        "ß",
        "İ",
        "x",
        "NaN",
        "1e400",
    ]
)
TEXT = st.one_of(st.text(), st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join))
TAGGED = st.one_of(TEXT, TEXT.map("<answer>{}</answer>".format))
FUZZ = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=2_000, **FUZZ)
@given(completion=TAGGED, solution=TAGGED, compat=st.sampled_from(["none", "vlm-r1"]), tokens=st.integers(0, 2**31 - 1))
def test_fuzz(completion: str, solution: str, compat: str, tokens: int) -> None:
    for name in ("mcq", "yes_no", "all_match", "repetition", "llm"):
        outcome(name, completion, solution, compat)
    outcome("length", completion, "cat", compat, tokens)


@settings(max_examples=500, **FUZZ)
@given(completion=TAGGED, solution=TAGGED, compat=st.sampled_from(["none", "vlm-r1"]))
def test_fuzz_mathematics(completion: str, solution: str, compat: str) -> None:
    for name in ("default", "math"):
        outcome(name, completion, solution, compat)


def test_values_are_finite() -> None:
    for tokens in (0, 1, 2**31 - 1):
        for compat in ("none", "vlm-r1"):
            assert outcome("length", "<answer>cat</answer>", "cat", compat, tokens) is None
    assert all(map(math.isfinite, (bound for bounds in RANGE.values() for bound in bounds)))


def test_no_heavy_import_at_module_level() -> None:
    modules = ", ".join(f"megatron_vlmr1.rewards.functions.{name}" for name in RANGE)
    heavy = "{'torch', 'numpy', 'sympy', 'math_verify', 'json_repair', 'rapidfuzz'}"
    code = f"import sys, {modules}; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)
