"""The README.md of a model to publish: where it comes from, how it was trained, what it reached."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_vlmr1.report.curves import main_charts
from megatron_vlmr1.report.facts import accuracy_series, comparison, headline, setup
from megatron_vlmr1.report.run import Run, load_run

CURVE = "reward.svg"
_FENCE = "````"  # a config may hold three of them
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_HEAD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [megatron_vlmr1, {method}]
{base}---
# {title}

{facts}.

Loads with transformers' `AutoModelForImageTextToText`; config, tokenizer and image processor are the base model's.
"""


def run_of(checkpoint: Path) -> Path | None:
    """Return the run directory that a checkpoint, or the run directory itself, belongs to; None for other models."""
    for path in (checkpoint, checkpoint.resolve().parent.parent):
        if (path / "metrics.jsonl").is_file() and (path / "config.yaml").is_file():
            return path
    return None


def model_card(run_dir: Path, title: str) -> Mapping[str, bytes]:
    """Return the files of a model card, by name: README.md, and the reward's curve where there is one.

    Raises:
        ValueError: a file of the run is damaged.
    """
    run = load_run(run_dir)
    charts = {chart.title: chart for chart in main_charts(run.metrics, accuracy_series(run))}
    parts = [_head(run, title)]
    files = {}
    if "Reward" in charts:
        files[CURVE] = charts["Reward"].svg.encode()
        parts.append(f"## Reward\n\n![mean reward of each step]({CURVE})\n")
    parts += [_evaluations(run), _training(run)]
    return {**files, "README.md": "\n".join(filter(None, parts)).encode("utf-8", errors="replace")}


def _head(run: Run, title: str) -> str:
    base = str(run.setting("model.path") or "")
    return _HEAD.format(
        method=str(run.setting("method") or "grpo"),
        base=f"base_model: {base}\n" if _HUB_NAME.fullmatch(base) else "",
        title=_cell(title),
        facts=" · ".join(headline(run)) or "Trained with megatron_vlmr1",
    )


def _evaluations(run: Run) -> str:
    splits, measures, notes = comparison(run)
    if not measures:
        return ""
    rows = [[f"{m.label} ({m.note})", *(f"{c.before} → {c.after}" if c else "" for c in m.changes)] for m in measures]
    return "\n".join(
        ["## Evaluation, before → after", "", *_table(["", *splits], rows), "", *(f"{n}\n" for n in notes)]
    )


def _training(run: Run) -> str:
    rows = [[f"`{name}`", value] for name, value in setup(run)]
    config = [_FENCE + "yaml", run.config_text.rstrip(), _FENCE]
    return "\n".join(["## Training", "", *_table(["setting", "value"], rows), "", *config, ""])


def _table(heads: list[str], rows: list[list[str]]) -> Iterator[str]:
    for row in (heads, ["---"] * len(heads), *rows):
        yield "| " + " | ".join(map(_cell, row)) + " |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
