"""Every layout of the published models, by the modules of every rank; and `convert plan` and `verify`."""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlmr1.checkpoint.convert import differences
from megatron_vlmr1.checkpoint.coverage import cover
from megatron_vlmr1.cli.main import main
from megatron_vlmr1.models import families
from megatron_vlmr1.models.families import published_name, read_shape
from megatron_vlmr1.models.families.qwen2_5_vl import ALIASES
from megatron_vlmr1.parallel import mesh as meshes
from tests import jobs, recipes
from tests.checkpoints import write_random_checkpoint
from tests.recipes import layout
from tools import check_coverage

POWERS = (1, 2, 4, 8)
LEGAL = {"3b": 12, "7b": 9, "32b": 16, "72b": 16}  # of TP and PP of 1, 2, 4 and 8, with equal shares of layers
PARAMETERS = {"3b": 3_754_622_976, "7b": 8_292_166_656, "32b": 33_452_718_336, "72b": 73_410_777_344}


@pytest.fixture(scope="module", params=recipes.SIZES)
def published(request) -> tuple[str, dict[str, tuple[int, ...]]]:
    """A size, and the tensors of transformers' own model of it, without memory."""
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    config = AutoConfig.from_pretrained(recipes.published(request.param))
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    return request.param, {published_name(n, ALIASES): tuple(p.shape) for n, p in model.named_parameters()}


def test_every_legal_layout_holds_every_number_of_transformers_own_model_once(published):
    size, tensors = published
    shape = read_shape(recipes.published(size))
    assert sum(map(math.prod, tensors.values())) == PARAMETERS[size]
    legal = 0
    for tp, pp in ((tp, pp) for tp in POWERS for pp in POWERS):
        try:
            coverage = cover(shape, layout(tp, pp))
        except ValueError as error:
            assert "nearest tensor x pipeline sizes that fit: " in str(error)
            continue
        legal += 1
        seen: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for held in coverage.holdings:
            if held.piece.name is not None and not held.replica:
                rest = math.prod(tensors[held.piece.name]) // tensors[held.piece.name][held.piece.dim]
                seen[held.piece.name].append((held.piece.start * rest, held.piece.stop * rest))
        assert seen.keys() == tensors.keys()
        for name, spans in seen.items():
            spans.sort()
            assert [a for a, _ in spans] == [0, *(b for _, b in spans[:-1])] and spans[-1][1] == math.prod(
                tensors[name]
            )
        assert len(coverage.rank_parameters) == tp * pp
        if tp == pp == 1:
            assert coverage.rank_parameters == [PARAMETERS[size]]
    assert legal == LEGAL[size]


def test_the_tool_prints_every_layout(capsys):
    check_coverage.main(["3b", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["tp"], row["pp"]) for row in rows] == [(tp, pp) for tp in POWERS for pp in POWERS]
    assert rows[0]["gb"] == [2 * PARAMETERS["3b"] / 1e9] and rows[0]["error"] is None
    assert sum(row["error"] is None for row in rows) == LEGAL["3b"]
    assert "nearest tensor x pipeline sizes that fit: " in rows[-1]["error"] and rows[-1]["gb"] == []


def test_uneven_and_virtual_stages_of_a_real_size():
    shape = read_shape(recipes.published("72b"))
    coverage = cover(shape, layout(8, 4, 2, [10, 11, 10, 10, 10, 10, 10, 9]))
    layers = {
        rank: {h.layer for h in coverage.holdings if h.rank == rank and h.layer is not None} for rank in range(32)
    }
    assert layers[0] == {*range(10), *range(41, 51)} and layers[31] == {*range(31, 41), *range(71, 80)}


def test_a_gap_or_an_overlap_is_seen(monkeypatch):
    shape = read_shape(recipes.published("3b"))
    family = families.of(shape)
    pieces = family.text_pieces

    def shifted(shape, name, layer, tp_rank, tp):
        out = pieces(shape, name, layer, tp_rank, tp)
        return pieces(shape, name, layer, 0, tp) if name == "mlp.linear_fc2.weight" and layer == 3 else out

    monkeypatch.setattr(family, "text_pieces", shifted)
    with pytest.raises(AssertionError, match=r"model\.layers\.3\.mlp\.down_proj\.weight"):
        cover(shape, layout(tp=2))


def test_looking_leaves_no_job_behind():
    cover(read_shape(recipes.published("3b")), layout(2, 2))
    assert not torch.distributed.is_initialized()
    mesh = meshes.pretended(layout(4, 2), 3, 1)
    assert (mesh.rank, mesh.world, mesh.tp_rank, mesh.pp_rank, mesh.is_last_stage) == (7, 8, 3, 1, True)


def test_plan_prints_tables(capfd):
    assert (
        main(["convert", "plan", "configs/model/qwen2.5-vl-7b", "--tp", "2", "--pp", "3", "--layers", "8,10,10"]) == 0
    )
    lines = [line.replace("│", " ").split() for line in capfd.readouterr().out.splitlines()]
    q = "model.layers.8-17.self_attn.q_proj.weight"
    assert [q, *"rows 1792:2688 of 3584 3 decoder.layers.8-17.self_attention.linear_qkv.weight".split()] in lines
    assert "visual.blocks.0-31.norm1.weight all 0-1 vision.blocks.0-31.norm1.weight".split() in lines
    down = "model.layers.18-27.mlp.down_proj.weight columns 9472:18944 of 18944 5"
    assert [*down.split(), "decoder.layers.18-27.mlp.linear_fc2.weight"] in lines
    assert ["3", "1", "1", "8-17", "1,165,324,800", "2.33"] in lines


def test_plan_as_json(capfd, tmp_path):
    source = write_random_checkpoint(tmp_path / "model", vocab_size=501)
    assert main(["convert", "plan", str(source), "--tp", "4", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    rows, ranks = found["parts"], found["ranks"]
    assert len(ranks) == 4 and all(rank["bytes"] == 2 * rank["parameters"] > 0 for rank in ranks)
    embedding = [row for row in rows if row["parameter"] == "embedding.word_embeddings.weight"]
    spans = [(row["tensor"], row["start"], row["stop"], row["rank"]) for row in embedding]
    name = "model.embed_tokens.weight"
    assert spans == [(name, 0, 126, 0), (name, 126, 252, 1), (name, 252, 378, 2), (name, 378, 501, 3), (None, 0, 3, 3)]
    assert {row["replica"] for row in rows if row["tensor"] == "visual.merger.ln_q.weight"} == {False, True}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--tp 3", "tensor_model_parallel_size=3 does not divide the model's 28 attention heads; nearest"),
        ("--pp 3", "does not divide the model's 28 layers; say in parallel.pipeline_layers how to cut them; nearest"),
        ("--pp 2 --layers 20,9", "pipeline_layers=[20, 9] adds up to 29 layers, but the model has 28"),
        ("--pp 2 --layers 20,x", "layout: pipeline_layers.1: Input should be a valid integer"),
        ("--tp 0", "layout: tensor_model_parallel_size: Input should be greater than 0"),
        ("--vp 2", "layout: virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size > 1"),
    ],
)
def test_layouts_that_are_refused(capfd, words, line):
    assert main(["convert", "plan", "configs/model/qwen2.5-vl-7b", *words.split()]) == 2
    said = capfd.readouterr().err
    assert line in said and said.count("\n") == 1


def test_plan_of_what_is_no_model(capfd, tmp_path):
    assert main(["convert", "plan", str(tmp_path)]) == 2
    assert "config.json: not found; expected a Hugging Face model directory" in capfd.readouterr().err
    assert main(["convert", "plan", "configs/model/qwen9"]) == 2


def test_roundtrip_through_uneven_virtual_stages(capfd, tmp_path):
    source = write_random_checkpoint(tmp_path / "model", num_hidden_layers=7)
    words = ["--pp", "2", "--vp", "2", "--layers", "2,2,1,2"]
    code, said = jobs.run_forked(2, "convert", "roundtrip", source, tmp_path / "copy", *words)
    assert code == 0, said
    assert main(["convert", "verify", str(source), str(tmp_path / "copy")]) == 0
    assert capfd.readouterr().out.endswith("the same tensors, bit for bit\n")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("verify") / "model")


def changed(model: Path, to: Path, name: str, tensor: torch.Tensor) -> Path:
    shutil.copytree(model, to)
    tensors = load_file(to / "model.safetensors") | {name: tensor}
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("piece", [1 << 23, 1500])  # all at once, and in many pieces
def test_what_differs(model, tmp_path, monkeypatch, piece):
    monkeypatch.setattr("megatron_vlmr1.checkpoint.convert._PIECE", piece)
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = load_file(model / "model.safetensors")[name]
    assert differences(model, model) == []
    last, nan, zero = tensor.clone(), tensor.clone(), tensor.clone()
    last[-1, -1] += 0.5
    nan[3, 3] = float("nan")
    zero[0, 0] = 0.0
    kinds = {
        "last": (last, f"{name}: largest difference 0.5"),
        "nan": (nan, f"{name}: largest difference nan"),
        "half": (tensor.double(), f"{name}: torch.float32 against torch.float64, largest difference 0"),
        "short": (tensor[:-1], f"{name}: [96, 64] torch.float32 against [95, 64] torch.float32"),
    }
    for kind, (other, line) in kinds.items():
        assert differences(model, changed(model, tmp_path / kind, name, other)) == [line]
    plus = changed(model, tmp_path / "plus", name, zero)
    zero[0, 0] = -0.0
    assert differences(plus, changed(model, tmp_path / "minus", name, zero)) == [f"{name}: largest difference 0"]
    more = changed(model, tmp_path / "more", "extra", torch.zeros(2))
    assert differences(model, more) == [f"extra: only in {more}"]
