"""What two ranks do in tests of the optimizer's formats: save in both, at once and in threads, and resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vlmr1.checkpoint import state
from megatron_vlmr1.checkpoint.staging import Staging
from tests import saves
from tests.distributed.ranks import LAYOUTS, layout


def progress(name: str) -> dict[str, Any]:
    """Return what a run of that layout would save, as far as it is looked at."""
    return {"config": {"parallel": LAYOUTS[name].model_dump(mode="json")}}


def both_formats(root: Path, name: str, mesh: Any) -> tuple[Any, Any]:
    """Save in both formats below ``root/name``; return what was saved."""
    torch.manual_seed(mesh.rank)
    policy, optimizer = saves.in_training(root / "weights", mesh)
    for kind in state.FORMATS:
        state.save(policy, optimizer, progress(name), folder(root / name / kind, mesh), kind)
    return policy, optimizer


def save_again(root: Path, name: str, out: str, mesh: Any) -> None:
    """Load what ``name`` saved in dp_reshardable into something else, and save it in fully_reshardable."""
    torch.manual_seed(99)
    policy, optimizer = saves.in_training(root / "weights", mesh)
    state.load(policy, optimizer, root / name / "dp_reshardable")
    state.save(policy, optimizer, {}, folder(root / out, mesh))


def folder(path: Path, mesh: Any) -> Path:
    """Let the first rank make a folder."""
    if mesh.rank == 0:
        path.mkdir(parents=True)
    dist.barrier()
    return path


def everything(root: Path) -> None:
    """All of it in one job."""
    for name in ("dp2", "tp2", "pp2_vp2"):
        with layout(name) as mesh:
            policy, optimizer = both_formats(root, name, mesh)
            if name == "pp2_vp2":
                hashes = late(root, policy, optimizer)
                (root / f"late_{mesh.rank}.json").write_text(json.dumps(hashes))
        with layout(name) as mesh:
            save_again(root, name, f"{name}_again", mesh)
    with layout("dp2") as mesh:
        save_again(root, "one", "one_at_dp2", mesh)
    with layout("tp2") as mesh, pytest.raises(ValueError, match="dp_reshardable") as refused:
        save_again(root, "dp2", "nowhere", mesh)
    (root / f"refused_{mesh.rank}.txt").write_text(str(refused.value))


def late(root: Path, policy: Any, optimizer: Any) -> list[dict[str, str]]:
    """Hashes of a save that is written at once, and of two that are written after everything has changed."""
    staging, out = Staging(), []
    with pytest.MonkeyPatch.context() as patch:
        for kind in state.FORMATS:
            folders = (root / f"late_{kind}_{i}" for i in range(2))
            out.append(saves.write_at_once(policy, optimizer, root / "weights", kind, next(folders)))
            args = policy, optimizer, root / "weights", kind, next(folders), staging, patch
            out.append(saves.write_late(*args))
    return out
