"""The facts of a cluster that a batch script needs: a file of ``configs/cluster/``, or one of your own."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, model_validator

from megatron_vlmr1 import config
from megatron_vlmr1.config.section import NonNegativeInt, PositiveInt, Section

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def one_line(text: str) -> str:
    """Return a text that a line of a script can hold.

    Raises:
        ValueError: it is empty, or holds control characters, which would begin a line of its own.
    """
    if not text or _CONTROL.search(text):
        raise ValueError(f"{text!r} holds a control character" if text else "is empty; leave the key out")
    return text


def time_text(text: object) -> str:
    """Return a time limit as SLURM takes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on.

    Raises:
        ValueError: it is none, or a number, which is what YAML makes of 4:00:00 without quotes.
    """
    if not isinstance(text, str):
        raise ValueError(f'{text!r} is a number to YAML; put it in quotes: "4:00:00"')
    if not _TIME.fullmatch(text):
        raise ValueError(f"{text!r} is no time limit such as 30 (minutes), 4:00:00 or 1-12:00:00")
    return text


def check_warning(limit: str, signal_s: int) -> None:
    """Refuse a time limit of which nothing would be left before the signal: each attempt would end in its first step.

    Raises:
        ValueError: it is not longer.
    """
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    seconds = 86400 * int(days or 0) + sum(unit * part for unit, part in zip(units, parts, strict=False))
    if seconds <= signal_s:
        raise ValueError(f"{limit} is not longer than signal_s={signal_s} before its end, when the run saves and stops")


def _mount(text: str) -> str:
    if "," in text or len(text.split(":")) > 2:
        raise ValueError(f"{text!r} is not HOST or HOST:INSIDE; commas and more colons cannot be told to the engine")
    return one_line(text)


def _option(text: str) -> str:
    if not text.startswith("--"):
        raise ValueError(f"{text!r} is no option of sbatch such as --reservation=NAME")
    return one_line(text)


Line = Annotated[str, AfterValidator(one_line)]
TimeText = Annotated[str, BeforeValidator(time_text)]


class Container(Section):
    """An image that ranks and rewards run in; the batch script itself runs outside."""

    engine: Literal["pyxis", "apptainer"]
    """pyxis: srun starts the tasks in the image (Enroot); apptainer: each task is an `apptainer exec`."""
    image: Line
    """A squashfs or sif file, or a name that the engine fetches."""
    mounts: list[Annotated[str, AfterValidator(_mount)]] = []
    """HOST or HOST:INSIDE, for models and data. The working directory and the run directory are mounted anyway, at
    their own paths."""
    python: Line = "python3"
    """Interpreter in the image, with this package's dependencies; the package itself is the snapshot's."""


class Cluster(Section):
    """One cluster, or one way of using it."""

    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    gpus_per_node: NonNegativeInt = 0
    """So many ranks a node, each with its GPU; 0 for nodes without."""
    gpu_type: Line | None = None
    """As in --gres=gpu:TYPE:8, where SLURM tells kinds of GPUs apart."""
    tasks_per_node: PositiveInt = 1
    """Ranks a node where it has no GPUs."""
    cpus_per_task: PositiveInt = 1
    """Cores of a rank, which are its threads (OMP_NUM_THREADS) too unless environment says otherwise."""
    memory: Line | None = None
    """Of a node, as --mem takes it; 0 is all of it."""
    time: TimeText | None = None
    """Time limit of a job, where `vlmr1 submit --time` names none; SLURM's own default when empty."""
    signal_s: PositiveInt = 300
    """Ranks get SIGUSR1 so many seconds before the time limit, and then save: longer than a step and a save take."""
    cpu_bind: Literal["cores", "sockets", "ldoms", "threads", "none"] = "cores"
    """What srun binds a rank to."""
    exclude: list[Line] = []
    """Nodes that are never used."""
    options: list[Annotated[str, AfterValidator(_option)]] = []
    """More options of sbatch."""
    cpu_partition: Line | None = None
    """Where `--rewards-nodes 1` puts the reward service; the same partition when empty."""
    reward_cpus: PositiveInt = 8
    """Cores of that service, and its reward processes."""
    network_interface: Line | None = None
    """Such as ib0, for NCCL's and gloo's own connections."""
    environment: dict[str, str] = {}
    """More variables of the ranks."""
    setup: list[Line] = []
    """Lines of shell that the batch script runs as they are, before anything else: `module load cuda`."""
    venv: Line | None = None
    """Virtual environment to run in, the same path on all nodes. Without it and without a container it is the
    interpreter that runs `vlmr1 submit`."""
    container: Container | None = None

    @model_validator(mode="after")
    def _fits(self) -> Cluster:
        if self.venv is not None and self.container is not None:
            raise ValueError("venv and container exclude each other; name an interpreter in container.python")
        if self.gpus_per_node and self.tasks_per_node != 1:
            raise ValueError("tasks_per_node is for nodes without GPUs: with gpus_per_node each GPU has one rank")
        if wrong := [name for name in self.environment if not _VARIABLE.fullmatch(name)]:
            raise ValueError(f"environment: {wrong[0]!r} is no name of a variable")
        if wrong := [name for name, value in self.environment.items() if "\0" in value]:
            raise ValueError(f"environment.{wrong[0]} holds a control character")
        if self.time is not None:
            check_warning(self.time, self.signal_s)
        return self

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each node."""
        return self.gpus_per_node or self.tasks_per_node


def load(name: str) -> Cluster:
    """Read the facts of a cluster: of a file, or of ``configs/cluster/NAME.yaml`` that came with the package.

    Raises:
        ValueError: one line naming the file and the key, with the nearest known key for a typo.
    """
    if Path(name).is_file():
        return config.load_section(Cluster, name)
    shipped = Path(str(importlib.resources.files("megatron_vlmr1"))) / "configs" / "cluster"
    names = sorted(path.stem for path in shipped.glob("*.yaml"))
    if name not in names:
        raise ValueError(f"{name}: no such cluster file; the package has {', '.join(names)}")
    return config.load_section(Cluster, shipped / f"{name}.yaml")
