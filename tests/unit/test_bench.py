"""What the benchmarks compute besides time: figures of a case, the JSON line, the results page, drawn lengths."""

from __future__ import annotations

import json
import statistics

import numpy as np
import pytest

from tools.bench import common, grpo_step, logprobs, rollout, tiny, update


def test_a_case_is_the_median_of_the_pairs_ratios():
    pairs = [(10.0, 5.0), (12.0, 4.0), (9.0, 9.0), (11.0, 5.0), (8.0, 2.0)]
    more = common.case("tail", pairs, "tokens/s", "some", more_is_better=True)
    assert (more.ours, more.peer, more.ratio, more.low, more.high) == (10.0, 5.0, 2.2, 1.0, 4.0)
    less = common.case("time", pairs, "s", "some", more_is_better=False)
    assert (less.ratio, less.low, less.high) == (pytest.approx(5 / 11), 0.25, 1.0)


def test_pairs_alternate_after_a_warm_up(capsys):
    turns: list[str] = []

    def side(name: str, value: float) -> float:
        turns.append(name)
        return value

    pairs = common.alternate(lambda: side("ours", 1.0), lambda: side("peer", 2.0), 3)
    assert pairs == [(1.0, 2.0)] * 3
    assert turns == ["ours", "peer", "ours", "peer", "peer", "ours", "ours", "peer"]
    turns.clear()
    common.alternate(lambda: side("ours", 1.0), lambda: side("peer", 2.0), 1, warm_up=False)
    assert turns == ["ours", "peer"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("as_json", [True, False])
def test_the_last_lines_are_one_json_object_a_case(capsys, as_json):
    cases = [common.case(name, [(3.0, 1.5)] * 5, "tokens/s", "a [b] setting", True) for name in ("tail", "flat")]
    args = common.parser("test", ("tail", "flat")).parse_args(["--json"] if as_json else [])
    assert args.pairs >= 5 and not args.write
    common.finish("rollout", cases, args)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert (len(lines) == 2) == as_json and ("times better" in (err if as_json else out))
    for line, name in zip(lines[-2:], ("tail", "flat"), strict=True):
        assert json.loads(line) == {
            **{"name": name, "ours": 3.0, "peer": 1.5, "ratio": 2.0, "low": 2.0, "high": 2.0},
            **{"unit": "tokens/s", "setting": "a [b] setting"},
        }


def test_results_are_kept_by_benchmark_and_case(tmp_path):
    for bench, name, ours in (("rollout", "tail", 1.0), ("rollout", "flat", 2.0), ("update", "beta0", 3.0)):
        common.write(bench, [common.case(name, [(ours, 1.0)] * 5, "s", "some", True)], tmp_path)
    common.write("rollout", [common.case("tail", [(4.0, 1.0)] * 5, "s", "some", True)], tmp_path)
    held = json.loads((tmp_path / "bench.json").read_bytes())
    found = {(bench, name): c["ratio"] for bench, cases in held.items() for name, c in cases.items()}
    assert found == {("rollout", "tail"): 4.0, ("rollout", "flat"): 2.0, ("update", "beta0"): 3.0}
    page = (tmp_path / "bench.md").read_text()
    row = "| tail | 4 | 1 | s | **4.00** | 4.00 to 4.00 |"
    for text in ("## rollout.py", "## update.py", row, common.cpu_name(), "torch "):
        assert text in page
    assert held["rollout"]["tail"]["versions"]["torch"]


def test_cases_are_chosen_by_name():
    args = common.parser("test", rollout.CASES).parse_args(["--case", "flat", "--case", "tail"])
    assert common.chosen(args, rollout.CASES) == ["tail", "flat"]
    assert common.chosen(common.parser("test", ("a",)).parse_args([]), ("a", "b")) == ["a", "b"]
    assert set(logprobs.CASES) == {"memory", "time"}
    assert set(grpo_step.BETAS) == {"beta0", "beta0.04"} == set(update.CASES) - {"one_tower", "frozen"}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_long_tailed_lengths(seed):
    lengths = tiny.long_tailed_lengths(64, seed)
    assert lengths.dtype == np.int64 and lengths.shape == (64,)
    assert abs(lengths.mean() - 64) <= 0.5
    assert 1 <= lengths.min() and lengths.max() <= 256
    assert statistics.median(lengths) < 0.85 * lengths.mean()  # most are shorter than the mean
    assert np.array_equal(lengths, tiny.long_tailed_lengths(64, seed))
    assert not np.array_equal(lengths, tiny.long_tailed_lengths(64, seed + 1))


def test_the_benchmark_s_own_draw_reaches_the_longest():
    assert tiny.long_tailed_lengths(rollout.PROMPTS * rollout.GENERATIONS).max() == tiny.MAX_LENGTH


def test_prompts_and_the_model_that_never_ends(tmp_path):
    directory = tiny.write_model(tmp_path / "model")
    for side, image_tokens in ((112, 16), (448, 256)):
        prompts = tiny.prompts(directory, 2, side)
        assert len({len(p.token_ids) for p in prompts}) == 1 and len({p.images[0].digest for p in prompts}) == 2
        image_id = json.loads((directory / "config.json").read_bytes())["image_token_id"]
        assert [int((p.token_ids == image_id).sum()) for p in prompts] == [image_tokens] * 2
    grpo_step.never_end(directory)
    assert json.loads((directory / "generation_config.json").read_bytes())["eos_token_id"] == 512
