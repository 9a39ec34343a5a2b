"""The sbatch script of a run, from the template ``launch/train.sbatch.j2``."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_vlmr1.config import Config
from megatron_vlmr1.launch.cluster import Cluster, one_line
from megatron_vlmr1.rewards import tasks

BAD_NODES = "bad_nodes"  # in a run directory: nodes that its jobs found bad, one a line
_PLAIN = re.compile(r"[\w@%+=:,./\[\]-]*", re.ASCII)


@dataclass(frozen=True)
class Request:
    """What is to be run, and where.

    Attributes:
        cfg: the run's resolved config; paths in it are relative to the working directory, which the job keeps.
        cluster: facts of the cluster.
        nodes: of the training; each has `cluster.ranks_per_node` ranks.
        chain: jobs that follow each other, until one has finished the run.
        time: time limit in SLURM's words, in place of the cluster's.
        rewards_nodes: 1 puts the reward service on a node of its own, 0 one on each node.
        retry: start although the same step failed three times in a row.
        allow_config_change: continue a run whose config was changed.
    """

    cfg: Config
    cluster: Cluster
    nodes: int
    chain: int = 1
    time: str | None = None
    rewards_nodes: int = 0
    retry: bool = False
    allow_config_change: bool = False

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.nodes * self.cluster.ranks_per_node

    @property
    def run_dir(self) -> Path:
        """The run directory, absolute."""
        return Path(os.path.abspath(self.cfg.run_dir))

    @property
    def keys(self) -> Path:
        """CURVE keys of the run's own reward service, made by the first submission that wants one."""
        return self.run_dir / "rewards-keys"


def render(request: Request, snapshot: Path) -> str:
    """Return the script; every value that a user gave is quoted, but for the lines of `cluster.setup`.

    Args:
        request: what to run.
        snapshot: directory of the code and config that the job runs, absolute.

    Raises:
        ValueError: a path holds what no line of a batch script can say.
    """
    cluster = request.cluster
    templates = Environment(
        loader=PackageLoader("megatron_vlmr1.launch", "scripts"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - a script of shell, not a page: the filter `shell` quotes
    )
    templates.filters["shell"] = shlex.quote
    title = f"{request.nodes} nodes x {cluster.ranks_per_node} ranks"
    return templates.get_template("train.sbatch.j2").render(
        title=title,
        options=[_directive(option) for option in _options(request)],
        run_dir=str(request.run_dir),
        snapshot=str(snapshot),
        setup=cluster.setup,
        environment=_environment(cluster),
        flags="--allow-config-change" if request.allow_config_change else "",
        retry=request.retry,
        srun=_words([*_task_options(request), *_in_image(request)]),
        python=_words(_python(request)),
        service=_service(request) if request.rewards_nodes else None,
    )


def _options(request: Request) -> list[str]:
    """Options of sbatch for the training's part of the job."""
    cluster = request.cluster
    words = [
        f"--job-name=vlmr1-{re.sub(r'[^A-Za-z0-9_.-]+', '-', request.run_dir.name)}",
        *_placement(request, cluster.partition),
        f"--nodes={request.nodes}",
        f"--ntasks-per-node={cluster.ranks_per_node}",
        f"--cpus-per-task={cluster.cpus_per_task}",
        *_gpus(cluster),
    ]
    if cluster.memory is not None:
        words.append(f"--mem={cluster.memory}")
    if exclude := sorted({*cluster.exclude, *bad_nodes(request.run_dir)}):
        words.append(f"--exclude={','.join(exclude)}")
    output = str(request.run_dir / "logs" / "slurm_").replace("%", "%%") + "%j.log"
    return [
        *words,
        f"--signal=USR1@{cluster.signal_s}",
        "--requeue",
        "--open-mode=append",
        f"--output={_path(output)}",
        f"--chdir={_path(os.getcwd())}",
        *cluster.options,
    ]


def _placement(request: Request, partition: str | None) -> list[str]:
    cluster = request.cluster
    given = {
        "partition": partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "time": request.time or cluster.time,
    }
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def _task_options(request: Request) -> list[str]:
    """Options of srun for the ranks: one task a rank."""
    cluster = request.cluster
    part = ["--het-group=0"] if request.rewards_nodes else []
    # Each rank sees all GPUs of its node and takes the one of its local rank: with one visible to each, as --gpu-bind
    # and --gpus-per-task have it, NCCL could not reach its neighbours' memory.
    return [
        *part,
        f"--nodes={request.nodes}",
        f"--ntasks={request.world}",
        f"--ntasks-per-node={cluster.ranks_per_node}",
        f"--cpus-per-task={cluster.cpus_per_task}",
        f"--cpu-bind={cluster.cpu_bind}",
        *_gpus(cluster),
    ]


def _gpus(cluster: Cluster) -> list[str]:
    kind = ["gpu", *filter(None, [cluster.gpu_type]), str(cluster.gpus_per_node)]
    return [f"--gres={':'.join(kind)}"] if cluster.gpus_per_node else []


def _service(request: Request) -> dict[str, Any]:
    """The job's second part: one node for the reward service."""
    cluster, rewards = request.cluster, request.cfg.rewards
    megabytes = -(-cluster.reward_cpus * rewards.memory_bytes // 2**20)
    options = [
        *_placement(request, cluster.cpu_partition or cluster.partition),
        *("--nodes=1", "--ntasks-per-node=1", f"--cpus-per-task={cluster.reward_cpus}", "--requeue"),
        *([f"--mem={megabytes}M"] if cluster.memory is not None else []),  # or the first part's would hold
    ]
    srun = ["--het-group=1", "--nodes=1", "--ntasks=1", f"--cpus-per-task={cluster.reward_cpus}"]
    arguments = ["--keys", str(request.keys), "--workers", str(cluster.reward_cpus)]
    arguments += ["--deadline-s", f"{rewards.deadline_s:g}", "--memory-bytes", str(rewards.memory_bytes)]
    arguments += [word for file in tasks.files(request.cfg.task) for word in ("--functions", file)]
    return {
        "options": [_directive(option) for option in options],
        "srun": _words([*srun, *_in_image(request)]),
        "python": _words(_python(request, gpus=False)),
        "arguments": _words(arguments),
    }


def _environment(cluster: Cluster) -> dict[str, str]:
    """Variables of the ranks; the cluster's own win."""
    interface = cluster.network_interface
    names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if interface is not None else ()
    return {
        "OMP_NUM_THREADS": str(cluster.cpus_per_task),
        **{name: str(interface) for name in names},
        **cluster.environment,
    }


def _python(request: Request, gpus: bool = True) -> list[str]:
    """The command of this program in a task."""
    cluster, container = request.cluster, request.cluster.container
    program = ["-m", "megatron_vlmr1.cli"]
    if container is None:
        interpreter = sys.executable if cluster.venv is None else f"{cluster.venv}/bin/python"
        return [os.path.abspath(os.path.expanduser(interpreter)), *program]
    if container.engine == "pyxis":
        return [container.python, *program]
    nvidia = ["--nv"] if gpus and cluster.gpus_per_node else []
    binds = [word for mount in _mounts(request) for word in ("--bind", mount)]
    return ["apptainer", "exec", *nvidia, *binds, "--pwd", os.getcwd(), container.image, container.python, *program]


def _in_image(request: Request) -> list[str]:
    """Options of srun that start the tasks in an image."""
    container = request.cluster.container
    if container is None or container.engine != "pyxis":
        return []
    mounts = [mount if ":" in mount else f"{mount}:{mount}" for mount in _mounts(request)]
    return [
        f"--container-image={container.image}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={os.getcwd()}",
    ]


def _mounts(request: Request) -> list[str]:
    """What the image sees: the working directory, the run directory, and what the cluster's file names.

    Raises:
        ValueError: a path cannot be told to the engine.
    """
    assert request.cluster.container is not None
    own = list(dict.fromkeys([os.getcwd(), str(request.run_dir)]))
    if wrong := [path for path in own if re.search("[,:]", path)]:
        raise ValueError(f"{wrong[0]}: a container cannot mount a path with a comma or a colon")
    return [*own, *request.cluster.container.mounts]


def bad_nodes(run_dir: Path) -> list[str]:
    """Return the nodes that earlier jobs of a run found bad; nobody's until one did."""
    path = run_dir / BAD_NODES
    return sorted(set(path.read_text().split())) if path.is_file() else []


def _path(text: str) -> str:
    """Return a path that #SBATCH can name.

    Raises:
        ValueError: SLURM would read it as another one.
    """
    if "\\" in text:
        raise ValueError(f"{text!r}: SLURM cannot name a path with a backslash; use another directory")
    try:
        return one_line(text)
    except ValueError as error:
        raise ValueError(f"{error}; use another directory") from error


def _directive(option: str) -> str:
    """Quote a value as sbatch reads it in the script: double quotes, in which a backslash makes the next one plain."""
    name, equals, value = option.partition("=")
    if _PLAIN.fullmatch(value):
        return option
    escaped = re.sub(r'(["\\])', r"\\\1", value)
    return f'{name}{equals}"{escaped}"'


def _words(words: Sequence[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)
