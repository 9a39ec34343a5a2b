"""Copies that differ stop the run before a step is taken; steps that are not finite change nothing."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import ranks

HOST = socket.gethostname()
EITHER = f": either rank 0 on {HOST} or rank 1 on {HOST}; nothing was trained on it or saved"
DIFFERS = f" differs from the other copies{EITHER}"
CHANGED = f" is not what the last step left there: rank %d on {HOST}; nothing was trained on it or saved"
SAID = {
    "copy": ("language.decoder.final_layernorm.weight", DIFFERS),
    "tower copy": ("vision.", DIFFERS),
    "norm": ("language.decoder.layers.1.input_layernorm.weight", DIFFERS),
    "tower": ("vision.", DIFFERS),
    "master": ("the fp32 master of ", CHANGED % 1),
    "master of a stage": ("the fp32 master of ", CHANGED % 0),
    "moment": ("exp_avg_sq of ", CHANGED % 1),
    "parameter in fp32": ("the fp32 master of language.decoder.layers.0.mlp.linear_fc1.weight", CHANGED % 1),
}


@pytest.fixture(scope="module")
def seen(checkpoints: Path) -> list[dict[str, Any]]:
    """What each of two ranks saw, see `work_replicas.everything`."""
    with ranks.alone():
        from tests.distributed import work_replicas  # imports megatron-core, which `alone` has prepared
    ranks.run(2, work_replicas.everything, checkpoints)
    return [json.loads((checkpoints / f"replicas_{rank}.json").read_text()) for rank in range(2)]


def test_sound_copies_raise_no_alarm(seen: list[dict[str, Any]]) -> None:
    for norms in (norms for one in seen for norms in one["sound"].values()):
        assert len(norms) == 5 and all(norm > 0 for norm in norms)


@pytest.mark.parametrize("case", SAID)
def test_one_flipped_bit_is_found_before_it_is_trained_on(seen: list[dict[str, Any]], case: str) -> None:
    first, second = (one["damage"][case] for one in seen)
    assert first == second
    assert (first["code"], first["same"]) == (17, True)
    name, what = SAID[case]
    assert first["reason"].startswith(name) and first["reason"].endswith(what), first["reason"]


@pytest.mark.parametrize("kind", ["loss", "gradient", "only the loss"])
@pytest.mark.parametrize("layout", ["tp2", "dp2"])
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(
    seen: list[dict[str, Any]], layout: str, kind: str
) -> None:
    for one in seen:
        bad = one["bad"][f"{layout} {kind}"]
        assert (bad["skipped"], bad["code"]) == ([1.0, 1.0], 17)
        assert len(bad["hashes"]) == 4 and len(set(bad["hashes"])) == 1
