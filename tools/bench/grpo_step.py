"""A whole GRPO step of this program against TRL's GRPOTrainer, two processes of one thread each.

The same tiny Qwen2.5-VL, rows and images of 448 x 448 (256 image tokens), 8 prompts x G=8 a step, completions of 64
tokens that never end early, IoU + format rewards (ours through its reward processes), fp32, Adam. Ours runs
`vlmr1 train` at TP=1 DP=2, TRL runs on torchrun with activations kept, not recomputed. A measurement is one job's
steady state: the median time from the end of one step to the end of the next, after the first steps. Cases: `beta0`, in
which ours makes a reference pass more than TRL; `beta0.04`, with a reference model. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench import common

BETAS = {"beta0": 0.0, "beta0.04": 0.04}
PROMPTS, GENERATIONS, NEW_TOKENS, SIDE, ROWS = 8, 8, 64, 448, 64
LEARNING_RATE = 1e-6
OUR_WARM_UP, THEIR_WARM_UP = 3, 1  # steps
LIMIT_S = 600
SMALLEST_BETA = 1e-6


def main() -> None:
    """Measure the cases that were asked for."""
    parser = common.parser(__doc__, tuple(BETAS))
    parser.add_argument("--our-steps", type=int, default=8, help="measured, of a job of ours (default: %(default)s)")
    parser.add_argument("--their-steps", type=int, default=3, help="measured, of one of TRL's (default: %(default)s)")
    args = parser.parse_args()
    if find_spec("trl") is None:
        parser.error("TRL is not installed here: pip install -c constraints-cpu.txt -e '.[bench]'")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root)
        cases = [run_case(name, root, args) for name in common.chosen(args, tuple(BETAS))]
    common.finish("grpo_step", cases, args)


def run_case(name: str, root: Path, args: argparse.Namespace) -> common.Case:
    """Measure one case."""
    # A random model's rewards are all alike. Without KL ours would then skip the update, which TRL makes all the same.
    beta = max(BETAS[name], SMALLEST_BETA)
    ours, peer = our_job(root, beta, args.our_steps), their_job(root, BETAS[name], args.their_steps)
    pairs = common.alternate(ours, peer, args.pairs, warm_up=False)
    setting = (
        f"{PROMPTS} prompts, images of {SIDE} x {SIDE} (256 image tokens), x {GENERATIONS}, {NEW_TOKENS} new tokens, "
        f"beta {BETAS[name]:g} (ours {beta:g}), vocabulary 512, fp32, IoU + format; each side 2 processes x 1 thread: "
        f"ours TP=1 DP=2, TRL DDP over gloo; median of {args.our_steps} (ours) and {args.their_steps} (TRL) steps a job"
    )
    return common.case(name, pairs, "completions/s", setting, more_is_better=True)


def prepare(root: Path) -> None:
    """Write the model (``model``), the rows (``rows.jsonl``, ``images``) and their shards (``shards``)."""
    from tools.bench import tiny

    model = tiny.write_model(root / "model")
    never_end(model)
    images = root / "images"
    images.mkdir()
    rows = []
    for i in range(ROWS):
        (images / f"{i}.jpg").write_bytes(tiny.picture(i, SIDE))
        turns = [{"from": "human", "value": f"<image>{tiny.QUESTION}"}, {"from": "gpt", "value": tiny.TRUTH}]
        rows.append({"id": str(i), "image": f"{i}.jpg", "conversations": turns})
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["shards", "build", root / "shards", "--jsonl", root / "rows.jsonl", "--images", images]
    run([sys.executable, "-m", "megatron_vlmr1.cli", *command], {})


def never_end(model: Path) -> None:
    """Name an id beyond the vocabulary as the end of a completion, so that none ends early."""
    path = model / "generation_config.json"
    vocabulary = json.loads((model / "config.json").read_bytes())["text_config"]["vocab_size"]
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"eos_token_id": vocabulary}))


def our_job(root: Path, beta: float, steps: int) -> Callable[[], float]:
    """Return a measurement of `vlmr1 train` in completions/s."""
    sections: dict[str, Any] = {
        "method": "grpo",
        "precision": "fp32",
        "model": {"path": str(root / "model")},
        "data": {"train": str(root / "shards")},
        "optimizer": {"lr": LEARNING_RATE},
        "rollout": {"num_generations": GENERATIONS, "max_new_tokens": NEW_TOKENS},
        "grpo": {"beta": beta},
        "rewards": {"workers": 1},
        "train": {"steps": OUR_WARM_UP + steps, "prompts_per_step": PROMPTS, "save_every": 0, "sample_every": 0},
    }

    def measure() -> float:
        with tempfile.TemporaryDirectory(dir=root) as folder:
            config = Path(folder) / "config.json"  # YAML takes JSON
            config.write_text(json.dumps(sections | {"run_dir": str(Path(folder) / "run")}))
            run([sys.executable, "-m", "megatron_vlmr1.cli", "train", config, "--nproc", 2], {"OMP_NUM_THREADS": "1"})
            lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        metrics = [json.loads(line) for line in lines][OUR_WARM_UP:]
        assert len(metrics) == steps and all(m["rollout/length_mean"] == NEW_TOKENS for m in metrics), metrics
        common.note("ours, s: " + " ".join(f"{k} {v:.2f}" for k, v in phases(metrics).items()))
        return PROMPTS * GENERATIONS / statistics.median(m["perf/step_s"] for m in metrics)

    return measure


def phases(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the median seconds of each phase of our steps."""
    names = ["perf/step_s", *(k for k in metrics[0] if k.startswith("time/"))]
    return {name.partition("/")[2]: statistics.median(m.get(name, 0.0) for m in metrics) for name in names}


def their_job(root: Path, beta: float, steps: int) -> Callable[[], float]:
    """Return a measurement of TRL's trainer in completions/s."""

    def measure() -> float:
        with tempfile.TemporaryDirectory(dir=root) as folder:
            out = Path(folder) / "steps.json"
            settings = {
                "root": str(root),
                "out": str(out),
                "beta": beta,
                "steps": THEIR_WARM_UP + steps,
                "prompts": PROMPTS,
                "generations": GENERATIONS,
                "new_tokens": NEW_TOKENS,
                "learning_rate": LEARNING_RATE,
            }
            program = Path(__file__).with_name("peers") / "trl_step.py"
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            run([*launch, program, json.dumps(settings)], {"OMP_NUM_THREADS": "1"})
            result = json.loads(out.read_bytes())
        seconds = result["step_s"][THEIR_WARM_UP:]
        assert len(seconds) == steps and set(result["lengths"]) == {NEW_TOKENS}, result
        return PROMPTS * GENERATIONS / statistics.median(seconds)

    return measure


def run(command: Sequence[object], env: dict[str, str]) -> None:
    """Run a program of ours or TRL's; say what it printed when it fails."""
    full = {**os.environ, "PYTHONPATH": str(common.ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    words = [str(word) for word in command]
    done = subprocess.run(words, env=full, capture_output=True, text=True, check=False, timeout=LIMIT_S)  # noqa: S603 - ours
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-5000:]}")


if __name__ == "__main__":
    main()
