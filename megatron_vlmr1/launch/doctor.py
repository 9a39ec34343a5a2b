"""What this machine can do, line by line, and what to do about what it cannot."""

from __future__ import annotations

from pathlib import Path

from megatron_vlmr1.config import Config
from megatron_vlmr1.launch import doctor_gpus, doctor_host, doctor_slurm
from megatron_vlmr1.launch.doctor_line import Line
from megatron_vlmr1.launch.preflight import Examination
from megatron_vlmr1.train.check import check_data, check_inputs, check_machine


def machine_lines(cfg: Config | None, run_dir: Path) -> list[Line]:
    """Look at this machine besides its packages, and at what `cfg` names if there is one."""
    lines = [*doctor_gpus.lines(), *doctor_host.lines(run_dir), *doctor_slurm.lines()]
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


def _config_lines(cfg: Config) -> list[Line]:
    """The config's model, data and layout, by the checks that `vlmr1 train` begins with."""
    lines = []
    keys = {"data": "data.train", "layer spec": "model.spec"}
    for name, check in (
        ("model and layout", lambda: check_inputs(cfg, cfg.parallel.ranks_of_a_copy)),
        ("layer spec", lambda: check_machine(cfg)),
        ("data", lambda: check_data(cfg)),
    ):
        try:
            check()
            lines.append(Line(name, "ok", f"as {keys.get(name, 'model.path')} says"))
        except (ValueError, OSError) as error:
            lines.append(Line(name, "bad", " ".join(str(error).split()), "mend the config, or bring what it names"))
    if cfg.telemetry.prometheus_port:
        lines.append(doctor_host.port_line(cfg.telemetry.prometheus_host, cfg.telemetry.prometheus_port))
    return lines
