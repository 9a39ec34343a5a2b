"""Runs of the real program on drawn scenes and the shipped tiny VLM, small enough for a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil
import yaml

from megatron_vlmr1.cli.main import main
from megatron_vlmr1.data.scenes import write_split
from megatron_vlmr1.launch.local import log_path
from tests.distributed.ranks import fork

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "optimizer": {"lr": 7e-4, "warmup_steps": 0},
    "rollout": {"num_generations": 4, "max_new_tokens": 30},
    "grpo": {"beta": 0.0},
    "train": {"steps": 4, "prompts_per_step": 4, "save_every": 2, "sample_every": 1, "keep_checkpoints": 9},
    "parallel": {"tensor_model_parallel_size": 2, "timeout_s": 60},
    "rewards": {"workers": 1},
}


def build_shards(folder: Path, split: str, count: int) -> Path:
    """Draw scenes of a split and return their shards."""
    scenes = folder / f"scenes_{split}"
    jsonl = write_split(scenes, split, count)
    out = folder / split
    images = str(scenes / "images")
    assert main(["shards", "build", str(out), "--jsonl", str(jsonl), "--images", images, "--shard-size", "1MB"]) == 0
    return out


def write_config(folder: Path, shards: Path, name: str = "run", **sections: dict) -> Path:
    """Write a small GRPO config whose run directory is ``folder/name``."""
    config = {
        "method": "grpo",
        "run_dir": str(folder / name),
        "precision": "fp32",
        "model": {"path": "asset:tiny_vlm"},
        "data": {"train": str(shards)},
        **{key: dict(value) for key, value in SMALL.items()},
    }
    for key, value in sections.items():
        both = isinstance(value, dict) and isinstance(config.get(key), dict)
        config[key] = {**config[key], **value} if both else value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(*words: object, **variables: str) -> subprocess.Popen[str]:
    """Start ``vlmr1 words…`` with its output joined in a pipe, and `variables` in its environment."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **variables}
    command = [sys.executable, "-m", "megatron_vlmr1.cli", *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=ROOT, start_new_session=True
    )


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str]:
    """Return exit code and output."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output


def run(*words: object, timeout: float = 120) -> tuple[int, str]:
    """Run ``vlmr1 words…`` to its end."""
    return finish(start(*words), timeout)


def run_forked(nproc: int, *words: object, before: Callable[[], None] | None = None) -> tuple[int, str]:
    """As `run`, but without a launcher, on ranks that need not import what all of them need: seconds less for each.

    Each calls `before` first, which goes through pickle. Returns the first exit code that is not 0, and rank 0's
    output, or that of all ranks where their codes differ.
    """
    with tempfile.TemporaryDirectory() as logs:
        codes = fork(nproc, be_program, (list(map(str, words)), before), Path(logs))
        said = [log_path(Path(logs), rank).read_text() for rank in range(nproc)]
    return next(filter(None, codes), 0), "\n".join(said if len(set(codes)) > 1 else said[:1])


def be_program(words: list[str], before: Callable[[], None] | None = None) -> None:
    """Be a rank of ``vlmr1 words…``."""
    if before is not None:
        before()
    sys.exit(main(words))


def wait_for(process: subprocess.Popen[str], text: str) -> str:
    """Read output until a line holds `text`; return all of it."""
    seen = ""
    assert process.stdout is not None
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"the job ended without saying {text!r}:\n{seen}")


def command_line(process: psutil.Process) -> str:
    """Return a process's command line, or nothing once it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def ranks(pid: int) -> list[psutil.Process]:
    """Return the ranks that `pid` started, in their order."""
    found = [p for p in psutil.Process(pid).children() if "megatron_vlmr1.cli train" in command_line(p)]
    return sorted(found, key=lambda p: int(p.environ()["RANK"]))


def checkpoint_hashes(run_dir: Path, step: int) -> dict[str, str]:
    """sha256 of a checkpoint's weights, optimizer tensors and generators, by file."""
    manifest = json.loads((run_dir / "checkpoints" / f"step_{step}" / "manifest.json").read_text())
    kept = (".safetensors", ".distcp")
    return {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(kept)}
