"""What a run directory holds, read and checked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_vlmr1.report.numbers import number
from megatron_vlmr1.rewards import answers
from megatron_vlmr1.rewards.boxes import Box
from megatron_vlmr1.telemetry.metrics import MetricRows, read_metrics

LABELS = ("before", "after")  # of `vlmr1 evaluate --label LABEL`, which a report compares

# The quickstart's summary.json names an evaluation by this key; its file is LABEL_SPLIT.
EVALUATIONS = {
    "before": "before_heldout",
    "after": "after_heldout",
    "ood_before": "before_ood",
    "ood_after": "after_ood",
}


@dataclass(frozen=True)
class Answer:
    """One row of an evaluation: a question and the greedy answer."""

    key: str
    question: str
    text: str
    truth: Box | None
    box: Box | None
    iou: float | None
    acc50: float | None
    image: str | None  # path relative to evaluations/, or to the run
    image_size: tuple[int, int] | None  # width, height in pixels


@dataclass(frozen=True)
class Sampled:
    """One completion of a training step."""

    text: str
    value: float | None
    parts: Mapping[str, float | None]
    failure: str | None
    advantage: float | None
    finish_reason: str


@dataclass(frozen=True)
class SampledGroup:
    """One prompt of a training step."""

    question: str
    truth: str
    completions: tuple[Sampled, ...]


@dataclass(frozen=True)
class Run:
    """One run, as far as it got."""

    path: Path
    metrics: MetricRows
    summary: Mapping[str, Any]
    config: Mapping[str, Any]
    config_text: str
    figures: Mapping[str, Mapping[str, Mapping[str, Any]]]  # by split and label
    evaluations: Mapping[str, Mapping[str, tuple[Answer, ...]]]  # by split and label
    samples: Mapping[int, tuple[SampledGroup, ...]]  # by step

    def setting(self, dotted: str) -> Any:
        """Return ``section.key`` of the config, or None where the run has none."""
        value: Any = self.config
        for part in dotted.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value


def load_run(run_dir: str | Path) -> Run:
    """Read what there is of a run.

    Raises:
        ValueError: no such directory, no run in it, or a file in it that is damaged; names the file and row.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise ValueError(f"{path}: no such run directory")
    if not any((path / name).is_file() for name in ("metrics.jsonl", "summary.json")):
        raise ValueError(f"{path}: no run: neither metrics.jsonl nor summary.json; give a config's run_dir")
    config_text = _text(path / "config.yaml")
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path / 'config.yaml'}: not readable: {' '.join(str(error).split())}") from error
    summary = _object(_text(path / "summary.json") or "{}", str(path / "summary.json"))
    return Run(
        path=path,
        metrics=read_metrics(path),
        summary=summary,
        config=config if isinstance(config, dict) else {},
        config_text=config_text,
        figures=_figures(path / "evaluations", summary),
        evaluations=_evaluations(path / "evaluations"),
        samples=_samples(path / "samples"),
    )


def _figures(folder: Path, summary: Mapping[str, Any]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Figures by split and label: what `vlmr1 evaluate` wrote, else what a summary says."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for label in LABELS:
        file = folder / f"{label}.json"
        tables = _object(_text(file), str(file)) if file.is_file() else {}
        for key, stem in EVALUATIONS.items() if not tables else ():
            side, _, split = stem.partition("_")
            if side == label and key in summary:
                tables[split] = summary[key]
        for split, table in tables.items():
            if isinstance(table, dict):
                found.setdefault(split, {})[label] = table
    return dict(sorted(found.items(), key=lambda item: (item[0] != "heldout", item[0])))


def _evaluations(folder: Path) -> dict[str, dict[str, tuple[Answer, ...]]]:
    """Answers by split and label; the held-out split comes first."""
    found: dict[str, dict[str, tuple[Answer, ...]]] = {}
    for label in LABELS:
        for file in folder.glob(f"{label}_*.jsonl"):
            split = file.stem.removeprefix(f"{label}_")
            found.setdefault(split, {})[label] = tuple(_answer(row) for row in _rows(file))
    return dict(sorted(found.items(), key=lambda item: (item[0] != "heldout", item[0])))


def _answer(row: Mapping[str, Any]) -> Answer:
    return Answer(
        key=str(row.get("key", "")),
        question=str(row.get("question", "")),
        text=str(row.get("text", "")),
        truth=_box(row.get("truth")),
        box=_box(row.get("box")),
        iou=number(row.get("iou")),
        acc50=number(row.get("acc50")),
        image=row["image"] if isinstance(row.get("image"), str) else None,
        image_size=_size(row.get("image_size")),
    )


def _size(value: Any) -> tuple[int, int] | None:
    if not isinstance(value, list) or len(value) != 2:
        return None
    width, height = (number(side) for side in value)
    return (int(width), int(height)) if width and height and min(width, height) >= 1 else None


def _box(value: Any) -> Box | None:
    """Four finite numbers, from a list, or from a text as everything that is scored is read."""
    if isinstance(value, str):
        return answers.box(value)
    if not isinstance(value, list) or len(value) != 4:
        return None
    x1, y1, x2, y2 = (number(side) for side in value)
    if x1 is None or y1 is None or x2 is None or y2 is None:
        return None
    return x1, y1, x2, y2


def _samples(folder: Path) -> dict[int, tuple[SampledGroup, ...]]:
    """Groups of the first, the middle and the last step that were written."""
    files: dict[int, Path] = {}
    for file in folder.glob("step_*.jsonl"):
        if match := re.fullmatch(r"step_(\d{1,12})", file.stem):
            files[int(match[1])] = file
    steps = sorted(files)
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    return {step: tuple(_group(row) for row in _rows(files[step])) for step in chosen}


def _group(row: Mapping[str, Any]) -> SampledGroup:
    completions = row.get("completions")
    items = [item for item in completions if isinstance(item, dict)] if isinstance(completions, list) else []
    return SampledGroup(
        str(row.get("question", "")), str(row.get("truth", "")), tuple(_completion(item) for item in items)
    )


def _completion(item: Mapping[str, Any]) -> Sampled:
    parts = item.get("parts")
    return Sampled(
        text=str(item.get("text", "")),
        value=number(item.get("value")),
        parts={str(name): number(value) for name, value in parts.items()} if isinstance(parts, dict) else {},
        failure=str(item["failure"]) if item.get("failure") else None,
        advantage=number(item.get("advantage")),
        finish_reason=str(item.get("finish_reason", "")),
    )


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    for index, line in enumerate(_text(file).split("\n")):
        if line.strip():
            yield _object(line, f"{file} row {index + 1}")


def _object(text: str, origin: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{origin}: not JSON: {error}; repair or delete it") from error
    if not isinstance(value, dict):
        raise ValueError(f"{origin}: not a JSON object; repair or delete it")
    return value


def _text(file: Path) -> str:
    """Content of a file, empty where there is none."""
    if not file.is_file():
        return ""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text: {error}; repair or delete it") from error
