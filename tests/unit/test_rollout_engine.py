"""Generation with a cache against transformers' own, on random checkpoints with images."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from transformers import (
    GenerationConfig,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_vlmr1.models import vision
from megatron_vlmr1.rollout.engine import Engine
from megatron_vlmr1.rollout.forward import Forward
from megatron_vlmr1.rollout.sampling import Sampling
from tests.checkpoints import banned_ids, mixed_prompts, plain_model, write_random_checkpoint
from tests.distributed import plain, work
from tests.distributed.plain import within

STEPS = 12


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("rollout") / "model", seed=7)


@pytest.fixture(scope="module")
def policy(mesh, directory):
    return work.load_policy(directory, mesh)


@pytest.fixture(scope="module")
def model(directory):
    return plain_model(directory)


@pytest.fixture(scope="module")
def prompts(directory):
    return mixed_prompts(directory)


def sampled(seed: int = 3, stops: frozenset[int] = work.STOPS) -> Sampling:
    return Sampling(STEPS, stops, seed=seed)


def ids(rows) -> list[list[list[int]]]:
    return [[c.token_ids.tolist() for c in row] for row in rows]


def test_sampled_log_probs_are_those_of_transformers(policy, model, directory, prompts, record_property):
    rows = work.engine(policy).generate(prompts, 4, sampled())
    gap = 0.0
    for prompt, row in zip(prompts, rows, strict=True):
        for c in row:
            with torch.no_grad():
                expected = plain.logprobs(model, prompt, c.token_ids, banned_ids(directory))
            gap = max(gap, float((expected - torch.from_numpy(c.logprobs)).abs().max()))
    within(record_property, "log-probs", gap, 1e-4)


def test_log_probs_are_at_temperature_one(policy, model, directory, prompts):
    rows = work.engine(policy).generate(prompts[:2], 2, replace(sampled(), temperature=0.6))
    for prompt, row in zip(prompts, rows, strict=False):
        for c in row:
            with torch.no_grad():
                expected = plain.logprobs(model, prompt, c.token_ids, banned_ids(directory))
            assert (expected - torch.from_numpy(c.logprobs)).abs().max() <= 1e-4


@pytest.mark.parametrize("stops", [work.STOPS, frozenset({5})], ids=["many", "one"])
def test_greedy_completions_are_those_of_transformers_generate(policy, model, directory, prompts, stops):
    rows = work.engine(policy).generate(prompts, 1, Sampling(STEPS, stops, greedy=True))
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=STEPS,
        suppress_tokens=banned_ids(directory),
        eos_token_id=sorted(stops),
        pad_token_id=0,
    )
    for prompt, (completion,) in zip(prompts, rows, strict=True):
        whole = model.generate(**plain.inputs(model, prompt), generation_config=settings)[0]
        assert completion.token_ids.tolist() == whole[len(prompt.token_ids) :].tolist()


def test_a_repetition_penalty_is_that_of_transformers(policy, model, directory, prompts):
    rows = work.engine(policy).generate(prompts, 1, Sampling(STEPS, work.STOPS, greedy=True, repetition_penalty=1.5))
    assert ids(rows) != ids(work.engine(policy).generate(prompts, 1, Sampling(STEPS, work.STOPS, greedy=True)))
    settings = GenerationConfig(
        do_sample=False,
        repetition_penalty=1.5,
        max_new_tokens=STEPS,
        suppress_tokens=banned_ids(directory),
        eos_token_id=sorted(work.STOPS),
        pad_token_id=0,
    )
    for prompt, (completion,) in zip(prompts, rows, strict=True):
        whole = model.generate(**plain.inputs(model, prompt), generation_config=settings)[0]
        assert completion.token_ids.tolist() == whole[len(prompt.token_ids) :].tolist()


def test_both_log_probs_of_a_changed_distribution(policy, model, directory, prompts, record_property):
    """At T=1 over all tokens, and of what was drawn from: here transformers' warpers on its own logits."""
    settings = {"temperature": 1.4, "top_k": 40, "top_p": 0.9, "min_p": 0.01}
    rows = work.engine(policy).generate(prompts, 2, replace(sampled(), **settings))
    warpers = [TemperatureLogitsWarper(1.4), TopKLogitsWarper(40), TopPLogitsWarper(0.9), MinPLogitsWarper(0.01)]
    gaps = [0.0, 0.0]
    for prompt, row in zip(prompts, rows, strict=True):
        for c in row:
            with torch.no_grad():
                table = plain.distributions(model, prompt, c.token_ids, banned_ids(directory))
            warped = table
            for warper in warpers:
                warped = warper(None, warped)
            at = torch.from_numpy(c.token_ids)[:, None]
            for k, (logits, found) in enumerate(((table, c.logprobs), (warped, c.drawn_logprobs))):
                expected = torch.log_softmax(logits, -1).gather(1, at)[:, 0]
                gaps[k] = max(gaps[k], float((expected - torch.from_numpy(found)).abs().max()))
    within(record_property, "log-probs at T=1", gaps[0], 1e-4)
    within(record_property, "log-probs drawn from", gaps[1], 1e-4)
    assert all(c.drawn_logprobs is None for (c,) in work.engine(policy).generate(prompts, 1, sampled()))


def test_completions_do_not_depend_on_what_else_is_in_the_batch(policy, prompts):
    together = work.engine(policy).generate(prompts, 4, sampled())
    reversed_ = work.engine(policy).generate(prompts[::-1], 4, sampled())[::-1]
    alone = [work.engine(policy).generate([prompt], 4, sampled())[0] for prompt in prompts]
    fewer = work.engine(policy).generate(prompts, 2, sampled())
    assert ids(together) == ids(reversed_) == ids(alone)
    assert [row[:2] for row in ids(together)] == ids(fewer)
    for row, other in zip(together, alone, strict=True):
        for a, b in zip(row, other, strict=True):
            assert np.abs(a.logprobs - b.logprobs).max() <= 1e-5


def test_seeds_and_positions_of_prompts_make_a_difference(policy, prompts):
    rows = work.engine(policy).generate(prompts[:1], 4, sampled())
    assert ids(rows) == ids(work.engine(policy).generate(prompts[:1], 4, sampled()))
    assert ids(rows) != ids(work.engine(policy).generate(prompts[:1], 4, sampled(seed=4)))
    moved = replace(prompts[0], position=99)
    assert ids(rows) != ids(work.engine(policy).generate([moved], 4, sampled()))
    assert len({tuple(c) for c in ids(rows)[0]}) == 4


def _note(calls: list[tuple[int, int]], i: int, j: int, completion: object) -> None:
    calls.append((i, j))


def test_waves_give_the_same_completions(policy, prompts):
    need = [len(prompt.token_ids) + 4 * STEPS for prompt in prompts]
    expected = work.engine(policy).generate(prompts, 4, sampled())
    for room in (max(need), max(need) + 60, sum(need)):
        calls: list[tuple[int, int]] = []
        told = partial(_note, calls)
        found = work.engine(policy, room).generate(prompts, 4, sampled(), told)
        assert ids(found) == ids(expected)
        assert sorted(calls) == [(i, j) for i in range(len(prompts)) for j in range(4)]


def test_a_prompt_that_does_not_fit_the_cache(policy, prompts):
    need = max(len(prompt.token_ids) for prompt in prompts) + STEPS
    work.engine(policy, need).generate(prompts, 4, sampled())
    with pytest.raises(ValueError, match=".") as caught:
        work.engine(policy, need - 1).generate(prompts, 4, sampled())
    line = str(caught.value)
    assert "\n" not in line
    for word in (f"rollout.max_cache_tokens={need - 1}", "prompt 3", f"needs {need}", "one completion of 12 tokens"):
        assert word in line


def test_stop_tokens_reasons_and_texts(policy, prompts):
    told: dict[tuple[int, int], object] = {}

    def on_finish(i: int, j: int, completion) -> None:
        assert (i, j) not in told
        told[i, j] = completion

    rows = work.engine(policy).generate(prompts, 6, sampled(), on_finish)
    reasons = set()
    for i, row in enumerate(rows):
        for j, c in enumerate(row):
            assert told[i, j] is c
            reasons.add(c.finish_reason)
            tokens = c.token_ids.tolist()
            assert len(tokens) == len(c.logprobs) <= STEPS
            assert not work.STOPS & set(tokens[:-1])
            if c.finish_reason == "stop":
                assert tokens[-1] in work.STOPS
                assert c.text == " ".join(map(str, tokens[:-1]))
            else:
                assert len(tokens) == STEPS and tokens[-1] not in work.STOPS
                assert c.text == " ".join(map(str, tokens))
    assert len(told) == 6 * len(prompts) and reasons == {"stop", "length"}


def test_a_stop_in_the_last_place_is_a_stop(policy, prompts):
    (row,) = work.engine(policy).generate(prompts[:1], 1, Sampling(STEPS, frozenset(), greedy=True))
    assert row[0].finish_reason == "length"
    tokens = row[0].token_ids.tolist()
    last = tokens.index(tokens[-1]) + 1
    (row,) = work.engine(policy).generate(prompts[:1], 1, Sampling(last, frozenset({tokens[-1]}), greedy=True))
    assert (row[0].token_ids.tolist(), row[0].finish_reason) == (tokens[:last], "stop")


def test_they_are_told_as_they_end(policy, prompts):
    """The first to end is told while others go on: its length is less than a later one's, in every wave."""
    lengths: list[int] = []
    work.engine(policy).generate(prompts, 6, sampled(), lambda i, j, c: lengths.append(len(c.token_ids)))
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]


def test_one_new_token(policy, prompts):
    rows = work.engine(policy).generate(prompts, 2, replace(sampled(), max_new_tokens=1))
    whole = work.engine(policy).generate(prompts, 2, sampled())
    assert ids(rows) == [[c[:1] for c in row] for row in ids(whole)]


def test_no_prompt_at_all(policy):
    assert work.engine(policy).generate([], 4, sampled()) == []


def test_banned_tokens_are_never_sampled(mesh, directory, prompts):
    policy = work.load_policy(directory, mesh, banned=[i for i in range(512) if i % 3])
    rows = work.engine(policy).generate(prompts, 8, Sampling(STEPS, frozenset(), seed=1))
    tokens = {t for row in ids(rows) for c in row for t in c}
    assert len(tokens) > 50 and all(t % 3 == 0 for t in tokens)


def test_a_cache_for_a_quarter_of_the_completions(policy, prompts):
    """A quarter of the completions fit at once: the rest waits, the budget holds, and the completions are the same."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    budget = 3 * longest + 12 * STEPS  # of 48 completions of 6 prompts
    expected = work.engine(policy).generate(prompts, 8, sampled())
    engine = work.engine(policy, budget)
    assert ids(engine.generate(prompts, 8, sampled())) == ids(expected)
    text = policy.shape.text
    keys_and_values = 2 * text.num_layers * text.num_kv_heads * text.head_dim * 4
    assert engine.cache_bytes <= budget * keys_and_values
    whole = work.engine(policy)
    whole.generate(prompts, 8, sampled())
    assert whole.cache_bytes > 2 * engine.cache_bytes


def test_a_place_is_taken_as_soon_as_it_is_free(policy, prompts):
    """Two at a time: while the first, a long one, goes on, all the short ones pass through the other place."""
    told: list[int] = []
    limits = [[STEPS], [1], [2], [1], [2], [1]]
    budget = 3 * max(len(prompt.token_ids) for prompt in prompts) + 2 * STEPS
    rows = work.engine(policy, budget).generate(
        prompts, 1, sampled(stops=frozenset()), lambda i, j, c: told.append(i), limits
    )
    assert [len(row[0].token_ids) for row in rows] == [STEPS, 1, 2, 1, 2, 1]
    assert told == [1, 2, 3, 4, 5, 0]


@pytest.mark.parametrize("budget", [200, 10_000])
def test_limits_end_completions_and_change_nothing_else(policy, prompts, budget):
    limits = [[1 + (5 * i + 3 * j) % STEPS for j in range(4)] for i in range(len(prompts))]
    whole = work.engine(policy).generate(prompts, 4, sampled(stops=frozenset()))
    found = work.engine(policy, budget).generate(prompts, 4, sampled(stops=frozenset()), limits=limits)
    assert ids(found) == [
        [c[:n] for c, n in zip(row, most, strict=True)] for row, most in zip(ids(whole), limits, strict=True)
    ]
    assert {c.finish_reason for row in found for c in row} == {"length"}


def test_prompts_enter_within_the_prefill_budget(policy, prompts, monkeypatch):
    """No forward pass over prompts is longer than allowed, but for one longer prompt alone."""
    sizes: list[int] = []
    run = Forward.run
    monkeypatch.setattr(
        Forward, "run", lambda self, chunk, x, *rest: (sizes.append(len(x)), run(self, chunk, x, *rest))[1]
    )
    lengths = [len(prompt.token_ids) for prompt in prompts]
    engine = Engine(policy, str, 10_000, max_prefill_tokens=60)
    found = engine.generate(prompts, 4, sampled())
    longest = max(lengths)
    assert longest > 60 and max(sizes) == longest and all(size <= 60 for size in sizes if size != longest)
    assert ids(found) == ids(work.engine(policy).generate(prompts, 4, sampled()))


def test_each_image_goes_through_the_tower_once_and_each_prompt_once(policy, prompts, monkeypatch):
    seen: list[int] = []
    encode = vision.VisionTower.forward
    monkeypatch.setattr(
        vision.VisionTower, "forward", lambda self, x, grids: (seen.append(len(grids)), encode(self, x, grids))[1]
    )
    fed: list[int] = []
    embed = Forward.embed
    monkeypatch.setattr(Forward, "embed", lambda self, ids: (fed.append(len(ids)), embed(self, ids))[1])
    policy.forget_features()
    rows = work.engine(policy).generate(prompts, 4, sampled())
    policy.forget_features()
    assert sum(seen) == len({image.digest for prompt in prompts for image in prompt.images})
    completions = sum(len(c.token_ids) - 1 for row in rows for c in row)
    assert sum(fed) == sum(len(prompt.token_ids) for prompt in prompts) + completions
