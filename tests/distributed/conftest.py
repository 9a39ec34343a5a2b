"""Results that several tests compare: one run in this process, and one job of two ranks for all its layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints import write_random_checkpoint
from tests.distributed import ranks


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Path:
    """A directory of random checkpoints, each with a reference that differs from it."""
    root = tmp_path_factory.mktemp("layouts")
    kinds = {"untied": {}, "tied": {"tied": True}, "one_kv_head": {"num_key_value_heads": 1, "intermediate_size": 91}}
    for seed, (name, settings) in enumerate(kinds.items()):
        write_random_checkpoint(root / name, seed=seed, **settings)
        write_random_checkpoint(root / f"{name}_reference", seed=10 + seed, **settings)
    return root


@pytest.fixture(scope="session")
def layout_results(checkpoints) -> Path:
    """`work.all_checks` in one process and on every layout; see there for the files."""
    with ranks.alone() as mesh:
        from tests.distributed import work  # imports megatron-core, which `alone` has prepared

        with torch.random.fork_rng():
            work.all_checks(checkpoints, "one", mesh)
    ranks.run(2, work.layouts, checkpoints)
    return checkpoints


@pytest.fixture(scope="session")
def pair_results(layout_results) -> Path:
    """`work_pair.everything` on two ranks, which replay the single process's rollout."""
    from tests.distributed import work_pair

    tensors, facts = vocabulary_case()
    save_file(tensors, layout_results / "vocabulary_in.safetensors")
    (layout_results / "vocabulary_in.json").write_text(json.dumps(facts))
    ranks.run(2, work_pair.everything, layout_results)
    return layout_results


def vocabulary_case() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Hidden states and an output layer of 501 tokens and a padding row; some tokens are banned on either half.

    The first and the last token are banned too, and the first draws are the ends of the interval [0, 1).
    """
    generator = torch.Generator().manual_seed(5)
    n, width, size, banned = 200, 16, 501, [0, 3, 250, 251, 400, 500]
    allowed = torch.tensor(sorted(set(range(size)) - set(banned)))
    random = torch.rand(n, generator=generator, dtype=torch.float64)
    random[:20], random[20:40] = 0.0, 1.0 - 2.0**-53
    return {
        "hidden": torch.randn(n, width, generator=generator),
        "weight": torch.randn(size + 1, width, generator=generator),
        "labels": allowed[torch.randint(len(allowed), (n,), generator=generator)],
        "upstream": torch.randn(n, generator=generator),
        "random": random,
        "seen": torch.rand(n, size + 1, generator=generator) < 0.3,
    }, {"size": size, "banned": banned}
