"""report.html: what it shows, what it refuses, what it never lets through."""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import yaml
from PIL import Image

from megatron_vlmr1 import config
from megatron_vlmr1.cli import report as cli
from megatron_vlmr1.report import curves, facts
from megatron_vlmr1.report.card import model_card, run_of
from megatron_vlmr1.report.numbers import short, tick
from megatron_vlmr1.report.page import build
from megatron_vlmr1.report.pictures import build_grid, split_think
from megatron_vlmr1.report.run import EVALUATIONS, load_run
from megatron_vlmr1.telemetry.metrics import MetricsWriter, read_metrics
from megatron_vlmr1.telemetry.samples import write_samples

HOSTILE = "</p></pre><script>alert(1)</script><img src=http://x/y onerror=alert(2)>\"'<!-- {{ 7*7 }} \ud800\0"
STEM = "Please provide the bounding box coordinate of the region this sentence describes: "


class Page(HTMLParser):
    """Tags, addresses and text of a page, read by another parser than the one that wrote it."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.addresses, self.words, self.attributes = [], [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def png(shade=0, size=(20, 10)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def row(key, iou, **more):
    answer = f'<think>thought {key}</think><answer>{{"bbox_2d": [1, 2, 3, 4]}}</answer>'
    base = {"key": key, "question": STEM + f"thing {key}", "truth": "[1, 2, 11, 8]", "text": answer, "format": 1.0}
    return base | {
        "box": [1.0, 2.0, 11.0, 8.0],
        "iou": iou,
        "acc50": float((iou or 0) > 0.5),
        "image": f"images/{key}.png",
        "image_size": [20, 10],
        **more,
    }


def write_metrics(run, steps=40):
    writer = MetricsWriter(run)
    for step in range(steps):
        writer.write(step, {"reward/mean": step / 10, "grpo/kl": math.nan, "time/rollout": 2.0, "time/update": 6.0})


def write_rows(run, name, rows):
    folder = run / "evaluations"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / f"{EVALUATIONS[name]}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for index, r in enumerate(rows):
        if r["image"] and r["image"].startswith("images/"):
            (folder / r["image"]).write_bytes(png(index))


@pytest.fixture
def full_run(tmp_path):
    run = tmp_path / "full"
    write_metrics(run)
    before = [row(f"k{i:02d}", 0.4) for i in range(24)]
    after = [row(f"k{i:02d}", 0.2 + i * 0.03) for i in range(24)]
    before[3] = row("k03", None, text=HOSTILE, box=None, question=STEM + HOSTILE)
    after[3] = row("k03", 0.95)
    for name, rows in {"before": before, "after": after, "ood_before": before, "ood_after": after}.items():
        write_rows(run, name, rows)
    figures = {"acc50": 0.5, "iou_mean": 0.45, "format_rate": 0.6, "reward_mean": 1.0}
    better = {"acc50": 0.625, "iou_mean": 0.4, "format_rate": 0.6, "reward_mean": 1.375}
    summary = {"before": figures, "after": better, "ood_before": figures, "ood_after": figures}
    extra = {"seconds": {"train": 141.0, "evaluate": 30.5}, "versions": {"megatron-core": "0.16.1"}, "sha": "<b>f00"}
    (run / "summary.json").write_text(json.dumps(summary | extra))
    raw = {"model": {"path": "m"}, "data": {"train": "d"}, "parallel": {"tensor_model_parallel_size": 2}, "seed": 7}
    (run / "config.yaml").write_text(config.dump(config.parse(raw, "test")))
    completion = {"text": HOSTILE, "value": None, "parts": {"<i>": 0.5}, "failure": HOSTILE, "advantage": math.nan}
    write_samples(run, 0, [{"key": "a", "question": HOSTILE, "truth": HOSTILE, "completions": [completion, 3]}])
    return run


def test_the_page_holds_the_figures(full_run):
    page = Page(build(full_run))
    text = page.text
    assert "GRPO 40 steps 16 prompts × 8 a step TP 2 PP 1 bf16 seed 7" in text
    assert "Acc@0.5 greedy 50.0 % 62.5 % +12.5 50.0 % 50.0 % ±0.0" in text
    assert "Mean IoU greedy 0.450 0.400 −0.050" in text
    assert "Mean reward sampled at T = 1 1.000 1.375 +0.375" in text
    assert "rollout 2.000 s · 25 %" in text and "update 6.000 s · 75 %" in text
    assert "train" in text and "2m21s" in text and "30.5s" in text
    assert "megatron-core 0.16.1" in text
    assert "thought k00" in text and text.count("before IoU 0.40") == 11  # 12 cards, one without a box
    assert f"Every question begins “{STEM.strip()}”" in text
    assert "0.150 → 3.750" in text  # means of the first and last four of 0, 0.1, …, 3.9


def test_nothing_hostile_and_nothing_external(full_run):
    path = build(full_run)
    page = Page(path)
    assert "script" not in page.tags and "b" in page.tags and "img" not in page.tags
    assert page.addresses and all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert not {name for name in page.attributes if name.startswith("on")}
    assert "alert(1)" in page.text and "{{ 7*7 }}" in page.text
    source = path.read_text(encoding="utf-8")
    assert "default-src 'none'" in source
    outside = [
        url for url in re.findall(r"https?://[^\s\"'<)]+", source) if "www.w3.org" not in url and url[7:] != "x/y"
    ]
    assert outside == []


def test_a_run_with_only_metrics(tmp_path):
    write_metrics(tmp_path / "plain", steps=1)
    page = Page(build(tmp_path / "plain"))
    assert "Reward" in page.text and "Where the time went" in page.text
    for absent in ("Before and after", "Held-out pictures", "Completions while training", "KL to the reference"):
        assert absent not in page.text
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    assert "0 steps" in Page(build(tmp_path / "empty")).text


def test_sft_shows_its_loss_and_grpo_does_not(tmp_path):
    rows = [(step, {"train/loss": 1.0}) for step in range(3)]
    assert [chart.title for chart in curves.main_charts(rows, {})] == ["Loss"]
    rows = [(step, {"train/loss": 0.0, "reward/mean": 1.0}) for step in range(3)]
    assert [chart.title for chart in curves.main_charts(rows, {})] == ["Reward"]
    assert [chart.title for chart in curves.further_charts(rows)] == ["train/loss"]


def polyline(svg):
    """Points of the widest path that has no fill: the curve, in the chart's own units."""
    root = ElementTree.fromstring(svg)
    paths = [p.get("d") for p in root.iter("{http://www.w3.org/2000/svg}path") if "fill: none" in p.get("style", "")]
    longest = max(paths, key=len)
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML] ([-\d.e]+) ([-\d.e]+)", longest)]


def test_curves_have_the_shape_of_their_numbers():
    values = [0.0, 1.0, 4.0, 9.0, 7.0]
    svg = curves.main_charts([(step * 10, {"reward/mean": v}) for step, v in enumerate(values)], {})[0].svg
    points = polyline(svg)
    low, high = points[0], points[3]
    for index, (x, y) in enumerate(points):
        assert (x - low[0]) / (high[0] - low[0]) == pytest.approx(index / 3, abs=1e-3)
        assert (y - low[1]) / (high[1] - low[1]) == pytest.approx(values[index] / 9, abs=1e-3)


def test_smoothing_is_a_centred_mean():
    values = [float((7 * i) % 10) for i in range(48)]
    smooth = curves._smooth(curves.np.array(values), 4)
    assert smooth[20] == pytest.approx(sum(values[18:23]) / 5)
    assert smooth[0] == pytest.approx(sum(values[:3]) / 3)


def test_phase_shares_over_a_long_run():
    rows = [(step, {"time/update": 3.0, "time/save_exposed": 40.0 * (step % 100 == 99)}) for step in range(1000)]
    svg, legend = curves.phase_chart(rows)
    assert [(p.name, p.mean_s, round(p.share, 3)) for p in legend] == [
        ("update", pytest.approx(3.0), 0.882),
        ("save_exposed", pytest.approx(0.4), 0.118),
    ]
    assert svg.startswith("<svg") and len(svg) < 60_000
    assert curves.phase_chart([(0, {"x": 1.0})]) is None


def test_accuracy_gets_its_ends_from_the_summary(full_run):
    assert facts.accuracy_series(load_run(full_run)) == {
        "heldout": ([0, 40], [0.5, 0.625]),
        "ood": ([0, 40], [0.5, 0.5]),
    }
    MetricsWriter(full_run).write(39, {"evaluate/heldout/acc50": 0.75})
    assert facts.accuracy_series(load_run(full_run))["heldout"] == ([0, 39], [0.5, 0.75])


def test_any_split_that_was_evaluated_is_compared(tmp_path):
    write_metrics(tmp_path, steps=10)
    (tmp_path / "evaluations/images").mkdir(parents=True)
    for label, accuracy in (("before", 0.25), ("after", 0.5)):
        figures = {"acc50": accuracy, "iou_mean": accuracy / 2, "format_rate": 1.0}
        (tmp_path / f"evaluations/{label}.json").write_text(json.dumps({"val": figures, "test_b": {"acc50": 0.5}}))
        rows = [row(f"k{i}", accuracy) for i in range(3)]
        (tmp_path / f"evaluations/{label}_val.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for i in range(3):
        (tmp_path / f"evaluations/images/k{i}.png").write_bytes(png(i))
    text = Page(build(tmp_path)).text
    assert "test_b val Measure before after change before after change" in text
    assert "Acc@0.5 greedy 50.0 % 50.0 % ±0.0 25.0 % 50.0 % +25.0" in text
    assert "val +0.0 ± 0.0 points (n = 3)" in text and "All 3 samples of val" in text
    assert facts.accuracy_series(load_run(tmp_path))["val"] == ([0, 10], [0.25, 0.5])


def test_paired_note(full_run):
    _, _, notes = facts.comparison(load_run(full_run))
    # 14 of 24 answers end above IoU .5, none began there: mean .5833, s.e. sqrt(.5833 * .4167 / 23) = .1028
    assert notes[0] == "held-out +58.3 ± 10.3 points (n = 24)"


def test_the_grid_spreads_from_worst_to_best(full_run):
    grid = build_grid(full_run, load_run(full_run).evaluations)
    changes = [card.change for card in grid.cards]
    assert len(changes) == 12 and changes == sorted(changes)
    everything = sorted(0.95 if i == 3 else 0.2 + i * 0.03 - 0.4 for i in range(24))
    assert changes[0] == pytest.approx(everything[0]) and changes[-1] == pytest.approx(everything[-1])
    assert [everything.index(pytest.approx(change)) for change in changes] == [round(i * 23 / 11) for i in range(12)]
    assert "12 of the 24" in grid.caption
    rects = {rect.kind: (rect.x, rect.y, rect.width, rect.height) for rect in grid.cards[0].rects}
    assert rects == {kind: (1.0, 2.0, 10.0, 6.0) for kind in ("truth", "before", "after")}


def test_boxes_that_are_none_are_not_drawn(tmp_path):
    write_metrics(tmp_path, 1)
    rows = [
        row("a", 0.0, box=[11, 8, 1, 2]),  # corners the wrong way round
        row("b", 0.0, box=[-1e300, 0, 1e300, 5]),
        row("c", 0.0, box=[1, 2, 3]),
        row("d", 0.0, box=["NaN", 1, 2, 3], truth="<answer>[1, 2, 11, 8]</answer>"),
        row("e", 0.0, image_size=None),
        row("f", 0.0, image=None),
    ]
    write_rows(tmp_path, "before", rows)
    cards = build_grid(tmp_path, load_run(tmp_path).evaluations).cards
    boxes = [{r.kind: (r.x, r.y, r.width, r.height) for r in card.rects} for card in cards]
    truth = (1.0, 2.0, 10.0, 6.0)
    assert boxes[0] == {"truth": truth, "before": truth}
    assert boxes[1]["before"] == pytest.approx((-0.4, 0.0, 20.8, 5.0))
    assert boxes[2:] == [{"truth": truth}] * 2
    assert "no box" in Page(build(tmp_path)).text


@pytest.mark.parametrize("name", ["../../secret.png", "/etc/passwd", "images/text.png", "images/absent.png", "a\0b"])
def test_pictures_come_from_the_run_only(tmp_path, name):
    run = tmp_path / "run"
    write_metrics(run, 1)
    (tmp_path / "secret.png").write_bytes(png())
    write_rows(run, "before", [row("a", 0.5, image=name)])
    for file in (run / "evaluations" / "images").iterdir():
        file.unlink()
    (run / "evaluations" / "images" / "text.png").write_text("<svg onload=alert(1)>")
    assert build_grid(run, load_run(run).evaluations) is None
    build(run)


def test_a_linked_picture_outside_the_run_is_left_out(tmp_path):
    run = tmp_path / "run"
    write_metrics(run, 1)
    write_rows(run, "before", [row("a", 0.5)])
    (tmp_path / "secret.png").write_bytes(png())
    (run / "evaluations/images/a.png").unlink()
    (run / "evaluations/images/a.png").symlink_to(tmp_path / "secret.png")
    assert build_grid(run, load_run(run).evaluations) is None


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think> a </think><answer>b</answer>", ("a", "<answer>b</answer>")),
        ("x<think>a</think>", ("a", "x")),
        ("no tags", (None, "no tags")),
        ("</think><think>", (None, "</think><think>")),
        ("<think>never closed", (None, "<think>never closed")),
    ],
)
def test_split_think(text, parts):
    assert split_think(text) == parts


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.70512, "0.705"), (26.64, "26.6"), (1234.4, "1,234"), (9.25e8, "925M"), (12345, "12.3k")]
    + [(0.0085, "0.0085"), (0.00045, "0.00045"), (4.5e-7, "4.5e-7"), (-0.5, "-0.500")],
)
def test_short_numbers(value, text):
    assert short(value) == text


def test_ticks_are_exact():
    assert [tick(v) for v in (0.025, 1.0, 0.000175, 9.15e8)] == ["0.025", "1", "0.000175", "915M"]


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("summary.json", "{", "summary.json: not JSON"),
        ("summary.json", "[]", "summary.json: not a JSON object"),
        ("summary.json", b"\xff", "summary.json: not UTF-8"),
        ("config.yaml", "a: [", "config.yaml: not readable"),
        ("evaluations/after_heldout.jsonl", '{"key": "a"}\n\n{"key"', "after_heldout.jsonl row 3: not JSON"),
        ("samples/step_3.jsonl", "7\n", "step_3.jsonl row 1: not a JSON object"),
    ],
)
def test_damaged_files_are_named(tmp_path, file, content, complaint):
    write_metrics(tmp_path, 1)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=complaint) as error:
        build(tmp_path)
    assert "\n" not in str(error.value)


def test_the_verb(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    write_metrics(tmp_path / "run", 2)
    args = parser.parse_args(["report", str(tmp_path / "run"), "--json"])
    assert args.run(args) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(tmp_path / "run" / "report.html")}
    args = parser.parse_args(["report", str(tmp_path / "run")])
    assert args.run(args) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'report.html'}\n"
    for directory, complaint in ((tmp_path / "absent", "no such run directory"), (tmp_path, "no run: neither")):
        args = parser.parse_args(["report", str(directory)])
        with pytest.raises(ValueError, match=complaint):
            args.run(args)


def test_the_report_needs_no_torch():
    code = "import sys, megatron_vlmr1.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_metrics_of_a_run_are_read_once_per_step(full_run):
    assert [step for step, _ in read_metrics(full_run)] == list(range(40))


def test_the_rank_that_most_often_held_the_others_up(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step, (rank, ratio, excess_s) in enumerate(
        [(1, 2.0, 3.0), (0, 9.0, 3.0), (1, 4.0, 3.0), (1, 1.2, 3.0), (2, 8.0, 0.1)]
    ):
        slow = {"straggler/rank": rank, "straggler/phase": 1, "straggler/ratio": ratio, "straggler/excess_s": excess_s}
        writer.write(step, {"perf/step_s": 10.0, **slow})
    writer.close()
    row = ("slowest rank", "rank 1 in rollout, 3.0 times the others' median in 2 of 5 steps")
    assert facts.slow_rank(load_run(tmp_path)) == [row]


def test_a_model_card(full_run, tmp_path):
    card = model_card(full_run, "my | model")
    text = card["README.md"].decode()
    head, body = text.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["megatron_vlmr1", "grpo"],
    }
    assert body.startswith("# my \\| model\n") and "![mean reward of each step](reward.svg)" in body
    assert card["reward.svg"].startswith(b"<svg") and len(card) == 2
    assert "| Acc@0.5 (greedy) | 50.0 % → 62.5 % | 50.0 % → 50.0 % |" in body
    assert "| `model.path` | m |" in body and "tensor_model_parallel_size: 2" in body and "<b>" not in body
    assert run_of(full_run) == full_run and run_of(tmp_path) is None
    step = full_run / "checkpoints" / "step_4"
    step.mkdir(parents=True)
    (full_run / "checkpoints" / "latest").symlink_to("step_4")
    assert run_of(step) == run_of(full_run / "checkpoints" / "latest") == full_run
