"""megatron-core on two ranks loads what we exported, and we import what it saved: bit-equal."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_vlmr1.checkpoint.convert import differences
from megatron_vlmr1.checkpoint.torch_dist import export_torch_dist, import_torch_dist
from tests.checkpoints import write_random_checkpoint
from tests.distributed import ranks

SETTINGS = {"vocab_size": 501, "intermediate_size": 90, "num_hidden_layers": 7, "num_key_value_heads": 1}
KINDS = {"odd": False, "tied": True}
LAYOUTS = ("tp2", "pp2")
WAYS = ("stacked", "numbered", "halves")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    from tests.distributed import work_torch_dist as work

    assert (tuple(KINDS), LAYOUTS, WAYS) == (work.KINDS, tuple(work.LAYOUTS), tuple(work.WAYS))
    root = tmp_path_factory.mktemp("torch_dist")
    for seed, (kind, tied) in enumerate(KINDS.items()):
        file = write_random_checkpoint(root / kind, seed=seed, tied=tied, **SETTINGS) / "model.safetensors"
        save_file({name: t.bfloat16() for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
        config = root / kind / "config.json"
        config.write_text(config.read_text().replace('"dtype": "float32"', '"dtype": "bfloat16"'))
        export_torch_dist(root / kind, root / f"{kind}_megatron")
    ranks.run(2, work.everything, root)
    return root


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatron_core_loads_what_we_export(written, layout, kind):
    found = [json.loads((written / f"different_{layout}_{kind}_{rank}.json").read_text()) for rank in range(2)]
    assert found == [[], []]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_we_import_what_megatron_core_saves(written, tmp_path, layout, kind, way):
    source = written / f"saved_{layout}_{kind}_{way}"
    back = import_torch_dist(source, tmp_path / "back", written / kind)
    assert differences(written / kind, back) == []
    keys = pickle.loads((source / ".metadata").read_bytes()).state_dict_metadata.keys()
    assert any(".layers.6." in key for key in keys) == (way != "stacked")
    assert any(key.endswith("linear_fc1.weight_w") for key in keys) == (way == "halves")
