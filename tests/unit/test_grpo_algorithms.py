"""Each algorithm on one group of two completions, worked out by hand: loss, gradient, what is clipped."""

from __future__ import annotations

from math import log, sqrt

import numpy as np
import pytest
import torch

from megatron_vlmr1.config import GrpoConfig, parse
from megatron_vlmr1.grpo.algorithms import ALGORITHMS
from megatron_vlmr1.grpo.update import GrpoUpdate
from tests.distributed import ranks
from tests.given_logprobs import Tables, group

# The first completion has two tokens and the score 1, the second one token and the score 0.
NEW = [[log(0.3), log(0.45)], [log(0.2), 0.0]]
OLD = [[log(0.2), log(0.5)], [log(0.4), 0.0]]  # ratios 1.5 and 0.9; 0.5
REF = [[log(0.6), log(0.45)], [log(0.1), 0.0]]  # reference / policy: 2 and 1; 0.5
K3 = [2 - log(2) - 1, 0.0, 0.5 - log(0.5) - 1]
K3_SLOPE = [1 - 2, 0.0, 1 - 0.5]
BETA, MAX_NEW = 0.04, 10
A = 0.5 / (sqrt(0.5) + 1e-4)  # the published advantage of scores 1 and 0; the other is -A
S = sqrt(1.5 * 0.9)  # the first completion's ratio per token

# algorithm, clip range, loss without KL, slope of each token, weight of each token's KL, tokens clipped
BY_HAND = [
    ("grpo", (0.2, 0.2), -((1.2 * A + 0.9 * A) / 2 - 0.8 * A) / 2, [0, -0.9 * A / 4, 0], [1 / 4, 1 / 4, 1 / 2], 2),
    ("grpo", (0.6, 0.6), -((1.5 * A + 0.9 * A) / 2 - 0.5 * A) / 2, None, [1 / 4, 1 / 4, 1 / 2], 0),
    ("dr_grpo", (0.2, 0.2), -(1.2 + 0.9 - 0.8) * 0.5 / 20, [0, -0.9 * 0.5 / 20, 0], [1 / 20] * 3, 2),
    ("dapo", (None, None), -(1.28 + 0.9 - 0.8) * A / 3, [0, -0.9 * A / 3, 0], [1 / 3] * 3, 2),
    ("gspo", (0.2, 0.2), -(S * A - 0.8 * A) / 2, [-S * A / 4, -S * A / 4, 0], [1 / 4, 1 / 4, 1 / 2], 1),
    ("gspo", (None, None), -(1.0004 * A - 0.9997 * A) / 2, [0, 0, 0], [1 / 4, 1 / 4, 1 / 2], 3),
    (
        "cispo",
        (0.2, 0.2),
        -(1.2 * A * log(0.3) + 0.9 * A * log(0.45) - 0.8 * A * log(0.2)) / 3,
        [-1.2 * A / 3, -0.9 * A / 3, 0.8 * A / 3],
        [1 / 3] * 3,
        2,
    ),
    (
        "cispo",
        (None, 0.3),
        -(1.3 * A * log(0.3) + 0.9 * A * log(0.45) - 0.5 * A * log(0.2)) / 3,
        [-1.3 * A / 3, -0.9 * A / 3, 0.5 * A / 3],
        [1 / 3] * 3,
        1,
    ),
    ("rloo", (0.2, 0.2), -(1.2 + 0.9 - 0.8) * 1.0 / 20, [0, -0.9 / 20, 0], [1 / 20] * 3, 2),
]


def update(settings: dict, rollout=(), drawn=()) -> tuple[dict[str, float], torch.Tensor]:
    """One group through the update; metrics and the gradient of the three tokens in the last iteration."""
    advantages = ALGORITHMS[settings["algorithm"]].advantages(np.array([1, 0], np.float32))
    new, old, ref = map(torch.tensor, (NEW, OLD, REF))
    tables = Tables(settings, new, old, ref, MAX_NEW)
    with ranks.alone():
        reference = tables if tables.cfg.grpo.beta else None
        metrics = GrpoUpdate(tables, reference)([group([2, 1], advantages.tolist(), rollout, drawn)], 0.0)  # type: ignore[arg-type]
    gradient = tables.gradients[-1]
    assert gradient[1, 1] == 0
    return metrics, gradient.flatten()[:3]


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize(("algorithm", "clip", "loss", "slopes", "kl_weights", "clipped"), BY_HAND)
def test_by_hand(algorithm, clip, loss, slopes, kl_weights, clipped, beta):
    settings = {"algorithm": algorithm, "epsilon_low": clip[0], "epsilon_high": clip[1]}
    metrics, gradient = update({**settings, "beta": beta, "num_iterations": 2})
    kl = sum(w * k for w, k in zip(kl_weights, K3, strict=True))
    assert metrics["train/loss"] == pytest.approx(loss + beta * kl, rel=1e-5, abs=1e-7)
    if slopes is not None:
        expected = [s + beta * w * k for s, w, k in zip(slopes, kl_weights, K3_SLOPE, strict=True)]
        assert gradient.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert metrics["grpo/clip_frac"] == pytest.approx(clipped / 3)
    assert metrics["grpo/ratio_max"] == pytest.approx(S if algorithm == "gspo" else 1.5)
    # whatever the average of the loss, the KL that is reported is the mean over each completion, then over both
    expected_kl = pytest.approx(((K3[0] + K3[1]) / 2 + K3[2]) / 2, rel=1e-5) if beta else None
    assert metrics.get("grpo/kl") == expected_kl
    assert "grpo/tis_capped_frac" not in metrics


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_first_step_is_reinforce(algorithm):
    """With one step per rollout the ratio is one and every algorithm's gradient is -weight A grad log p."""
    _, gradient = update({"algorithm": algorithm, "beta": 0.0})
    a = {"dr_grpo": 0.5, "rloo": 1.0}.get(algorithm, A)
    expected = {"dapo": [-a / 3, -a / 3, a / 3], "cispo": [-a / 3, -a / 3, a / 3]}
    expected |= {"dr_grpo": [-a / 20, -a / 20, a / 20], "rloo": [-a / 20, -a / 20, a / 20]}
    assert gradient.tolist() == pytest.approx(expected.get(algorithm, [-a / 4, -a / 4, a / 2]), rel=1e-5)


def test_truncated_importance():
    """p_old / p_rollout is 1.25, 4 (capped at 2) and 0.5, and weighs the policy's loss, not the KL."""
    rollout = [[log(0.16), log(0.125)], [log(0.8)]]
    settings = {"algorithm": "dapo", "beta": BETA, "num_iterations": 2, "truncated_importance": 2.0}
    metrics, gradient = update(settings, rollout)
    loss = -(1.25 * 1.28 + 2 * 0.9 - 0.5 * 0.8) * A / 3
    assert metrics["train/loss"] == pytest.approx(loss + BETA * sum(K3) / 3, rel=1e-5)
    expected = [BETA * K3_SLOPE[0] / 3, -2 * 0.9 * A / 3 + BETA * K3_SLOPE[1] / 3, BETA * K3_SLOPE[2] / 3]
    assert gradient.tolist() == pytest.approx(expected, rel=1e-5)
    assert metrics["grpo/tis_capped_frac"] == pytest.approx(1 / 3)
    assert metrics["rollout/logprob_gap"] == pytest.approx(log(0.8 / 0.2), rel=1e-5)
    one_step, gradient = update({**settings, "num_iterations": 1, "beta": 0.0}, rollout)
    # the policy is the old one: its present log-probs over the rollout's are 1.875, 3.6 and 0.25
    assert gradient.tolist() == pytest.approx([-1.875 * A / 3, -2 * A / 3, 0.25 * A / 3], rel=1e-5)
    assert one_step["grpo/ratio_max"] == 1.0 and one_step["grpo/tis_capped_frac"] == pytest.approx(1 / 3)


def test_truncated_importance_is_over_what_tokens_were_drawn_from():
    """A sampler that changes the distribution: the gap is that of the model's own log-probs, the weight is not."""
    drawn, own = [[log(0.16), log(0.125)], [log(0.8)]], [[log(0.2), log(0.5)], [log(0.4)]]
    settings = {"algorithm": "dapo", "beta": 0.0, "truncated_importance": 2.0}
    _, expected = update(settings, drawn)
    metrics, gradient = update(settings, own, drawn)
    assert torch.equal(gradient, expected)
    assert metrics["rollout/logprob_gap"] == pytest.approx(log(0.4 / 0.2), rel=1e-5)


def test_clip_ranges():
    def found(**settings) -> tuple[float, float]:
        cfg = GrpoConfig(**settings)
        return cfg.epsilon_low, cfg.epsilon_high

    own = {name: found(algorithm=name) for name in ALGORITHMS}
    assert own == {
        "grpo": (0.2, 0.2),
        "dr_grpo": (0.2, 0.2),
        "dapo": (0.2, 0.28),
        "gspo": (3e-4, 4e-4),
        "cispo": (1.0, 4.0),
        "rloo": (0.2, 0.2),
    }
    assert found() == (0.2, 0.2)
    assert found(algorithm="gspo", epsilon_low=None, epsilon_high=0.01) == (3e-4, 0.01)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"algorithm": "ppo"}, "grpo.algorithm: Input should be 'grpo', 'dr_grpo', 'dapo', 'gspo', 'cispo' or 'rloo'"),
        ({"epsilon_low": 0}, "grpo.epsilon_low: Input should be greater than 0"),
        ({"truncated_importance": 0}, "grpo.truncated_importance: Input should be greater than 0"),
        ({"overlong_buffer_tokens": 20}, "grpo.overlong_buffer_tokens=20 must be less than rollout.max_new_tokens=20"),
        ({"epsilon": None}, "unknown key grpo.epsilon; did you mean grpo.epsilon_"),
    ],
)
def test_refusals(settings, says):
    raw = {"model": {"path": "-"}, "data": {"train": "-"}, "rollout": {"max_new_tokens": 20}, "grpo": settings}
    with pytest.raises(ValueError, match="test: ") as error:
        parse(raw, "test")
    assert says in str(error.value)
