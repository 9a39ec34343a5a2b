"""`tools/bench/gpu.py` on the CPU with a tiny model: every part runs, and what it counts is right. No seconds."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_vlmr1.config import DebugConfig
from megatron_vlmr1.plan import fit, hardware
from megatron_vlmr1.plan.memory import rank_memory
from megatron_vlmr1.plan.shapes import plan_shape
from megatron_vlmr1.runtime import device
from megatron_vlmr1.train.work import step_flops
from tests.distributed import ranks
from tools.bench import gpu
from tools.bench.gpu_parts import asked, decode, models, roofline, train
from tools.bench.gpu_parts.measuring import Bench, NotMeasured, Row

ROOT = Path(__file__).resolve().parents[2]
H100 = ROOT / "configs" / "hardware" / "h100-80gb.yaml"
WITHOUT_A_GPU = "Transformer Engine|FP8 needs a GPU|a CPU has no bus|graphs need CUDA|engine has no quantization"
BUSY = "this machine is too busy|launches alone should take"  # differences of times, of which others decide


def a_bench(kept: list | None = None, **changes) -> Bench:
    return replace(Bench(True, 1e6, (kept if kept is not None else []).append), **changes)


@pytest.fixture(scope="module")
def document(tmp_path_factory) -> tuple[Path, dict]:
    """Everything, measured once."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    assert gpu.main(["--tiny", "--out", str(out), "--limit-s", "1000"]) == 0
    return out, json.loads(out.read_text())


def test_every_part_has_figures_or_says_why_not(document):
    _, found = document
    assert found["parts"] == list(gpu.PARTS) and found["tiny"]
    assert set(found["versions"]) == set(gpu.PACKAGES) and all(found["versions"].values())
    assert {"date", "host", "device", "ceilings", "rates", "seconds"} <= found.keys()
    assert all(row["measured"] is None for row in found["asked"])  # a CPU has no data sheet here, and no graphs
    measured = {part: [] for part in gpu.PARTS}
    for row in found["rows"]:
        if "not_measured" in row:
            assert re.search(f"{WITHOUT_A_GPU}|{BUSY}", row["not_measured"]), row
            if not re.search(BUSY, row["not_measured"]):
                continue
        measured[row["part"]].append(row["case"])
        if "not_measured" in row:
            continue
        assert row["setting"] and all(value > 0 for value in row["figures"].values()), row
        assert row["flops"] >= 0 and row["bytes"] >= 0 and row["seconds"] >= 0
    assert all(measured.values())
    assert {"3b bf16", "3b bf16, torch spec"} <= set(measured["train"]) and "3b x 8, eager" in measured["decode"]
    assert len({(row["part"], row["case"]) for row in found["rows"]}) == len(found["rows"])


def test_the_planner_learns_the_rates(document):
    """What a GPU alone can say: all rates but those of links between GPUs, and of the bus, which a CPU has not."""
    path, found = document
    links = {"nvlink", "network", "pcie", "nvlink_latency", "network_latency"}
    busy = {row["case"] for row in found["rows"] if re.search(BUSY, row.get("not_measured", ""))}
    missing = fit.RATES.keys() - {row["name"] for row in found["rates"]}
    assert links <= missing <= (links | {"tick", "decode"} if busy else links)
    before = hardware.read(H100)
    after = fit.from_benchmark(before, path)
    for row in found["rates"]:
        if row["unit"] == "FLOP/s":
            share = hardware.number(after, f"efficiency.{row['name']}")
            assert share == pytest.approx(row["value"] / before.peak("bf16")), row
        elif row["unit"] == "s":
            assert hardware.number(after, f"overheads.{row['name']}_s") == row["value"]
    assert after.efficiency.matmul_large.source == "measured: gpu.json"
    assert after.efficiency.nvlink == before.efficiency.nvlink


def test_the_roofline(document):
    path, found = document
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    by_part = roofline.points(found["rows"])
    assert set(by_part) | {"decode"} == {"ceilings", "train", "decode", "tower", "logprobs", "attention"}
    top = found["ceilings"]["bf16"]
    assert max(speed for _, speed, _ in by_part["ceilings"]) == pytest.approx(top)
    square = next(point for point in by_part["ceilings"] if point[2] == "bf16 128 x 128 x 128")
    assert square[0] == pytest.approx(2 * 128**3 / (3 * 2 * 128**2))
    assert not roofline.draw({**found, "ceilings": {}}, path.with_name("none.png"))
    assert not path.with_name("none.png").exists()


def test_what_is_asked_stands_beside_the_best_that_was_measured():
    rows = [
        {"part": "train", "case": "3b bf16", "figures": {"mfu": 0.52}},
        {"part": "train", "case": "7b fp8 tensorwise", "figures": {"times_bf16": 1.2}},
        {"part": "train", "case": "7b fp8 blockwise", "figures": {"times_bf16": 1.25}},
        {"part": "decode", "case": "3b x 64, graphs", "not_measured": "the time is up"},
    ]
    words = [asked.in_words(row) for row in asked.beside(rows)]
    assert "train, 3b bf16: mfu of at least 0.5? 0.52: yes" in words
    assert "train, 7b fp8: times_bf16 of at least 1.3? 1.25: no" in words
    assert "decode, 3b x 64, graphs: of_copy of at least 0.6? not measured" in words
    assert len(words) == len(asked.ASKED)


def test_what_stops_it_before_it_begins(capsys):
    assert gpu.main([]) == 2
    assert "no CUDA device: --tiny" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--tiny", "--only", "decode,sleep"])
    assert stopped.value.code == 2 and "'sleep' is not one of ceilings, train" in capsys.readouterr().err
    assert gpu._arguments(["--only", "decode,train"]).only == ["ceilings", "train", "decode"]


def test_a_case_that_fails_costs_no_other(capsys):
    kept: list = []
    bench = a_bench(kept, tiny=False, limit_s=100.0)
    bench.begin("train", 0.5)

    def fails(error: BaseException) -> Row:
        raise error

    for name, error in (
        ("memory", torch.OutOfMemoryError("CUDA out of memory.\n Tried")),
        ("kernel", RuntimeError("no kernel\nfor this")),
        ("refused", ValueError("precision.fp8=delayed needs")),
        ("reason", NotMeasured("because")),
    ):
        assert bench.case(name, lambda error=error: fails(error)) is None
    assert bench.case("long", lambda: Row({}, ""), needs_s=60.0) is None
    assert bench.case("fine", lambda: Row({"s": 2.0}, "some")) == Row({"s": 2.0}, "some")
    assert [(row["case"], re.sub(r", and \d+ are left", "", row.get("not_measured", ""))) for row in bench.rows] == [
        ("memory", "out of memory: CUDA out of memory. Tried"),
        ("kernel", "RuntimeError: no kernel for this"),
        ("refused", "precision.fp8=delayed needs"),
        ("reason", "because"),
        ("long", "the time is up: it needs about 60 s"),
        ("fine", ""),
    ]
    assert len(kept) == 6 and "RuntimeError" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        bench.case("stopped", lambda: fails(KeyboardInterrupt()))


@pytest.mark.parametrize("memory", [79e9, 140e9])
def test_as_many_layers_as_the_plan_has_room_for(monkeypatch, memory):
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (memory, memory), raising=False)
    bench = a_bench(tiny=False)
    cfg, load = models.settings(bench), models.work(bench).load
    for size in models.SIZES:
        count, whole = models.layers_that_fit(bench, size, cfg, ("update",)), models.shape(bench, size).text.num_layers
        assert (count == whole) == ((size, memory) == ("3b", 140e9)) and count > 2
        for layers, fits in ((count, True), (count + 1, False)):
            (rank,) = rank_memory(cfg, plan_shape(models.shape(bench, size, layers)), 1, "cuda", load)
            assert (rank.peak("update") <= models.FREE * memory) == fits or layers > whole
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1e10, memory), raising=False)
    with pytest.raises(NotMeasured, match="memory is short: 9 GB have no room for two layers of 3b"):
        models.layers_that_fit(bench, "3b", cfg, ("update",))


def test_layers_are_left_out_until_they_fit():
    asked: list[int] = []

    def measure(count: int) -> Row:
        asked.append(count)
        if count > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Row({"layers": count}, "")

    assert models.with_fewer_layers(36, measure).figures == {"layers": 8}
    assert asked == [36, 27, 20, 15, 11, 8]
    with pytest.raises(torch.OutOfMemoryError):
        models.with_fewer_layers(3, lambda count: measure(100))


def test_flops_and_bytes_that_are_counted():
    """Against the run's own count of a step, and against every parameter of the language model by its name."""
    bench = a_bench()
    cfg, step = models.settings(bench), models.work(bench)
    with ranks.alone() as mesh:
        policy = models.policy(mesh, models.shape(bench, "3b"), cfg)
        prompts = models.prompts(policy.shape, step.load)
        groups = models.groups(prompts, step.lengths())
        replayed = cfg.model_copy(update={"debug": DebugConfig(replay_rollouts="-")})
        assert train._flops(policy, groups) == sum(step_flops(groups, groups, policy.shape, replayed))
        text = policy.shape.text
        weights = sum(
            2 * p.numel() for name, p in policy.model.language.named_parameters() if text.tied or "embed" not in name
        )
        read = decode._bytes(policy, prompts, rows=8, own=5.0)
        tokens = 2 * step.load.prompt_tokens + 8 * 5
        assert read == weights + tokens * text.num_layers * 2 * text.num_kv_heads * text.head_dim * 2
        layers = sum(
            p.numel() for name, p in policy.model.language.named_parameters() if p.dim() == 2 and "layers" in name
        )
        assert decode._bytes(policy, prompts, 8, 5.0, in_fp8=True) == read - layers
        assert {str(p.dtype) for p in policy.parameters()} == {"torch.bfloat16"}


def test_lengths_are_those_that_are_said():
    for work in (models.REAL, models.TINY):
        lengths = work.lengths()
        assert lengths.shape == (work.load.prompts, work.load.generations)
        assert abs(lengths.mean() - work.mean) < 0.5 and lengths.max() <= work.load.new_tokens
