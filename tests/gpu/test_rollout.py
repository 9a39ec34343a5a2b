"""Generation on the device: against training's forward pass, and CUDA graphs against one kernel after another."""

from __future__ import annotations

import pytest
import torch

from megatron_vlmr1.rollout import graphs
from megatron_vlmr1.rollout.engine import Engine
from megatron_vlmr1.rollout.sampling import Sampling
from tests.checkpoints import mixed_prompts
from tests.gpu import work
from tests.gpu.work import BF16, FP8_BY_BF16, FP32

TOKENS, GENERATIONS = 24, 4
SAMPLED = Sampling(TOKENS, frozenset(range(5, 512, 64)), seed=3)


def generated(engine: Engine, prompts, sampling: Sampling = SAMPLED):
    return engine.generate(prompts, GENERATIONS, sampling)


def said(rows) -> torch.Tensor:
    return torch.cat([torch.from_numpy(c.logprobs) for row in rows for c in row])


def test_in_fp32_rollout_and_training_say_the_same(directory, mesh, report):
    prompts, policy = mixed_prompts(directory), work.policy(directory, mesh, FP32)
    rows = generated(Engine(policy, str, 10_000), prompts)
    gap = (work.trained_logprobs(policy, prompts, rows) - said(rows)).abs().max()
    report("fp32, largest log-prob gap", float(gap), 1e-3)


def test_in_bf16_the_gap_is_one_of_roundings(directory, mesh, report):
    """Two ways through bf16 are as far apart as either from fp32, of which the same tokens are asked."""
    prompts = mixed_prompts(directory)
    policy, exact = (work.policy(directory, mesh, dtype) for dtype in (BF16, FP32))
    rows = generated(Engine(policy, str, 10_000), prompts)
    trained = work.trained_logprobs(policy, prompts, rows)
    bound = 2 * work.apart(trained, work.trained_logprobs(exact, prompts, rows))
    report("bf16, mean log-prob gap", work.apart(trained, said(rows)), bound)


def test_weights_in_fp8_say_nearly_what_those_in_bf16_say(directory, mesh, report):
    """On Hopper through `torch._scaled_mm`, elsewhere emulated; the log-probs are those of what was sampled from."""
    prompts = mixed_prompts(directory)
    policy, exact = (work.policy(directory, mesh, dtype) for dtype in (BF16, FP32))
    engine = Engine(policy, str, 10_000, quantization="fp8")
    rows = generated(engine, prompts)
    engine.release()
    trained = work.trained_logprobs(policy, prompts, rows)
    assert not trained.equal(said(rows))
    bound = FP8_BY_BF16 * work.apart(trained, work.trained_logprobs(exact, prompts, rows))
    report("weights in fp8, mean log-prob gap", work.apart(trained, said(rows)), bound)


@pytest.mark.parametrize("sampling", [SAMPLED, Sampling(TOKENS, frozenset(), greedy=True)], ids=["sampled", "greedy"])
def test_graphs_draw_the_tokens_of_eager_kernels(directory, mesh, report, sampling):
    """The same tokens, again when the recorded ticks are used again, and other ones after the weights have changed."""
    prompts, policy = mixed_prompts(directory), work.policy(directory, mesh, FP32)
    eager = Engine(policy, str, 10_000, decode_burst=1)
    recorded = Engine(policy, str, 10_000, decode_burst=4, recorder=graphs.recorder("auto"))
    seen = []
    for changed in (False, False, True):
        if changed:
            with torch.no_grad():
                policy.model.language.decoder.layers[0].mlp.linear_fc2.weight.mul_(1.5)
            policy.weights_changed(tower=False)
        rows, again = generated(eager, prompts, sampling), generated(recorded, prompts, sampling)
        tokens = [[c.token_ids.tolist() for c in row] for row in rows]
        assert [[c.token_ids.tolist() for c in row] for row in again] == tokens
        report("graphs to eager, largest log-prob difference", float((said(again) - said(rows)).abs().max()), 1e-3)
        seen.append(tokens)
    assert seen[0] == seen[1] != seen[2]
    recorded.release()
