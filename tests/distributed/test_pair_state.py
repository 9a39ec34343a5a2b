"""Training state: what was saved goes on bit for bit, and on another layout with the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.distributed import plain
from tests.distributed.plain import within


def logical_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a distributed checkpoint whole, by torch's own reader."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(directory)
    entries = reader.read_metadata().state_dict_metadata.items()
    out = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in entries if isinstance(v, TensorStorageMetadata)}
    dcp.load(out, storage_reader=reader, no_dist=True)
    return out


@pytest.mark.parametrize("layout", ["tp2", "dp2", "pp2", "pp2_vp2"])
def test_goes_on_bit_for_bit(pair_results, layout):
    out = pair_results / f"state_{layout}"
    for rank in range(2):
        seen = json.loads((out / f"seen_{rank}.json").read_text())
        assert (seen["progress"], seen["generator"]) == (True, True)
        assert seen["straight"] == seen["resumed"]
    start, straight, resumed = (plain.read(out / name) for name in ("hf", "straight", "resumed"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert sum(not torch.equal(start[name], straight[name]) for name in start) == len(start)


def test_the_files(pair_results):
    names = sorted(path.name for path in (pair_results / "state_dp2" / "state").iterdir())
    assert names == ["optimizer", "progress.json", "rng_00000.safetensors", "rng_00001.safetensors"]


def test_another_layout_holds_the_same_optimizer_state(pair_results):
    saved = logical_tensors(pair_results / "state_tp2" / "state" / "optimizer")
    again = logical_tensors(pair_results / "state_again" / "optimizer")
    assert saved.keys() == again.keys() and saved
    different = [name for name in saved if not torch.equal(saved[name], again[name])]
    assert different == []
    numbers = sum(tensor.numel() for tensor in saved.values() if tensor.is_floating_point())
    weights = sum(tensor.numel() for tensor in plain.read(pair_results / "untied").values())
    assert numbers >= 3 * weights  # masters and both moments of every parameter


def test_another_layout_goes_on_with_the_same_numbers(pair_results, record_property):
    straight = json.loads((pair_results / "state_tp2" / "seen_0.json").read_text())["straight"]
    other = json.loads((pair_results / "state_other.json").read_text())
    for step, (a, b) in enumerate(zip(straight, other, strict=True)):
        difference = abs(a["train/grad_norm"] / b["train/grad_norm"] - 1)
        within(record_property, f"gradient norm, step {step} after", difference, 1e-5)
    start, end, found = (
        plain.flat(plain.read(pair_results / name)) for name in ("state_tp2/hf", "state_tp2/straight", "state_other")
    )
    within(record_property, "weights", float((end - found).norm() / (end - start).norm()), 1e-2)
