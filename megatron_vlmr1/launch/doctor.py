"""What this machine can do, line by line, and what to do about what it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from megatron_vlmr1.config import Config
    from megatron_vlmr1.launch.preflight import Examination

State = Literal["ok", "missing", "bad"]


@dataclass(frozen=True)
class Line:
    """One thing that was looked at.

    Attributes:
        name: of the thing.
        state: ok; missing: something does without it; bad: nothing will run as it should.
        found: what is there.
        do: what to do about it, "" where all is well.
    """

    name: str
    state: State
    found: str
    do: str = ""


def local_lines(cfg: Config | None, run_dir: Path) -> list[Line]:
    """Look at this machine, and at what `cfg` names if there is one; takes some seconds, most of them imports."""
    from megatron_vlmr1.launch import doctor_gpus, doctor_host, doctor_packages, doctor_slurm

    lines = [*doctor_packages.lines(), *doctor_gpus.lines(), *doctor_host.lines(run_dir), *doctor_slurm.lines()]
    return [*lines, *(_config_lines(cfg) if cfg else [])]


def job_lines(found: Examination) -> list[Line]:
    """Return what the nodes of a job found out about each other."""
    judged = found.verdict
    lines = [Line("job", "ok", found.summary())]
    if judged.broken:
        lines.append(Line("job", "bad", judged.broken, "mend it on all nodes, then start again"))
    for node, reasons in judged.bad.items():
        lines.append(Line(f"node {node}", "bad", ", ".join(reasons), f"leave it out: --exclude={node}"))
    return [*lines, *(Line("job", "missing", warning, "look into it") for warning in judged.warnings)]


def all_well(lines: Sequence[Line]) -> bool:
    """Whether nothing is bad."""
    return all(line.state != "bad" for line in lines)


def _config_lines(cfg: Config) -> list[Line]:
    """The config's model, data and layout, by the checks that `vlmr1 train` begins with."""
    from megatron_vlmr1.launch.doctor_host import port_line
    from megatron_vlmr1.train.check import check_data, check_inputs

    lines = []
    for name, check in (
        ("model and layout", lambda: check_inputs(cfg, cfg.parallel.ranks_of_a_copy)),
        ("data", lambda: check_data(cfg)),
    ):
        try:
            check()
            lines.append(Line(name, "ok", f"as {'data.train' if name == 'data' else 'model.path'} says"))
        except (ValueError, OSError) as error:
            lines.append(Line(name, "bad", " ".join(str(error).split()), "mend the config, or bring what it names"))
    if cfg.telemetry.prometheus_port:
        lines.append(port_line(cfg.telemetry.prometheus_host, cfg.telemetry.prometheus_port))
    return lines
