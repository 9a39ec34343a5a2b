"""Optimizer steps on real completions, against transformers' gradients and PyTorch's Adam, in one process."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_vlmr1 import config
from megatron_vlmr1.checkpoint import weights
from megatron_vlmr1.grpo.reference import Reference
from megatron_vlmr1.grpo.update import GrpoUpdate, Updater
from megatron_vlmr1.parallel import optimizer as parallel_optimizer
from megatron_vlmr1.rollout.sampling import Sampling
from megatron_vlmr1.types import Group
from tests.checkpoints import banned_ids, mixed_prompts, plain_model, write_random_checkpoint
from tests.distributed import plain, work
from tests.distributed.plain import within

LEARNING_RATE = 3e-3
IMAGES = 5  # unlike ones in the prompts


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("update")
    for seed, name in enumerate(("policy", "reference")):
        write_random_checkpoint(root / name, seed=seed)
    return root


def rollout(policy, directory) -> list[Group]:
    prompts = mixed_prompts(directory / "policy")
    rows = work.engine(policy).generate(prompts, 3, Sampling(8, work.STOPS, seed=1))
    rng = np.random.default_rng(0)
    return [
        Group(prompt, row, (), rng.standard_normal(3).astype(np.float32))
        for prompt, row in zip(prompts, rows, strict=True)
    ]


class Recorded:
    """An optimizer that writes gradients and weights before each step."""

    def __init__(self, optimizer, policy, source, target) -> None:
        self._optimizer, self._policy, self._source, self._target = optimizer, policy, source, target
        self.steps = 0

    def __getattr__(self, name):
        return getattr(self._optimizer, name)

    def step(self):
        work.write_gradients(self._policy, self._source, self._target / f"gradients_{self.steps}")
        work.write_weights(self._policy, self._source, self._target / f"weights_{self.steps}")
        self.steps += 1
        return self._optimizer.step()


def test_two_iterations(mesh, directory, tmp_path, record_property):
    source = directory / "policy"
    policy, reference = work.with_reference(source, directory / "reference", mesh)
    cfg = config.parse(
        {
            "precision": "fp32",
            "model": {"path": "-"},
            "data": {"train": "-"},
            "grpo": {"num_iterations": 2},
            "optimizer": {"weight_decay": 0.1, "clip_grad": 0.5, "beta2": 0.95},
            "train": {"micro_batch_tokens": 100},
        },
        "test",
    )
    groups = rollout(policy, directory)
    optimizer = Recorded(parallel_optimizer.build(cfg.optimizer, policy.wrap_for_training()), policy, source, tmp_path)
    update = GrpoUpdate(Updater(policy, optimizer, cfg), reference)  # type: ignore[arg-type]
    metrics = update(groups, LEARNING_RATE)
    work.write_weights(policy, source, tmp_path / "weights_2")
    assert optimizer.steps == 2

    banned, fixed = banned_ids(source), plain_model(directory / "reference")
    models = [plain_model(tmp_path / f"weights_{i}") for i in range(2)]
    with torch.no_grad():
        old = {
            (g, i): plain.logprobs(models[0], group.prompt, completion.token_ids, banned)
            for g, group in enumerate(groups)
            for i, completion in enumerate(group.completions)
        }
        new = {
            (g, i): plain.logprobs(models[1], groups[g].prompt, groups[g].completions[i].token_ids, banned)
            for g, i in old
        }
    for step, model in enumerate(models):
        loss, kl = plain.grpo_loss(model, fixed, groups, banned, old=None if step == 0 else old)
        difference, name = plain.worst(plain.read(tmp_path / f"gradients_{step}"), plain.gradients(model, loss))
        within(record_property, f"gradients of iteration {step}", difference, 1e-5, name)
    norm = float(plain.flat(plain.read(tmp_path / "gradients_1")).norm())  # before clipping
    within(record_property, "gradient norm", abs(metrics["train/grad_norm"] / norm - 1), 1e-6)
    assert metrics["train/loss"] == pytest.approx(float(loss), rel=1e-4)
    assert metrics["grpo/kl"] == pytest.approx(float(kl), rel=1e-4)
    ratios = {key: torch.exp(new[key] - old[key]) for key in old}
    clipped = sum(
        int(((ratio > 1.2) if groups[g].advantages[i] > 0 else (ratio < 0.8)).sum()) for (g, i), ratio in ratios.items()
    )
    tokens = sum(map(len, ratios.values()))
    assert metrics["grpo/clip_frac"] == pytest.approx(clipped / tokens) and 0.05 < clipped / tokens < 0.95
    assert metrics["grpo/ratio_max"] == pytest.approx(max(float(r.max()) for r in ratios.values()), rel=1e-3)
    gap = max(float((old[g, i] - torch.from_numpy(groups[g].completions[i].logprobs)).abs().max()) for g, i in old)
    within(record_property, "rollout log-probs against transformers", gap, 1e-4)
    assert metrics["rollout/logprob_gap"] <= 1e-4

    expected = adam(plain.read(source), [plain.read(tmp_path / f"gradients_{i}") for i in range(2)], cfg.optimizer)
    start, found = plain.read(source), plain.read(tmp_path / "weights_2")
    moved = {name: expected[name] - start[name] for name in start}
    difference, name = plain.worst({name: found[name] - start[name] for name in start}, moved)
    within(record_property, "two steps of Adam", difference, 1e-4, name)


def adam(weights: plain.Tensors, gradients: list[plain.Tensors], cfg: config.OptimizerConfig) -> plain.Tensors:
    """PyTorch's AdamW on clipped gradients. megatron-core decays no vectors, which are biases and norms."""
    parameters = {name: torch.nn.Parameter(w.double()) for name, w in weights.items()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": cfg.weight_decay},
            {"params": [p for p in parameters.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.eps,
    )
    for step in gradients:
        for name, parameter in parameters.items():
            parameter.grad = step[name].double()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), cfg.clip_grad)
        assert norm > cfg.clip_grad
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def test_the_present_policy_is_the_one_that_generated(mesh, directory):
    """With one iteration the ratio is one, and what the rollout said is what training computes."""
    policy = work.load_policy(directory / "policy", mesh)
    policy.wrap_for_training()
    metrics = work.still_update(policy, None, work.LARGE)(rollout(policy, directory), 0.0)
    assert (metrics["grpo/ratio_max"], metrics["grpo/clip_frac"]) == (1.0, 0.0) and "grpo/kl" not in metrics
    assert 0 < metrics["rollout/logprob_gap"] <= 1e-4


def test_entropy_is_the_mean_over_tokens(mesh, directory):
    policy = work.load_policy(directory / "policy", mesh)
    policy.wrap_for_training()
    groups = rollout(policy, directory)
    metrics = work.still_update(policy, None, work.SMALL)(groups, 0.0)
    model, banned = plain_model(directory / "policy"), banned_ids(directory / "policy")
    entropies = []
    for group in groups:
        for completion in group.completions:
            with torch.no_grad():
                table = plain.distributions(model, group.prompt, completion.token_ids, banned)
            entropies.append(-(table.exp() * table.masked_fill(table.isinf(), 0)).sum(-1))
    assert metrics["grpo/entropy"] == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-5)
    assert metrics["train/tokens"] == sum(map(len, entropies))


@pytest.mark.parametrize("kind", ["failed", "none"])
def test_a_step_without_any_score_changes_nothing(mesh, directory, kind):
    policy, reference = work.with_reference(directory / "policy", directory / "reference", mesh)
    cfg = work.settings(grpo={"num_iterations": 2})
    optimizer = parallel_optimizer.build(cfg.optimizer, policy.wrap_for_training())
    update = GrpoUpdate(Updater(policy, optimizer, cfg), reference)
    groups = [replace(g, advantages=np.full(3, np.nan, np.float32)) for g in rollout(policy, directory)]
    update(rollout(policy, directory), LEARNING_RATE)  # from here on Adam's momentum would move the weights
    before = [p.detach().clone() for p in policy.model.parameters()]
    metrics = update(groups if kind == "failed" else [], LEARNING_RATE)
    assert metrics == {"train/tokens": 0, "train/grad_norm": 0, "train/lr": LEARNING_RATE, "train/skipped": 2}
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))


def test_equal_scores_change_nothing_without_a_reference(mesh, directory):
    policy = work.load_policy(directory / "policy", mesh)
    cfg = work.settings(grpo={"beta": 0.0})
    optimizer = parallel_optimizer.build(cfg.optimizer, policy.wrap_for_training())
    update = GrpoUpdate(Updater(policy, optimizer, cfg), None)
    groups = rollout(policy, directory)
    assert update(groups, LEARNING_RATE)["train/skipped"] == 0  # from here on Adam's momentum would move the weights
    before = [p.detach().clone() for p in policy.model.parameters()]
    equal = [replace(group, advantages=np.zeros(3, np.float32)) for group in groups]
    assert update(equal, LEARNING_RATE)["train/skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))


def test_a_batch_that_is_not_finite_is_tried_once_a_rollout(mesh, directory):
    policy = work.load_policy(directory / "policy", mesh)
    cfg = work.settings(grpo={"beta": 0.0, "num_iterations": 4})
    optimizer = parallel_optimizer.build(cfg.optimizer, policy.wrap_for_training())
    update = GrpoUpdate(Updater(policy, optimizer, cfg), None)
    groups = rollout(policy, directory)
    bad = [replace(group, advantages=np.array([np.float32(3e38), -1, 1], np.float32)) for group in groups]
    metrics = update(bad, LEARNING_RATE)
    assert metrics["train/skipped"] == 4 and np.isnan(metrics["train/grad_norm"])
    assert update.updater.bad_steps == 1
    assert update(groups, LEARNING_RATE)["train/skipped"] == 0 and update.updater.bad_steps == 0


def test_the_reference_leaves_the_policy_as_it_was(mesh, directory):
    policy, reference = work.with_reference(directory / "policy", directory / "reference", mesh)
    before = [p.detach().clone() for p in policy.model.parameters()]
    for _ in range(2):
        with reference.swapped_in():
            there = plain.read(directory / "reference")["model.norm.weight"]
            assert torch.equal(policy.model.language.decoder.final_layernorm.weight, there)
        assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))


@pytest.mark.parametrize("frozen", [False, True])
def test_each_image_goes_through_the_tower_once(mesh, directory, frozen):
    policy = work.load_policy(directory / "policy", mesh, freeze_vision=frozen)
    policy.wrap_for_training()
    seen: list[int] = []
    policy.model.vision.register_forward_hook(lambda module, given, result: seen.append(len(given[1])))
    images = {image.digest for prompt in mixed_prompts(directory / "policy") for image in prompt.images}
    groups = rollout(policy, directory)
    assert sum(seen) == len(images) == IMAGES
    work.still_update(policy, None, work.LARGE)(groups, 0.0)
    assert sum(seen) == (IMAGES if frozen else 2 * IMAGES)  # with gradients the tower must run again
    if not frozen:
        rollout(policy, directory)
        assert sum(seen) == 3 * IMAGES  # its weights may have changed
    policy.forget_features()
    rollout(policy, directory)
    assert sum(seen) == (2 * IMAGES if frozen else 4 * IMAGES)


def test_a_frozen_tower_runs_once_for_rollout_reference_and_training(mesh, directory):
    """Its embeddings are the reference's too, unless the reference comes with another tower."""
    for of_reference, passes in (("policy", 1), ("reference", 3)):
        policy = work.load_policy(directory / of_reference, mesh, freeze_vision=True)
        reference = Reference(policy)
        weights.load(policy.chunks, weights.HfWeights(directory / "policy"))
        policy.wrap_for_training()
        seen: list[int] = []
        policy.model.vision.register_forward_hook(lambda module, given, result, seen=seen: seen.append(len(given[1])))
        work.still_update(policy, reference, work.LARGE)(rollout(policy, directory), 0.0)
        assert sum(seen) == passes * IMAGES
