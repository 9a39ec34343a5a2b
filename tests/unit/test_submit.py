"""`vlmr1 submit` without SLURM: the script, its quoting, the snapshot, refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_vlmr1 import config
from megatron_vlmr1.cli.main import main
from megatron_vlmr1.launch import cluster
from megatron_vlmr1.launch.cluster import Cluster
from megatron_vlmr1.launch.script import Request, render
from megatron_vlmr1.launch.submit import script, submit
from megatron_vlmr1.runtime.ranks import Identity, identity
from tests import jobs

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "a b'c\"d$(touch pwned)`touch pwned`;e&f#g%j*!"
SHIPPED = sorted((ROOT / "configs/cluster").glob("*.yaml"))
shellcheck = pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")


def request(folder: Path, facts: dict[str, Any] | Cluster, name: str = "run", **asked: Any) -> Request:
    folder.mkdir(exist_ok=True)
    path = jobs.write_config(folder, folder / "absent", name, parallel={"tensor_model_parallel_size": 1})
    facts = facts if isinstance(facts, Cluster) else Cluster.model_validate(facts)
    return Request(config.load(path), facts, **{"nodes": 2, **asked})


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


def commands(text: str) -> list[list[str]]:
    """The words of each srun, as bash splits them; variables of the job have their own names for values."""
    names = "RUN_DIR SLURMD_NODENAME SLURM_JOB_ID SLURM_JOB_NODELIST SLURM_JOB_NODELIST_HET_GROUP_1".split()
    stubs = "\n".join(
        [
            *(f"{name}={name if name != 'SLURM_JOB_ID' else 7}" for name in names),
            "SLURM_JOB_END_TIME=0",
            "srun() { printf '%s\\0' srun \"$@\" '' >&3; }",
            "end_if_over() { :; }; goes_on() { false; }; new_attempt() { echo LOGS; }; say() { :; }",
            'address() { echo "$1.example"; }; fact() { :; }; end_the_rest() { :; }; conclude() { :; }',
            "scontrol() { echo c1; }",
        ]
    )
    body = re.sub(r"^\. .*$", stubs.replace("\\", r"\\"), text, flags=re.MULTILINE)
    body = re.sub(r' *2?>"\$VLMR1_LOG_DIR/[a-z.]+"( 2>&1)?', "", body)
    done = subprocess.run(["bash", "-c", f"exec 3>&1 1>&2\n{body}\nwait"], capture_output=True, check=True, timeout=20)
    assert done.stderr == b""
    return [line.split("\0") for line in done.stdout.decode().removesuffix("\0\0").split("\0\0")]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("rewards_nodes", [0, 1])
def test_scripts_are_short_and_bash_takes_them(path: Path, rewards_nodes: int, tmp_path: Path) -> None:
    facts = cluster.load(path.stem)
    text = render(request(tmp_path, facts, rewards_nodes=rewards_nodes, retry=True), tmp_path / "snapshot")
    assert len(text.splitlines()) < 80
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert ("#SBATCH hetjob" in text) == bool(rewards_nodes)
    assert {"--signal=USR1@300", "--requeue", "--open-mode=append"} <= set(directives(text))


@shellcheck
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_scripts_pass_shellcheck(path: Path, tmp_path: Path) -> None:
    for asked in ({"rewards_nodes": 1, "retry": True, "allow_config_change": True}, {}):
        text = render(request(tmp_path, cluster.load(path.stem), name="it's 100 % & (mine)", **asked), tmp_path / "s")
        done = subprocess.run(["shellcheck", "-"], input=text, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout


@shellcheck
def test_shell_files_pass_shellcheck() -> None:
    files = [*(ROOT / "launch").glob("*.sh"), ROOT / "tests/run.sh", ROOT / ".ci/run"]
    done = subprocess.run(["shellcheck", "-x", *map(str, files)], cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_fact_of_a_cluster_is_in_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    facts = {
        "partition": "gpu",
        "account": "me",
        "qos": "high",
        "gpus_per_node": 4,
        "gpu_type": "h100",
        "cpus_per_task": 6,
        "memory": "0",
        "time": "2-00:00:00",
        "signal_s": 600,
        "cpu_bind": "ldoms",
        "exclude": ["n9", "n[4-5]"],
        "options": ["--reservation=my own", "--exclusive"],
        "cpu_partition": "cpu",
        "reward_cpus": 32,
        "network_interface": "ib0",
        "environment": {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "3"},
        "setup": ["module load cuda"],
        "venv": "/opt/venv",
    }
    assert facts.keys() | {"tasks_per_node", "container"} == Cluster.model_fields.keys(), "all of them"
    (tmp_path / "run").mkdir()
    (tmp_path / "run/bad_nodes").write_text("n7\nn7\n")
    text = render(request(tmp_path, facts, rewards_nodes=1), tmp_path / "snap")
    first, second = " ".join(directives(text)).split(" hetjob ")
    assert first.split(" --signal")[0].split() == [
        *("--job-name=vlmr1-run", "--partition=gpu", "--account=me", "--qos=high", "--time=2-00:00:00", "--nodes=2"),
        *("--ntasks-per-node=4", "--cpus-per-task=6", "--gres=gpu:h100:4", "--mem=0", "--exclude=n7,n9,n[4-5]"),
    ]
    assert directives(text)[11:18] == [
        *("--signal=USR1@600", "--requeue", "--open-mode=append", f"--output={tmp_path}/run/logs/slurm_%j.log"),
        *(f"--chdir={tmp_path}", '--reservation="my own"', "--exclusive"),
    ]
    assert second.split() == [
        *("--partition=cpu", "--account=me", "--qos=high", "--time=2-00:00:00", "--nodes=1", "--ntasks-per-node=1"),
        *("--cpus-per-task=32", "--requeue", "--mem=65536M"),
    ]
    exports = dict(re.findall(r"^export (\w+)=(\w+)$", text, re.MULTILINE))
    assert exports["NCCL_SOCKET_IFNAME"] == exports["GLOO_SOCKET_IFNAME"] == "ib0"
    assert (exports["NCCL_DEBUG"], exports["OMP_NUM_THREADS"]) == ("INFO", "3")
    assert "\nmodule load cuda\n" in text
    service, trainer = sorted(commands(text.replace("module load cuda", ":")), key=lambda words: "train" in words)
    program = ["/opt/venv/bin/python", "-m", "megatron_vlmr1.cli"]
    assert service == [
        *("srun", "--het-group=1", "--nodes=1", "--ntasks=1", "--cpus-per-task=32", *program, "rewards", "serve"),
        *("--bind", "tcp://0.0.0.0:10015", "--keys", str(tmp_path / "run/rewards-keys"), "--workers", "32"),
        *("--deadline-s", "10", "--memory-bytes", str(2 << 30)),
    ]
    assert trainer == [
        *("srun", "--het-group=0", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--cpus-per-task=6"),
        *("--cpu-bind=ldoms", "--gres=gpu:h100:4", "--kill-on-bad-exit=1", "--output=LOGS/rank_%t.log", *program),
        *("train", f"{tmp_path}/snap/config.yaml", "rewards.address=tcp://c1.example:10015"),
    ]
    assert "--time=30" in render(request(tmp_path, facts, time="30"), tmp_path / "snap"), "the request's own limit wins"
    fewer = render(request(tmp_path, {"tasks_per_node": 3}), tmp_path / "snap")
    assert "--ntasks=6 --ntasks-per-node=3 --cpus-per-task=1 --cpu-bind=cores \\" in fewer and "--gres" not in fewer


def test_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    container = {"engine": "pyxis", "image": "/im ages/x.sqsh", "mounts": ["/data", "/mo dels:/m"], "python": "python3"}
    asked = request(tmp_path, {"gpus_per_node": 1, "container": container}, rewards_nodes=1)
    service, trainer = sorted(commands(render(asked, tmp_path / "snap")), key=lambda words: "train" in words)
    run = tmp_path / "run"
    expected = [
        "--container-image=/im ages/x.sqsh",
        f"--container-mounts={tmp_path}:{tmp_path},{run}:{run},/data:/data,/mo dels:/m",
        f"--container-workdir={tmp_path}",
    ]
    for words in (service, trainer):
        assert [word for word in words if word.startswith("--container")] == expected
        assert words[words.index("-m") - 1] == "python3"
    container["engine"] = "apptainer"
    asked = request(tmp_path, {"gpus_per_node": 1, "container": container}, rewards_nodes=1)
    service, trainer = sorted(commands(render(asked, tmp_path / "snap")), key=lambda words: "train" in words)
    binds = ["--bind", str(tmp_path), "--bind", str(run), "--bind", "/data", "--bind", "/mo dels:/m"]
    tail = [*binds, "--pwd", str(tmp_path), "/im ages/x.sqsh", "python3", "-m", "megatron_vlmr1.cli"]
    at = trainer.index("apptainer")
    assert trainer[at : trainer.index("train")] == ["apptainer", "exec", "--nv", *tail]
    assert service[service.index("apptainer") : service.index("rewards")] == ["apptainer", "exec", *tail]


def test_hostile_values_stay_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / HOSTILE
    here.mkdir()
    monkeypatch.chdir(here)
    value = "x\n#SBATCH --account=root\n$(touch pwned)'\"`touch pwned`"
    facts = {"environment": {"ODD": value}, "venv": f"/venv {HOSTILE}", "account": HOSTILE, "exclude": ["n1 # x"]}
    text = render(request(here, facts, name="r " + HOSTILE, rewards_nodes=1), here / "snap")
    assert text.count("#SBATCH --account=root") == 1, "in the middle of the script, where it says nothing to sbatch"
    head = text[: text.index("\nRUN_DIR=")]
    assert "--account=root" not in head
    quoted = HOSTILE.replace('"', '\\"')
    assert f'#SBATCH --account="{quoted}"' in head and '#SBATCH --exclude="n1 # x"' in head
    assert f'#SBATCH --chdir="{tmp_path}/{quoted}"' in head
    assert f'/r {quoted}/logs/slurm_%j.log"'.replace("g%j*", "g%%j*") in head
    for words in commands(text):
        assert words[words.index("-m") - 1] == f"/venv {HOSTILE}/bin/python"
    done = subprocess.run(
        ["bash", "-c", text[text.index("RUN_DIR=") : text.index("# shellcheck")] + 'printf %s "$ODD$RUN_DIR"'],
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode() == value + str(here / f"r {HOSTILE}")
    assert not list(here.rglob("pwned")) and not list(tmp_path.glob("pwned"))


def test_paths_that_no_script_can_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, why in (("two\nlines", "control character"), ("back\\slash", "backslash")):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=why):
            render(request(tmp_path / name, {}), tmp_path)
    (tmp_path / "with:colon").mkdir()
    monkeypatch.chdir(tmp_path / "with:colon")
    container = {"engine": "apptainer", "image": "x.sif"}
    with pytest.raises(ValueError, match="comma or a colon"):
        render(request(tmp_path, {"container": container}), tmp_path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("partiton: x", "unknown key partiton; did you mean partition"),
        (
            "container: {engine: pyxis, image: x, mount: []}",
            "unknown key container.mount; did you mean container.mounts",
        ),
        ("time: 4:00:00", "14400 is a number to YAML; put it in quotes"),
        ("time: soon", "no time limit"),
        ("time: '4'", "not longer than signal_s=300"),
        ('account: "a\\nb"', "control character"),
        ("options: [-x]", "no option of sbatch"),
        ("environment: {1x: y}", "no name of a variable"),
        ("venv: /x\ncontainer: {engine: pyxis, image: y}", "exclude each other"),
        ("gpus_per_node: 8\ntasks_per_node: 2", "tasks_per_node is for nodes without GPUs"),
        ("container: {engine: docker, image: y}", "container.engine"),
        ("container: {engine: pyxis, image: y, mounts: ['a:b:c']}", "not HOST or HOST:INSIDE"),
    ],
)
def test_wrong_cluster_files(text: str, why: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"^{file}: .*{why}"):
        cluster.load(str(file))


def test_a_dry_run_writes_nothing_and_needs_no_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jobs.write_config(tmp_path, tmp_path / "absent", parallel={"tensor_model_parallel_size": 1})
    monkeypatch.setenv("VLMR1_CLUSTER", "example_h100")
    words = ["submit", str(path), "--nodes", "2", "--dry-run", "--rewards-nodes", "1", "train.prompts_per_step=16"]
    assert main([*words, "data.lanes=16"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("#!/bin/bash\n#SBATCH ") and "--ntasks=16" in out and "absent: no such directory" in err
    assert main([*words, "data.lanes=16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"script": out}
    assert [item.name for item in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--nodes", "0"], "--nodes 0: at least 1"),
        (["--nodes", "2", "--chain", "0"], "--chain 0: at least 1"),
        (["--nodes", "2", "--rewards-nodes", "2"], "--rewards-nodes 2: 0, or 1"),
        (["--nodes", "2", "--rewards-nodes", "1", "rewards.address=tcp://x:1"], "rewards.address names a service"),
        (["--nodes", "2", "--time", "soon"], "--time 'soon' is no time limit"),
        (["--nodes", "2", "--time", "5"], "--time 5 is not longer than signal_s=300"),
        (["--nodes", "3"], "train.prompts_per_step=4 is not a multiple of the 3 data-parallel ranks"),
        (["--nodes", "2", "--cluster", "nowhere"], "nowhere: no such cluster file; the package has cpu, example_"),
        (["--nodes", "2", "model.path=/nowhere"], "/nowhere"),
        (["--nodes", "2"], "absent: no such directory of shards"),
    ],
)
def test_bad_requests(words: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = jobs.write_config(tmp_path, tmp_path / "absent", parallel={"tensor_model_parallel_size": 1})
    assert main(["submit", str(path), "--cluster", "cpu", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vlmr1: error: ") and why in line
    assert [item.name for item in tmp_path.iterdir()] == ["run.yaml"], "nothing is written"


def test_without_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("VLMR1_CLUSTER", raising=False)
    assert main(["submit", "configs/rec.yaml", "--nodes", "1"]) == 2
    assert "say --cluster NAME|FILE, or set VLMR1_CLUSTER" in capsys.readouterr().err


def test_lines_of_setup_may_use_variables_that_are_not_set(tmp_path: Path) -> None:
    text = script(request(tmp_path, {"setup": ["echo on $NOWHERE_SET"]}))
    body = text[: text.index("# Environment")] + 'echo "$RUN_DIR"'
    done = subprocess.run(["bash", "-c", body], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (f"on\n{tmp_path}/run\n", "")


def test_a_script_of_a_request(tmp_path: Path) -> None:
    asked = request(tmp_path, {}, retry=True, allow_config_change=True)
    text = script(asked)
    assert "FLAGS=(--allow-config-change)\ngoes_on || FLAGS+=(--retry)\n" in text
    assert f"SNAPSHOT={tmp_path}/run/snapshots/0 " in text
    assert submit.__doc__ and asked.world == 2


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"SLURM_PROCID": "0"}, None),  # the batch script
        ({"SLURM_PROCID": "0", "VLMR1_LOG_DIR": "x"}, None),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),  # a shell under srun
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "VLMR1_LOG_DIR": "x"}, Identity(0, 1, 0)),
        ({"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1"}, Identity(9, 16, 1)),
    ],
)
def test_who_is_a_rank_under_slurm(
    variables: dict[str, str], expected: Identity | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")] + ["RANK", "VLMR1_LOG_DIR"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert identity() == expected
