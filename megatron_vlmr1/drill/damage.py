"""The rows about checkpoints that are damaged or hostile when they are read."""

from __future__ import annotations

import io
import os
import pickle  # noqa: S403 - hostile ones are written here, to see that nobody reads them
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from megatron_vlmr1.checkpoint.store import MANIFEST, Keep, Store, read_manifest, verify
from megatron_vlmr1.drill.digests import checkpoint_path
from megatron_vlmr1.drill.field import STEPS, Field
from megatron_vlmr1.drill.jobs import need, start

_FLIPS, _CUTS = 200, 50
_BEFORE = STEPS - 1  # the checkpoint before the last one
_OWN_FACTS = ("format", "step", "created", "files")


def flips_and_cuts(field: Field) -> str:
    """Flip a bit or cut the end of a file of the newest checkpoint; every file has its turn."""
    run_dir = field.root / "damage"
    shutil.copytree(field.whole / "checkpoints", run_dir / "checkpoints", symlinks=True)
    store = Store(run_dir / "checkpoints", Keep(9))
    newest = checkpoint_path(run_dir, STEPS)
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    draw = random.Random(11)  # noqa: S311 - which bits
    for i in range(_FLIPS + _CUTS):
        file = files[i % len(files)]
        whole = file.read_bytes()
        place = draw.randrange(len(whole))
        flipped = whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :]
        file.write_bytes(flipped if i < _FLIPS else whole[:place])
        what = f"{file.relative_to(newest)}, {'bit flipped in' if i < _FLIPS else 'cut at'} byte {place}"
        told: list[str] = []
        found = store.newest_valid(told.append)
        name = file.relative_to(newest).as_posix()
        need(found is not None and found[0] == _BEFORE and name in told[0], f"{what}: {found}, {told}")
        file.write_bytes(whole)
    need(not verify(newest), "the checkpoint is not what it was")
    return f"{_FLIPS + _CUTS}/{_FLIPS + _CUTS} refused, file named, over {len(files)} files; step {_BEFORE} taken"


class _Hostile:
    """Makes a directory when it is unpickled."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sign),)


def hostile_pickles(field: Field) -> str:
    """Put a pickle that runs code in the place of each file in turn, under a true manifest, and resume from it."""
    sign = field.root / "executed"
    pickle.loads(pickle.dumps(_Hostile(sign)))  # noqa: S301 - it does run
    sign.rmdir()
    source = checkpoint_path(field.whole, STEPS)
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    slots = [name for name in names if name != MANIFEST and _may_hold_a_pickle(name)]
    slots.append("hf/pytorch_model.bin")
    refused = 0
    for number, slot in enumerate(slots):
        name = f"hostile_{number}"
        _publish_with(slot, sign, source, field.root / name)
        config = field.config(name, train={"steps": STEPS + 1}, data={"workers": 0})
        with start(config, 1) as job:
            refused += job.finish().code != 0
        need(not sign.exists(), f"{slot}: its code was run")
        shutil.rmtree(field.root / name)
    need(0 < refused < len(slots), f"{refused} of {len(slots)} refused, though {slots[-1]} is of no concern")
    return f"0 executions in {len(slots)} slots; {refused} refused, the others never read"


def _may_hold_a_pickle(name: str) -> bool:
    """Whether megatron-core, torch or transformers might unpickle a file; text is left alone."""
    return name.startswith("state/") or name.endswith(".safetensors")


def _publish_with(slot: str, sign: Path, source: Path, run_dir: Path) -> None:
    """Publish a copy of a checkpoint in which one file is a hostile pickle."""
    store = Store(run_dir / "checkpoints", Keep(9))
    temporary = store.begin(STEPS)
    shutil.copytree(source, temporary, dirs_exist_ok=True)
    facts = {key: value for key, value in read_manifest(source).items() if key not in _OWN_FACTS}
    (temporary / MANIFEST).unlink()
    out = io.BytesIO()
    if slot.endswith((".pt", ".distcp", ".bin")):
        torch.save(_Hostile(sign), out)
    else:
        pickle.dump(_Hostile(sign), out)
    (temporary / slot).write_bytes(out.getvalue())
    store.publish(STEPS, temporary, facts)
