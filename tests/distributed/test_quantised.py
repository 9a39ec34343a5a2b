"""Generation in FP8 on two ranks against one: what is the same, and how far the rest is off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import ranks
from tests.distributed.plain import within


@pytest.fixture(scope="module")
def found(checkpoints: Path) -> list[dict[str, torch.Tensor]]:
    """Of one process, and of the two ranks."""
    from tests.distributed import work_quantised

    ranks.run(2, work_quantised.everything, checkpoints)
    with ranks.alone() as mesh:
        work_quantised.hidden_states(checkpoints, "one", mesh)
        work_quantised.completions(checkpoints, "alone", mesh)
    return [load_file(checkpoints / f"fp8_{name}.safetensors") for name in ("one_0", "tp2_0", "tp2_1")]


def test_rows_of_column_parallel_weights_are_the_same(found):
    """Rows of queries, keys and values, of gates and of ups lie on a rank whole, and so do their scales."""
    one, *two = found
    for kind, dim in (("values", 0), ("scales", 1)):
        assert torch.equal(torch.cat([rank[f"qkv {kind}"] for rank in two], dim), one[f"qkv {kind}"])
        halves = [rank[f"gate_up {kind}"].chunk(2, dim) for rank in two]  # each rank's gates and then its ups
        whole = torch.cat([half[i] for i in (0, 1) for half in halves], dim)
        assert torch.equal(whole, one[f"gate_up {kind}"])


def test_scales_of_row_parallel_weights_are_each_ranks_own(found):
    """A rank has a part of every row: its scale is that of its own largest number, and never larger than the row's."""
    one, *two = found
    for name in ("out", "down"):
        scales = torch.stack([rank[f"{name} scales"] for rank in two])
        assert torch.equal(scales.amax(0), one[f"{name} scales"]) and not torch.equal(scales[0], scales[1])
        width = one[f"{name} values"].shape[1] // 2
        for rank, part in zip(two, one[f"{name} values"].split(width, 1), strict=True):
            largest = rank[f"{name} scales"] == one[f"{name} scales"]
            assert torch.equal(rank[f"{name} values"][largest[0]], part[largest[0]])


def test_two_ranks_are_as_near_to_the_weights_as_one(found, record_property):
    one, first, second = found
    within(record_property, "exact", float((first["exact"] - one["exact"]).abs().max()), 1e-4)
    assert torch.equal(first["fp8"], second["fp8"])
    error = {name: float((rank["fp8"] - one["exact"]).norm()) for name, rank in (("one", one), ("two", first))}
    between = float((first["fp8"] - one["fp8"]).norm())
    within(record_property, "between", between / error["one"], 1.0)
    assert error["two"] <= 1.1 * error["one"] and error["one"] > 1e-3 * float(one["exact"].norm())


def test_stages_generate_what_one_process_does(found, checkpoints):
    from tests.distributed.work import read_completions

    stages, alone = (read_completions(checkpoints / f"fp8_{name}.json") for name in ("stages", "alone"))
    assert stages.keys() == alone.keys() and len(alone) == 6
    for position, row in alone.items():
        for ours, expected in zip(stages[position], row, strict=True):
            assert ours.token_ids.tolist() == expected.token_ids.tolist()
            assert abs(ours.logprobs - expected.logprobs).max() <= 1e-5
