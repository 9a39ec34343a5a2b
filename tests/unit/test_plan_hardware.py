"""Hardware files, and calibrations fitted to known and to real times."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_vlmr1 import config
from megatron_vlmr1.plan import fit, hardware, passes
from megatron_vlmr1.plan.shapes import read_plan_shape
from megatron_vlmr1.plan.time import program, step_time
from megatron_vlmr1.plan.workload import workload
from tests import jobs

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs" / "hardware").glob("*.yaml"))
H100 = hardware.read(ROOT / "configs" / "hardware" / "h100-80gb.yaml")
CPU = hardware.read(ROOT / "configs" / "hardware" / "cpu.yaml")


def test_every_file_reads_and_is_written_as_it_was(tmp_path):
    assert [path.stem for path in FILES] == ["a100-80gb", "cpu", "h100-80gb", "h200-141gb"]
    for path in FILES:
        read = hardware.read(path)
        assert read.name == path.stem
        hardware.write(read, tmp_path / "copy.yaml")
        assert hardware.read(tmp_path / "copy.yaml") == read
    assert hardware.read(FILES[3]).memory_bytes_per_s.value / H100.memory_bytes_per_s.value == pytest.approx(4.8 / 3.35)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("published: NVIDIA H100 data sheet, SXM, dense", "somebody", "peak_flops.bf16.source: String should match"),
        (
            "matmul_large: {value: 0.7",
            "matmul_large: {value: 1.7",
            "efficiency.matmul_large.value: Input should be less",
        ),
        ("name: h100-80gb", "nam: h100-80gb", "name: Field required"),
        ("name: h100-80gb", "name: [", "not a readable hardware file"),
    ],
)
def test_broken_files_are_named_with_the_key(tmp_path, old, new, message):
    text = (ROOT / "configs" / "hardware" / "h100-80gb.yaml").read_text()
    assert old in text
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=f"{path}.*{message}") as error:
        hardware.read(path)
    assert "\n" not in str(error.value)


def test_a_benchmark_sets_shares(tmp_path):
    path = tmp_path / "gpu.json"
    rows = [
        ("matmul_large", "FLOP/s", 600e12),
        ("decode", "B/s", 2.5e12),
        ("nvlink", "B/s", 360e9),
        ("launch", "s", 4e-6),
    ]
    path.write_text(json.dumps([{"name": n, "unit": u, "value": v} for n, u, v in rows]))
    fitted = fit.from_benchmark(H100, path)
    assert fitted.efficiency.matmul_large.value == pytest.approx(600 / 989.4)
    assert fitted.efficiency.decode.value == pytest.approx(2.5 / 3.35)
    assert fitted.efficiency.nvlink.value == pytest.approx(0.8)
    assert fitted.overheads.launch_s.value == 4e-6
    assert fitted.efficiency.decode.source == "measured: gpu.json"
    assert fitted.efficiency.memory == H100.efficiency.memory
    path.write_text(json.dumps([{"name": "nvlink", "unit": "GB/s", "value": 1}]))
    with pytest.raises(ValueError, match=r"gpu.json: nvlink in GB/s is not known; known: matmul_large in FLOP/s"):
        fit.from_benchmark(H100, path)
    for text in ("[1]", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="not a list of"):
            fit.from_benchmark(H100, path)
    path.write_text(json.dumps([{"name": "matmul_large", "unit": "FLOP/s", "value": 2e15}]))
    with pytest.raises(ValueError, match=r"gpu.json: .*less than or equal to 1"):
        fit.from_benchmark(H100, path)


def test_known_efficiencies_are_found_again():
    """Times of seven jobs, generated with other numbers than the fit begins with."""
    known = {
        "efficiency.matmul_large": 0.55,
        "efficiency.attention": 0.5,
        "efficiency.memory": 0.6,
        "efficiency.nvlink": 0.5,
        "efficiency.network": 0.6,
        "efficiency.pcie": 0.4,
        "overheads.launch_s": 9e-6,
        "overheads.tick_s": 1e-3,
        "overheads.step_s": 0.9,
        "overheads.rewards_s": 0.3,
    }
    true = hardware.calibrated(H100, known, "assumed")
    runs = []
    for size, gpus, overrides in (
        ("3b", 8, []),
        ("3b", 8, ["parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false"]),
        ("7b", 8, ["rollout.max_new_tokens=1024", "rollout.decode_burst=2"]),
        ("7b", 16, ["train.micro_batch_tokens=65536", "data.max_prompt_tokens=16000"]),
        ("32b", 32, ["rollout.num_generations=32"]),
        ("72b", 64, []),
        ("72b", 64, ["rollout.max_new_tokens=2048"]),
    ):
        cfg = config.load(ROOT / "configs" / "recipe" / f"{size}.yaml", overrides)
        shape = read_plan_shape(f"qwen2.5-vl-{size}")
        how, work = program(cfg, shape.text.num_layers, gpus, 8), workload(cfg, shape.vision)
        step = step_time(true, shape, how, work)
        seconds = {phase: cost.seconds for phase, cost in step.phases.items()}
        runs.append(fit.Observation(size, shape, how, work, seconds))
    assert fit.error(H100, runs) > 0.5
    found = fit.fit(H100, runs)
    assert fit.error(found, runs) < 1e-3
    for name, value in known.items():
        assert hardware.number(found, name) == pytest.approx(value, rel=0.06), name
    # What the phases do not tell stays, with its source.
    assert found.efficiency.matmul_small == H100.efficiency.matmul_small
    assert found.efficiency.attention.source.startswith("fitted: phases of 3b, 3b, 7b")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of the tiny model, done by the real program."""
    top = tmp_path_factory.mktemp("plan_fit")
    shards = jobs.build_shards(top, "train", 32)
    parallel = {"tensor_model_parallel_size": 1}
    train = {"steps": 6, "save_every": 0}  # the last step is saved all the same
    cfg = jobs.write_config(top, shards, parallel=parallel, grpo={"beta": 0.04}, train={**jobs.SMALL["train"], **train})
    process = jobs.start("train", cfg, "--nproc", 1)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    return top / "run"


def test_a_finished_run_is_predicted_better(finished):
    run = fit.observe(finished, 2)
    assert set(run.seconds) >= {"rollout", "logprobs", "update", "other"}
    assert run.work.grid == (8, 8) and 30 < run.work.prompt_tokens < 60  # scenes of 112 x 112 pixels
    assert 5 < run.work.completion_tokens <= 30
    fitted = fit.fit(CPU, [run])

    def squares(which: hardware.Hardware) -> float:
        known = fit.predicted(which, run)
        return sum(math.log(known[phase] / seconds) ** 2 for phase, seconds in run.seconds.items())

    assert squares(fitted) < 0.5 * squares(CPU)
    assert fit.error(fitted, [run]) < fit.error(CPU, [run])


def test_a_checkpoint_is_as_large_as_planned(finished):
    (state,) = finished.glob("checkpoints/step_*/state/optimizer")
    (weights,) = finished.glob("checkpoints/step_*/hf")
    run = fit.observe(finished, 2)
    planned = passes.checkpoint_bytes(run.shape, run.how.freeze_vision, 4)
    for directory, pattern, count in ((weights, "*.safetensors", planned[0]), (state, "*.distcp", planned[1])):
        assert sum(path.stat().st_size for path in directory.glob(pattern)) == pytest.approx(count, rel=0.05)


def test_what_is_no_finished_run(finished, tmp_path):
    with pytest.raises(ValueError, match="no such config file"):
        fit.observe(tmp_path, 2)
    (tmp_path / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
    with pytest.raises(ValueError, match=r"facts.json: not there or damaged: is it a finished run\?"):
        fit.observe(tmp_path, 2)
    (tmp_path / "facts.json").write_bytes((finished / "facts.json").read_bytes())
    with pytest.raises(ValueError, match=r"metrics.jsonl: no step that was trained on"):
        fit.observe(tmp_path, 2)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/tokens": 5, "time/update": 1.0}\n')  # no FLOPs
    with pytest.raises(ValueError, match=r"metrics.jsonl: no step that was trained on"):
        fit.observe(tmp_path, 2)
    (tmp_path / "facts.json").write_text('{"parallel": {"world": 0}}')
    with pytest.raises(ValueError, match=r"facts.json: not there or damaged"):
        fit.observe(tmp_path, 2)
