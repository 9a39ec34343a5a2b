"""The whole method on the shipped tiny VLM: data, evaluate, GRPO on 2 ranks, evaluate, export, compare, report.

Called by launch/quickstart.sh. Every phase that is done is skipped, so a second call goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "quickstart.yaml"
SCENES = {"train": 3200, "heldout": 320, "ood": 240}
COMPARED = 50  # held-out answers that transformers must give as well
FIGURES = ("acc50", "iou_mean", "iou_parsed", "format_rate", "reward_mean")


class Quickstart:
    """One quickstart in a run directory."""

    def __init__(self, run_dir: Path, overrides: list[str], started: float) -> None:
        self.run, self.started = run_dir, started
        data = run_dir / "data"
        self.overrides = [
            f"run_dir={run_dir}",
            f"data.train={data / 'train'}",
            *(f"data.evaluate.{split}={data / split}" for split in ("heldout", "ood")),
            *overrides,
        ]
        self.seconds: dict[str, float] = self._read("seconds.json", {})

    def go(self) -> None:
        """Run what is not done yet.

        Raises:
            SystemExit: the run directory was started with other overrides (2), or a phase failed.
        """
        run = self.run
        settings = {"overrides": self.overrides}
        if self._read("settings.json", settings) != settings:
            say(f"{run} was started with other settings; delete it, or name another --run-dir")
            raise SystemExit(2)
        write(run / "settings.json", settings)
        self.phase("data", (run / "data" / "ood").is_dir(), self.data)
        self.phase("evaluate_before", (run / "evaluations" / "before.json").is_file(), lambda: self.evaluate("before"))
        self.phase("train", self.trained(), self.train)
        after = [f"model.path={run}"]
        done = (run / "evaluations" / "after.json").is_file()
        self.phase("evaluate_after", done, lambda: self.evaluate("after", *after))
        self.phase("export", (run / "export").is_dir(), lambda: vlmr1("convert", "export", run, run / "export"))
        self.phase("compare", "transformers" in self._read("compare.json", {}), self.compare)
        self.summarise()
        vlmr1("report", run)
        self.tell()

    def phase(self, name: str, done: bool, work: Callable[[], object]) -> None:
        """Do one phase, unless it is done, and remember how long it took over all calls."""
        if done:
            say(f"{name}: done before; delete {self.run} to start afresh")
            return
        say(name)
        begun = time.monotonic()
        try:
            work()
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - begun, 1)
            write(self.run / "seconds.json", self.seconds)

    def data(self) -> None:
        """Draw scenes and build their shards."""
        drawn = self.run / "data" / "scenes"
        for split, count in SCENES.items():
            vlmr1("shards", "scenes", drawn, "--split", split, "--count", count)
            out = self.run / "data" / split
            if not out.is_dir():
                jsonl = drawn / f"{split}.jsonl"
                vlmr1("shards", "build", out, "--jsonl", jsonl, "--images", drawn / "images", "--shard-size", "16MB")

    def evaluate(self, label: str, *more: str) -> None:
        """Measure both splits."""
        vlmr1("evaluate", CONFIG, "--nproc", 2, "--label", label, *self.overrides, *more)

    def trained(self) -> bool:
        """Whether training has reached its last step."""
        return (self.run / "facts.json").is_file()

    def train(self) -> None:
        """GRPO, from the newest checkpoint if there is one."""
        vlmr1("train", CONFIG, "--nproc", 2, *self.overrides)

    def compare(self) -> None:
        """Let transformers, in a process without this package, answer as well."""
        script = ROOT / "tools" / "answer_with_transformers.py"
        scenes = self.run / "data" / "scenes"
        command = [sys.executable, str(script), str(self.run / "export"), str(scenes), str(COMPARED)]
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
        out = subprocess.run(command, check=True, capture_output=True, text=True, env=env, cwd="/")  # noqa: S603
        theirs = json.loads(out.stdout.splitlines()[-1])
        rows = (self.run / "evaluations" / "after_heldout.jsonl").read_text().splitlines()[:COMPARED]
        ours = [json.loads(row)["text"] for row in rows]
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        say(f"greedy answers of the export in transformers: {same} of {len(ours)} equal ours")
        if same != len(ours):
            raise SystemExit("quickstart: the exported model answers differently in transformers")
        write(self.run / "compare.json", {"transformers": {"answers": len(ours), "equal": same}})

    def summarise(self) -> None:
        """Write summary.json."""
        out: dict[str, Any] = {}
        for label in ("before", "after"):
            results = self._read(f"evaluations/{label}.json", {})
            for split, key in (("heldout", label), ("ood", f"ood_{label}")):
                out[key] = {name: results[split][name] for name in FIGURES}
        facts = self._read("facts.json", {})
        out |= {**facts, **self._read("compare.json", {})}
        out["reward_pids_apart"] = not set(facts["reward_pids"]) & set(facts["rank_pids"])
        steps = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        waited, total = (sum(step[name] for step in steps) for name in ("time/reward_exposed", "perf/step_s"))
        out["reward_exposed_share"] = waited / total
        self.seconds["this_call_total"] = round(time.time() - self.started, 1)
        out["seconds"] = self.seconds
        write(self.run / "summary.json", out)

    def tell(self) -> None:
        """Print the result."""
        summary = self._read("summary.json", {})
        for split, before, after in (("held-out", "before", "after"), ("out of domain", "ood_before", "ood_after")):
            parts = [f"{name} {told(summary[before][name])} -> {told(summary[after][name])}" for name in FIGURES]
            say(f"{split}: " + "  ".join(parts))
        say(f"waiting for rewards: {summary['reward_exposed_share']:.2%} of the steps' time")
        say(f"report: {self.run / 'report.html'}   model: {self.run / 'export'}")

    def _read(self, name: str, nothing: dict[str, Any]) -> dict[str, Any]:
        path = self.run / name
        return json.loads(path.read_bytes()) if path.is_file() else dict(nothing)


def vlmr1(*words: object) -> None:
    """Run one verb; leave with its exit code if it fails."""
    command = [sys.executable, "-m", "megatron_vlmr1.cli", *map(str, words)]
    process = subprocess.Popen(command, cwd=ROOT)  # noqa: S603 - our own program
    try:
        code = process.wait()
    except KeyboardInterrupt:
        code = process.wait()  # it got the Ctrl-C as well, and saves
    if code:
        raise SystemExit(code)


def write(path: Path, value: object) -> None:
    """Write JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(json.dumps(value, indent=1) + "\n")
    fresh.replace(path)


def told(value: float | None) -> str:
    """Return a figure, which is null where no answer has it, in words."""
    return "-" if value is None else f"{value:.3f}"


def say(text: str) -> None:
    """Print one line of progress."""
    print(f"[quickstart] {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Parse and go."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", default="runs/quickstart", help="default: runs/quickstart")
    parser.add_argument("--started", type=float, default=time.time(), help="when the caller began, seconds since 1970")
    parser.add_argument("overrides", nargs="*", help="such as seed=1")
    args = parser.parse_args()
    quickstart = Quickstart((ROOT / args.run_dir).resolve(), args.overrides, args.started)
    try:
        quickstart.go()
    except SystemExit as stopped:
        if stopped.code in (85, 130):
            say(f"stopped; call it again to go on from the last checkpoint in {quickstart.run}")
        raise
    except KeyboardInterrupt:
        say(f"stopped; call it again to go on in {quickstart.run}")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
