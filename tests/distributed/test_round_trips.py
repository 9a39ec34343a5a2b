"""One awkward checkpoint through many layouts and back, bit for bit: layers, vocabulary and widths divide by nothing.

Ranks that a layout has no use for hold further copies of the model.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import write_in_bf16, write_random_checkpoint
from tests.distributed import ranks

LAYERS, VOCAB, FFN = 7, 501, 90
AWKWARD = {"num_hidden_layers": LAYERS, "vocab_size": VOCAB, "intermediate_size": FFN, "num_key_value_heads": 2}


def cut(tp: int = 1, pp: int = 1, vp: int = 1, layers: tuple[int, ...] = (LAYERS,), sp: bool = False) -> dict[str, Any]:
    """Return the settings of a layout; `layers` of each chunk, the first chunks of all stages before the second."""
    return {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vp,
        "pipeline_layers": list(layers),
        "sequence_parallel": sp,
    }


FOUR_RANKS = {
    "tp1": cut(),
    "tp2": cut(tp=2),
    "tp2_sp": cut(tp=2, sp=True),
    "tp4": cut(tp=4),
    "tp4_sp": cut(tp=4, sp=True),
    "pp2_43": cut(pp=2, layers=(4, 3)),
    "pp2_34": cut(pp=2, layers=(3, 4)),
    "pp2_16": cut(pp=2, layers=(1, 6)),
    "pp4_2221": cut(pp=4, layers=(2, 2, 2, 1)),
    "pp4_1312": cut(pp=4, layers=(1, 3, 1, 2)),
    "pp2_vp2_2221": cut(pp=2, vp=2, layers=(2, 2, 2, 1)),
    "pp2_vp2_1312": cut(pp=2, vp=2, layers=(1, 3, 1, 2)),
    "pp2_vp3_111112": cut(pp=2, vp=3, layers=(1, 1, 1, 1, 1, 2)),
    "tp2_pp2_43": cut(tp=2, pp=2, layers=(4, 3)),
    "tp2_pp2_34_sp": cut(tp=2, pp=2, layers=(3, 4), sp=True),
    "tp2_pp2_vp2_2221": cut(tp=2, pp=2, vp=2, layers=(2, 2, 2, 1)),
    "tp2_pp2_vp3_211111_sp": cut(tp=2, pp=2, vp=3, layers=(2, 1, 1, 1, 1, 1), sp=True),
}
THREE_RANKS = {
    "pp3_322": cut(pp=3, layers=(3, 2, 2)),
    "pp3_232": cut(pp=3, layers=(2, 3, 2)),
    "pp3_115": cut(pp=3, layers=(1, 1, 5)),
    "pp3_vp2_111112": cut(pp=3, vp=2, layers=(1, 1, 1, 1, 1, 2)),
}
LAYOUTS = FOUR_RANKS | THREE_RANKS
ALSO_BF16 = ["tp4", "pp2_vp3_111112", "tp2_pp2_vp2_2221", "pp3_322"]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    from tests.distributed import work_round_trips

    root = tmp_path_factory.mktemp("many_layouts")
    write_random_checkpoint(root / "untied", seed=31, **AWKWARD)
    write_random_checkpoint(root / "tied", seed=32, tied=True, **AWKWARD)
    write_in_bf16(root / "untied", root / "bf16")
    for which in ("untied", "tied"):
        (root / which / "NOTES.txt").write_text("kept\r\nas it is")
    for nproc, layouts in ((4, FOUR_RANKS), (3, THREE_RANKS)):
        ranks.run(nproc, work_round_trips.everything, root, layouts=layouts, also_bf16=ALSO_BF16)
    return root


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Read all shards with safetensors alone; no tensor is in two of them, and the index says where each one is."""
    shards = {path.name: load_file(path) for path in sorted(directory.glob("*.safetensors"))}
    out = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    assert len(out) == sum(map(len, shards.values()))
    if len(shards) > 1:
        index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
        assert index == {name: file for file, shard in shards.items() for name in shard}
    return out


def side_files(directory: Path) -> dict[str, bytes]:
    """Read everything but the weights and their index."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if not path.match("model*.safetensors*")}


def check(source: Path, again: Path, shards: int) -> None:
    """Compare two directories bit for bit."""
    names = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    assert sorted(p.name for p in again.glob("*.safetensors")) == (names if shards > 1 else ["model.safetensors"])
    before, after = tensors(source), tensors(again)
    assert sorted(before) == sorted(after)
    assert {name: t.dtype for name, t in before.items()} == {name: t.dtype for name, t in after.items()}
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    different = [n for n in before if not torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8))]
    assert different == []
    assert side_files(source) == side_files(again)


@pytest.mark.parametrize("which", ["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bit_equal(written, layout, which):
    assert ("lm_head.weight" in tensors(written / which)) == (which == "untied")
    check(written / which, written / "again" / layout / which, LAYOUTS[layout]["pipeline_model_parallel_size"])


@pytest.mark.parametrize("layout", ALSO_BF16)
def test_bit_equal_in_bf16(written, layout):
    assert {tensor.dtype for tensor in tensors(written / "bf16").values()} == {torch.bfloat16}
    check(written / "bf16", written / "again" / layout / "bf16", LAYOUTS[layout]["pipeline_model_parallel_size"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_held_what_the_layout_says(written, layout):
    settings = LAYOUTS[layout]
    tp, pp = settings["tensor_model_parallel_size"], settings["pipeline_model_parallel_size"]
    ends = [sum(settings["pipeline_layers"][:i]) for i in range(len(settings["pipeline_layers"]) + 1)]
    chunks = [list(range(*bounds)) for bounds in zip(ends, ends[1:], strict=False)]
    nproc = 3 if layout in THREE_RANKS else 4
    held = [json.loads((written / f"held_{layout}_{rank}.json").read_text()) for rank in range(nproc)]
    assert {(seen["tp_rank"], seen["pp_rank"]) for seen in held} == {(t, p) for t in range(tp) for p in range(pp)}
    for seen in held:
        assert seen["layers"] == chunks[seen["pp_rank"] :: pp]
        assert seen["rows"] == 2 * math.ceil(FFN / tp)
        assert seen["copies"] == nproc // (tp * pp)


def test_enough_different_layouts():
    assert len({json.dumps(settings) for settings in LAYOUTS.values()}) == len(LAYOUTS) >= 16
