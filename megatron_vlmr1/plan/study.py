"""A scaling study: a grid of runs, read from one YAML file. No torch."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_vlmr1 import config
from megatron_vlmr1.config import Config
from megatron_vlmr1.config.section import NonNegativeInt, PositiveInt, Section

CELLS = "cells.json"  # of a study's directory: what became of each cell
WAITING, RUNNING, DONE, FAILED, REFUSED = "waiting", "running", "done", "failed", "refused"

Scaling = Literal["strong", "weak"]
Overrides = dict[str, Any]
_LABEL = re.compile(r"[A-Za-z0-9][\w.+]*", re.ASCII)  # a part of a directory's name


class StudyConfig(Section):
    """One study: every number of nodes x every point of each axis."""

    config: str
    """YAML file of the runs, or the name of one that came with the package."""
    nodes: Annotated[list[PositiveInt], Field(min_length=1)]
    """Numbers of nodes; the smallest is what efficiencies are measured against."""
    ranks_per_node: PositiveInt | None = None
    """Without a cluster, which knows by itself: so many local processes stand for a node; 1 when empty."""
    overrides: Overrides = {}
    """Settings of all runs, dotted keys as on the command line."""
    axes: dict[str, dict[str, Overrides]] = {}
    """By name of the axis (layout, model, batch …) and label of the point: the settings of that point."""
    scaling: Annotated[list[Scaling], Field(min_length=1)] = ["strong"]
    """strong: the same train.prompts_per_step on all nodes; weak: it grows with the nodes."""
    warmup_steps: NonNegativeInt = 1
    """First steps of each run that are not measured."""
    cluster: str | None = None
    """Cluster whose SLURM runs the jobs, as `vlmr1 submit --cluster` takes it, or a file beside the study; local
    processes, one job after another, when empty."""
    at_once: PositiveInt = 4
    """Jobs that are in the queue at a time."""
    time: str | None = None
    """Time limit of a job, as sbatch takes it; the cluster's own when empty."""

    @model_validator(mode="after")
    def _labels_name_directories(self) -> StudyConfig:
        for name, points in self.axes.items():
            if not points:
                raise ValueError(f"axes.{name} has no point")
            for label in points:
                if not _LABEL.fullmatch(label):
                    raise ValueError(f"axes.{name}: label {label!r} may have letters, digits, '_', '.' and '+' only")
        for key in ("run_dir", *self.axes):
            if key in self.overrides or any(key in point for points in self.axes.values() for point in points.values()):
                raise ValueError(f"{key} is set by the study itself, or is the name of an axis and not a setting")
        for name, values in (("nodes", self.nodes), ("scaling", self.scaling)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={values} names one twice")
        if self.cluster is None and (self.time, self.at_once) != (None, 4):
            raise ValueError(
                "time and at_once are for jobs of a cluster: without one, local jobs run one after another"
            )
        if self.cluster is not None and self.ranks_per_node is not None:
            raise ValueError("ranks_per_node is for local jobs: a cluster's file says how many ranks its nodes have")
        return self


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    name: str
    nodes: int
    ranks: int
    point: dict[str, str]  # axis -> label
    scaling: tuple[str, ...]  # which curves it is a point of; at the fewest nodes strong and weak are the same run
    overrides: tuple[str, ...]


def read(path: Path) -> StudyConfig:
    """Read a study.

    Raises:
        ValueError: one line that names the file and the key.
    """
    return config.load_section(StudyConfig, path)


def cells(study: StudyConfig, ranks_per_node: int, config_file: Path, out: Path) -> list[Cell]:
    """Return the runs of the grid, those of few nodes first; each with `out`/cells/NAME as its run directory.

    Raises:
        ValueError: a point's settings are refused; one line.
    """
    found: list[Cell] = []
    least = min(study.nodes)
    for nodes, labels in itertools.product(sorted(study.nodes), itertools.product(*study.axes.values())):
        point = dict(zip(study.axes, labels, strict=True))
        settings = dict(study.overrides)
        for axis, label in point.items():
            settings |= study.axes[axis][label]
        for curves in _curves(study, nodes == least):
            name = "-".join([f"n{nodes}", *labels, *(curves if nodes > least and len(study.scaling) > 1 else ())])
            own = {**settings, "run_dir": str(out / "cells" / name)}
            words = [f"{key}={json.dumps(value)}" for key, value in own.items()]
            cfg = _loaded(config_file, words, name)
            if curves == ("weak",) and nodes > least:
                words.append(f"train.prompts_per_step={_grown(cfg.train.prompts_per_step, nodes, least, name)}")
            found.append(Cell(name, nodes, nodes * ranks_per_node, point, curves, tuple(words)))
    return found


def _curves(study: StudyConfig, smallest: bool) -> list[tuple[str, ...]]:
    return [tuple(study.scaling)] if smallest else [(kind,) for kind in study.scaling]


def _loaded(config_file: Path, words: list[str], name: str) -> Config:
    try:
        return config.load(config_file, words)
    except ValueError as error:
        raise ValueError(f"cell {name}: {error}") from error


def _grown(prompts: int, nodes: int, least: int, name: str) -> int:
    if prompts * nodes % least:
        raise ValueError(
            f"cell {name}: train.prompts_per_step={prompts} x {nodes} nodes / {least} is not a whole number; "
            "choose another train.prompts_per_step"
        )
    return prompts * nodes // least
