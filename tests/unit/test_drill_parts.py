"""The drill's own parts: faults as JSON, the functions that they are put in, the table and its exit codes."""

from __future__ import annotations

import json
import pkgutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlmr1.cli.main import main
from megatron_vlmr1.drill import digests, inject, matrix
from megatron_vlmr1.drill.faults import POINTS, Fault, Point, from_text, to_text
from megatron_vlmr1.drill.field import Field
from megatron_vlmr1.drill.jobs import Missed, need
from megatron_vlmr1.drill.layouts import Layout, layouts
from megatron_vlmr1.drill.rows import Row


class Run:
    """Stands for a training run, which the drill takes the step from."""

    def __init__(self) -> None:
        self.step = 0

    def outer(self) -> list[str]:
        return [self.inner()]

    def inner(self) -> str:
        return f"step {self.step}"


@pytest.fixture
def armed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Arm faults in `Run.inner` within `Run.outer`; return what arms them and the file that tells of them."""
    for name in ("__init__", "outer", "inner"):
        monkeypatch.setattr(Run, name, vars(Run)[name])  # undoes what is wrapped
    monkeypatch.setattr(inject, "_RUN", f"{__name__}:Run.__init__")
    monkeypatch.setitem(POINTS, "forward", Point(f"{__name__}:Run.inner", f"{__name__}:Run.outer"))
    monkeypatch.setenv(inject.FIRED, str(tmp_path / "fired"))
    return inject.install, tmp_path / "fired"


def test_a_fault_happens_once_in_its_step_and_place(armed: Any) -> None:
    install, fired = armed
    install([Fault(0, 2, "forward", "raise"), Fault(0, 2, "forward", "oserror:EIO")])
    run = Run()
    for run.step in (0, 1):
        assert run.outer() == [f"step {run.step}"]
    run.step = 2
    assert run.inner() == "step 2"  # not within outer
    with pytest.raises(RuntimeError, match="raised by the drill"):
        run.outer()
    with pytest.raises(OSError, match="Input/output error"):
        run.outer()
    assert run.outer() == ["step 2"]
    rows = [json.loads(line) for line in fired.read_text().splitlines()]
    assert [(row["step"], row["action"]) for row in rows] == [(2, "raise"), (2, "oserror:EIO")]


def test_every_point_is_a_function_of_the_program() -> None:
    for point in POINTS.values():
        for name in filter(None, (point.function, point.within)):
            assert callable(pkgutil.resolve_name(name.replace(":", "."))), name
    for name in (inject._RUN, inject._RANK_COMMAND):
        assert callable(pkgutil.resolve_name(name.replace(":", ".")))


def test_faults_as_text() -> None:
    faults = [Fault(1, 3, "optimizer", "kill"), Fault(0, 2, "save", "remount:ro@/a/b")]
    assert from_text(to_text(faults)) == faults
    with pytest.raises(ValueError, match="fault point 'lunch': expected one of rollout"):
        Fault(0, 0, "lunch", "kill")
    for action in ("explode", "kill:9", "signal"):
        with pytest.raises(ValueError, match=f"fault action '{action}': expected one of kill, .*signal:NUMBER"):
            Fault(0, 0, "save", action)
    with pytest.raises(ValueError, match="faults"):
        from_text('[{"rank": 0}]')


def test_flipped_bits_are_single() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.ones(2, 3, dtype=dtype)
        inject._flip_bit(tensor)
        difference = tensor.view(torch.uint8) ^ torch.ones(2, 3, dtype=dtype).view(torch.uint8)
        assert difference.sum() == 1


def test_digests_see_bits_names_and_types() -> None:
    first = {"a": torch.zeros(2), "b": torch.ones(1)}
    assert digests.digest(first) == digests.digest(dict(reversed(first.items())))
    others = [
        {**first, "a": torch.tensor([0.0, -0.0])},
        {"a": first["a"], "c": first["b"]},
        {**first, "a": torch.zeros(2, dtype=torch.int32)},
        {**first, "a": torch.zeros(1, 2)},
    ]
    assert len({digests.digest(tensors) for tensors in [first, *others]}) == 5
    with pytest.raises(Missed, match="other bits than the uninterrupted run: optimizer, rng_1"):
        digests.same({"optimizer": "x", "rng_0": "y"}, {"optimizer": "z", "rng_0": "y", "rng_1": "y"})


def test_layouts_of_at_most_four_ranks() -> None:
    found = layouts()
    assert len(found) == len(set(found)) == 12 and Layout(1, 3, 1) in found and Layout(2, 1, 2) in found
    assert sum(len(layouts(ranks)) for ranks in (1, 2, 3, 4)) == 12


def _rows(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def missed(field: Field) -> str:
        need(1 + 1 == 3, "two, not\nthree | so")
        return ""

    def broken(field: Field) -> str:
        raise KeyError("x")

    rows = (
        Row("fine", "nothing", "all", lambda field: f"in {field.root.name}", short=True),
        Row("bad", "arithmetic", "three", missed),
        Row("broken", "a bug", "none", broken),
    )
    monkeypatch.setattr(matrix, "ROWS", rows)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))


def test_exit_codes_and_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _rows(monkeypatch, tmp_path)
    page = tmp_path / "faults.md"
    assert main(["drill", "--dir", str(tmp_path / "runs"), "--json", "--write", str(page)]) == 1
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert [(row["row"], row["passed"]) for row in found["rows"]] == [("fine", True), ("bad", False), ("broken", False)]
    assert [row["measured"] for row in found["rows"]] == ["in runs", "two, not three | so", "KeyError: 'x'"]
    assert found["passed"] is False and len(found["commit"]) >= 5
    assert "drill: FAILED in 0 s: two, not three" in said.err and str(tmp_path / "runs") in said.err
    text = page.read_text()
    assert "| bad | arithmetic | three | two, not three \\| so | **no** | 0 |" in text
    assert found["commit"] in text and "1 of 3 rows met" in text

    assert main(["drill", "--short"]) == 0
    said = capsys.readouterr()
    assert "nothing" in said.out and "arithmetic" not in said.out and "drill: ok in 0 s: in vlmr1-drill-" in said.err
    assert main(["drill", "--row", "bad"]) == 1
    assert "the runs and their logs: " in capsys.readouterr().err


def test_wrong_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _rows(monkeypatch, tmp_path)
    assert main(["drill", "--row", "brokn"]) == 2
    assert capsys.readouterr().err == "vlmr1: error: --row brokn: no such row; did you mean broken?\n"
    (tmp_path / "x").touch()
    assert main(["drill", "--dir", str(tmp_path)]) == 2
    assert f"{tmp_path}: not empty" in capsys.readouterr().err
    assert main(["drill", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == ["fine: nothing", "bad: arithmetic", "broken: a bug"]
