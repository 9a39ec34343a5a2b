"""Bad input to the main job: one clear line, exit code 2, nothing written."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from megatron_vlmr1.checkpoint.locate import hf_directory
from megatron_vlmr1.cli.main import main
from tests import jobs


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.build_shards(tmp_path_factory.mktemp("data"), "train", 8)


def refused(capfd: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([str(word) for word in words]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("vlmr1: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.steps=0", "train.steps: Input should be greater than 0"),
        ("seed=9223372036854775808", "seed: Input should be less than 9223372036854775808"),
        ("parallel.timeout_s=99999999999", "parallel.timeout_s: Input should be less than"),
        ("train.stepz=5", "unknown key train.stepz; did you mean train.steps?"),
        ("parallel.tensor_model_parallel_size=3", "tensor_model_parallel_size=3 does not divide the model's 4"),
        (
            "parallel.pipeline_model_parallel_size=3",
            "pipeline_model_parallel_size=3 does not divide the model's 4",
        ),
        ("parallel.pipeline_layers=[4,1]", "parallel: pipeline_layers has 2 numbers; pipeline x virtual"),
        (
            "parallel.overlap_param_gather=true",
            "overlap_param_gather goes by the buckets of overlap_grad_reduce",
        ),
        (
            "rollout.max_cache_tokens=20",
            "rollout.max_cache_tokens=20 is too small: the longest prompt (data.max_prompt_t",
        ),
        ("task=reck", "no task named reck; known: counting, gui, "),
        ("task=/nowhere/my_task.py", "task: /nowhere/my_task.py: no such file"),
        ("rewards.weights.iuo=1", "iuo"),
        ("debug.first_step=4", "debug.first_step=4 is not before train.steps=4"),
        ("model.path=asset:huge_vlm", "known: tiny_vlm"),
        ("model.path=/nowhere", "/nowhere: no such directory"),
        ("data.train=/nowhere", "/nowhere: no such directory of shards"),
        ("data.evaluate.heldout=/nowhere", "/nowhere: no such directory of shards"),
    ],
)
def test_a_bad_setting_is_one_line(
    tmp_path: Path, shards: Path, capfd: pytest.CaptureFixture[str], override: str, says: str
) -> None:
    config = jobs.write_config(tmp_path, shards)
    assert says in refused(capfd, "train", config, "--nproc", 2, override)
    assert not (tmp_path / "run").exists()


def test_wandb_that_is_not_installed(
    tmp_path: Path, shards: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = jobs.write_config(tmp_path, shards, telemetry={"wandb_project": "p"})
    assert "telemetry.wandb_project=p: wandb is not installed; pip install" in refused(capfd, "train", config)
    assert not (tmp_path / "run").exists()


def test_an_empty_split(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    config = jobs.write_config(tmp_path, tmp_path / "empty")
    assert str(tmp_path / "empty") in refused(capfd, "train", config)


def test_a_model_of_another_family(tmp_path: Path, shards: Path, capfd: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    config = jobs.write_config(tmp_path, shards, model={"path": str(other)})
    assert "model_type 'llama' is not supported; known: qwen2_5_vl" in refused(capfd, "train", config)


def test_rows_without_their_image_and_broken_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "[1, 2, 3, 4]"}]
    row = {"id": 1, "image": "gone.png", "conversations": said}
    for text, says in ((json.dumps(row), "'gone.png' is missing"), ("{broken", "rows.jsonl:1")):
        (tmp_path / "rows.jsonl").write_text(text + "\n")
        assert main(["shards", "build", str(tmp_path / "out"), "--jsonl", str(tmp_path / "rows.jsonl")]) == 2
        assert says in capfd.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.timeout(120)
def test_weights_of_another_model_are_refused_by_the_ranks(tmp_path: Path, shards: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(hf_directory("asset:tiny_vlm"), other)
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 512
    (other / "config.json").write_text(json.dumps(config))
    code, output = jobs.run_forked(2, "train", jobs.write_config(tmp_path, shards, model={"path": str(other)}))
    errors = [line for line in output.splitlines() if "error" in line]
    assert code == 2 and len(errors) == 1, output
    assert "mlp" in errors[0] and "config.json asks for" in errors[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--nproc", 3], "3 ranks cannot hold parallel.tensor_model_parallel_size=2 x"),
        (["--nproc", 0], "--nproc 0: at least one rank"),
        (["parallel.tensor_model_parallel_size=3"], "does not divide the model's 4"),
        (["--nproc", 4, "train.prompts_per_step=3"], "train.prompts_per_step=3 is not a multiple of the 2"),
        (["--nproc", 4, "data.lanes=3"], "data.lanes=3 is not a multiple of the 2 data-parallel ranks"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_rank_starts(
    tmp_path: Path, shards: Path, capfd: pytest.CaptureFixture[str], words: list[object], says: str
) -> None:
    config = jobs.write_config(tmp_path, shards, data={"train": str(shards), "evaluate": {"val": str(shards)}})
    assert says in refused(capfd, "train", config, *words)
    assert says in refused(capfd, "train", config, "--dry-run", *words)
    if "not a multiple" not in says:
        assert says in refused(capfd, "evaluate", config, *words)
    assert "/nowhere: no such directory of shards" in refused(capfd, "evaluate", config, "data.evaluate.val=/nowhere")
    assert not (tmp_path / "run").exists()


def test_the_examples_work_on_the_data_of_the_quickstart(
    tmp_path: Path, shards: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "runs/quickstart/data"
    data.mkdir(parents=True)
    for split in ("train", "heldout", "ood"):
        (data / split).symlink_to(shards)
    monkeypatch.chdir(tmp_path)
    for page in ([], ["train"]):
        with pytest.raises(SystemExit):
            main([*page, "--help"])
        (example,) = [line for line in capfd.readouterr().out.splitlines() if "vlmr1 train configs/" in line]
        assert main([*example.split()[1:], "--dry-run"]) == 0
        assert "run_dir: runs/short" in capfd.readouterr().out  # not the quickstart's own, which has other settings


def test_dry_run_prints_the_resolved_config(tmp_path: Path, shards: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(jobs.write_config(tmp_path, shards)), "--dry-run", "train.steps=7"]) == 0
    assert "  steps: 7\n" in capfd.readouterr().out
