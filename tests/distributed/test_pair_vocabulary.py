"""Log-probs, their gradients and choices on a vocabulary that two ranks share, against plain PyTorch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.plain import within


@pytest.fixture(scope="module")
def given(pair_results) -> dict[str, torch.Tensor]:
    return load_file(pair_results / "vocabulary_in.safetensors")


@pytest.fixture(scope="module")
def facts(pair_results) -> dict:
    return json.loads((pair_results / "vocabulary_in.json").read_text())


@pytest.fixture(scope="module")
def found(pair_results) -> list[dict[str, torch.Tensor]]:
    return [load_file(Path(pair_results, f"vocabulary_{rank}.safetensors")) for rank in range(2)]


def masked_logits(given, facts) -> torch.Tensor:
    logits = given["hidden"] @ given["weight"].t()
    logits[:, facts["banned"]] = -math.inf
    logits[:, facts["size"] :] = -math.inf
    return logits


def test_logprobs_entropy_and_gradients(given, facts, found, record_property):
    assert facts["size"] % 2 == 1  # the second rank's last row is padding
    given = {name: tensor.clone() for name, tensor in given.items()}
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
    table = torch.log_softmax(masked_logits(given, facts), dim=-1)
    logprobs = table.gather(1, given["labels"][:, None])[:, 0]
    (logprobs * given["upstream"]).sum().backward()
    entropy = -(table.exp() * table.masked_fill(table.isinf(), 0)).sum(-1)
    rows = weight.shape[0] // 2
    labels = given["labels"]
    assert (labels < rows).any() and (labels >= rows).any()
    for rank, seen in enumerate(found):
        within(record_property, f"log-probs, rank {rank}", float((seen["logprobs"] - logprobs).abs().max()), 1e-5)
        within(record_property, f"entropy, rank {rank}", float((seen["entropy"] - entropy).abs().max()), 1e-5)
        own = weight.grad[rank * rows : (rank + 1) * rows]
        within(record_property, f"d_weight, rank {rank}", float((seen["d_weight"] - own).norm() / own.norm()), 1e-5)
        assert seen["d_weight"][torch.isin(torch.arange(rows) + rank * rows, torch.tensor(facts["banned"]))].eq(0).all()
    total = found[0]["d_hidden"] + found[1]["d_hidden"]
    within(record_property, "d_hidden", float((total - hidden.grad).norm() / hidden.grad.norm()), 1e-5)


@pytest.mark.parametrize("name", ["greedy", "drawn", "cold", "filtered", "penalised"])
def test_choices_are_those_of_one_process(pair_results, given, facts, found, name):
    from megatron_vlmr1.models.logprobs import Vocabulary
    from megatron_vlmr1.rollout.sampling import choose
    from tests.distributed import ranks
    from tests.distributed.work_pair import samplings

    with ranks.alone() as mesh, torch.no_grad():
        whole = Vocabulary(facts["size"] + 1, facts["size"], facts["banned"], mesh.tp_group, torch.device("cpu"))
        logits = whole.logits(given["hidden"], given["weight"])
        random = None if name in ("greedy", "penalised") else given["random"]
        choice = choose(logits, whole, samplings()[name], random, given["seen"])
    tokens, logprobs, drawn = choice
    for seen in found:
        assert seen[f"{name}_tokens"].tolist() == tokens.tolist()
        for field, value in choice._asdict().items():
            assert torch.allclose(seen[f"{name}_{field}"], value, rtol=0, atol=1e-5), field
    assert not torch.isin(tokens, torch.tensor(facts["banned"])).any() and int(tokens.max()) < facts["size"]
    assert len(tokens.unique()) > 20
    table = torch.log_softmax(masked_logits(given, facts), dim=-1)
    assert torch.allclose(table.gather(1, tokens[:, None])[:, 0].double(), logprobs, rtol=0, atol=1e-5)
    if name in ("greedy", "drawn"):
        assert torch.equal(drawn, logprobs)
    if name == "cold":
        colder = torch.log_softmax(table / 0.5, dim=-1)
        assert torch.allclose(colder.gather(1, tokens[:, None])[:, 0].double(), drawn, rtol=0, atol=1e-5)
    if name == "greedy":
        assert tokens.tolist() == table.argmax(-1).tolist()
    if name == "drawn":  # from either end of [0, 1)
        assert tokens[:20].unique().tolist() == [1] and tokens[20:40].unique().tolist() == [499]
