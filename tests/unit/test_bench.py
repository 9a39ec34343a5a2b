"""What the benchmarks compute besides time: figures of a case, the JSON line, the results page, drawn lengths."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import write_tiny_checkpoint_files
from tools.bench import (
    checkpoint,
    common,
    convert,
    grpo_step,
    logprobs,
    replica_check,
    rewards,
    rollout,
    stream,
    telemetry,
    tiny,
    update,
)


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
    assert set(replica_check.CASES) == {"step", "checksum"} and set(telemetry.CASES) == {"step", "cpu"}
    assert set(logprobs.CASES) == {"memory", "time"}
    assert set(grpo_step.BETAS) == {"beta0", "beta0.04"} == set(update.CASES) - {"one_tower", "frozen"}


def test_the_interval_of_a_median_ratio():
    assert telemetry.interval([[2.0, 2.0]] * 9) == "1.0000 to 1.0000"
    low, high = map(float, telemetry.interval([[1.0, 1 + i / 100] for i in range(-10, 11)]).split(" to "))
    assert 0.9 < low < 0.99 and 1.01 < high < 1.1


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


def test_rewards_through_the_service(capsys):
    """Its own check compares every score with the loop's."""
    case = rewards.measure("rec", rewards.arguments(["--pairs", "1", "--count", "40"]))
    assert (case.name, case.unit) == ("rec", "scores/s") and case.ours > 0 and case.peer > 0
    again = rewards.respawn(rewards.arguments(["--pairs", "1"]))
    assert (again.name, again.unit, again.peer) == ("respawn", "s", rewards.RESPAWN_LIMIT_S) and again.ours > 0
    (item,) = rewards.drawn("odLength", 1)
    assert item.completion.count("bbox_2d") == item.solution.count("bbox_2d") == rewards.BOXES
    assert rewards.drawn("rec", 3) == rewards.drawn("rec", 3) and capsys.readouterr().out == ""


def published_config(directory: Path) -> Path:
    write_tiny_checkpoint_files(directory, num_hidden_layers=9)
    return directory


def test_as_many_layers_as_fit(tmp_path):
    config = json.loads((published_config(tmp_path / "tiny") / "config.json").read_bytes())
    (side := tmp_path / "side").mkdir()

    def fitted(nbytes: int) -> tuple[int, int]:
        found = convert.fitted(json.loads(json.dumps(config)), nbytes, side)
        assert json.loads((side / "config.json").read_bytes()) == found
        return found["text_config"]["num_hidden_layers"], sum(e.nbytes for e in convert.Random(side).entries.values())

    one, two = (fitted(1 << 40) for _ in range(2))
    assert one == two and one[0] == 9  # never more than the model has
    layer = 2 * (2 * 64 + 128 * 64 + 128 + 64 * 64 + 3 * 96 * 64)
    assert fitted(one[1] - 1) == (8, one[1] - layer) and fitted(one[1] - layer - 1) == (7, one[1] - 2 * layer)
    layers, size = fitted(one[1] - 8 * layer - 1)  # vocabulary and tower are halved
    assert layers >= 1 and size < one[1] - 8 * layer


def test_conversions_of_a_tiny_model(tmp_path, monkeypatch, capsys):
    fresh = convert.fresh_process
    monkeypatch.setattr(
        convert, "fresh_process", lambda name, *a: (fresh if name == "export" else convert.run)(name, *a)
    )
    folder = published_config(tmp_path / "tiny")
    words = ["--pairs", "1", "--gigabytes", "0.0004", "--config", str(folder)]
    (tmp_path / "work").mkdir()
    args = convert.arguments(words)
    cases = {case.name: case for case in convert.measure(tmp_path / "work", args)}
    assert list(cases) == ["export", "export_torch_dist", "import"]
    assert all(case.unit == "GB/s" and case.ours > 0 and case.peer > 0 for case in cases.values())
    assert "0.00 GB bf16, " in cases["export"].setting and "peak memory of ours " in cases["import"].setting
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["hf", "hf-side", "megatron"]
    assert capsys.readouterr().out == ""


def test_too_much_memory_ends_the_benchmark(tmp_path, monkeypatch):
    folder = published_config(tmp_path / "tiny")
    found = {"seconds": 1.0, "peak": 3 * convert.GB + 10**7}
    monkeypatch.setattr(convert, "fresh_process", lambda name, source, out: (out.mkdir(), found)[1])
    (tmp_path / "work").mkdir()
    args = convert.arguments(["--pairs", "1", "--gigabytes", "0.0004", "--config", str(folder), "--case", "export"])
    with pytest.raises(SystemExit, match=r"^export: peak resident memory 3\.01 GB; limit 3 GB$"):
        convert.measure(tmp_path / "work", args)


def test_the_stream_is_measured(tmp_path, capsys):
    words = ["--pairs", "1", "--pictures", "12", "--samples", "5000"]
    cases = {case.name: case for case in stream.measure(tmp_path, stream.arguments(words))}
    assert list(cases) == ["worker", "processor", "startup", "seek"]
    assert all(case.ours > 0 and case.peer > 0 for case in cases.values())
    assert "bits equal" in cases["processor"].setting and "5000 samples" in cases["seek"].setting
    assert capsys.readouterr().out == ""


def test_the_checkpoint_benchmark_says_what_a_rank_shall_do():
    args = checkpoint.arguments(["--case", "async", "--run", "somewhere", "--json"])
    assert (args.run, args.ranks, common.chosen(args, checkpoint.CASES)) == (Path("somewhere"), 2, ["async"])
    assert checkpoint.resident("VmHWM") >= checkpoint.resident("VmRSS") > 10
