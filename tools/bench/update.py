"""The update phase with a group's prompt packed once, against each completion packed with its own copy of the prompt.

8 prompts with images of 448 x 448 (256 image tokens), G=8, completions of 64 tokens on average. Both sides go through
`GrpoUpdate`: forward, backward, finite check, optimizer step; their gradients are compared. Cases: `beta0` and
`beta0.04` (with the reference's pass), where a copy of the prompt has its own image, as in trainers that know no
groups; `one_tower`, beta 0, where the copies in a micro-batch share their image's way through the tower, so that only
the language model's saving is left; `frozen`, beta 0, where the tower is frozen and its embeddings are kept.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from tools.bench import common

CASES = ("beta0", "beta0.04", "one_tower", "frozen")
PROMPTS, GENERATIONS = 8, 8
LEARNING_RATE = 1e-6
TOWER = {
    "beta0": "apart: the tower runs for each completion",
    "beta0.04": "apart: the tower runs for each completion",
    "one_tower": "apart: the tower runs once for each image of a micro-batch",
    "frozen": "tower frozen and run beforehand on both sides",
}
MAX_DIFFERENCE = 1e-5  # of the gradients' norms, relative


def main() -> None:
    """Measure the cases that were asked for."""
    parser = common.parser(__doc__, CASES)
    parser.add_argument("--threads", type=int, default=common.CORES, help="of torch (default: all cores)")
    args = parser.parse_args()
    common.bind_threads()
    from tools.bench import tiny

    with tiny.mesh(args.threads) as mesh, tempfile.TemporaryDirectory() as folder:
        directory = tiny.write_model(Path(folder))
        cases = [run_case(name, directory, mesh, args) for name in common.chosen(args, CASES)]
    common.finish("update", cases, args)


def run_case(name: str, directory: Path, mesh: Any, args: Any) -> common.Case:
    """Measure one case."""
    from tools.bench import tiny

    prompts = tiny.prompts(directory, PROMPTS, 448)
    lengths = tiny.long_tailed_lengths(PROMPTS * GENERATIONS)
    groups = random_groups(prompts, lengths.reshape(PROMPTS, GENERATIONS))
    beta, frozen = 0.04 if name == "beta0.04" else 0.0, name == "frozen"
    update = build(directory, mesh, beta, frozen)
    sides = groups, [one for group in groups for one in separately(group, own_image=name.startswith("beta"))]
    norms = [step(update, side, 0.0)()["train/grad_norm"] for side in sides]
    if abs(norms[0] / norms[1] - 1) > MAX_DIFFERENCE:
        raise SystemExit(f"{name}: gradient norms {norms} of the same step differ")
    shared, apart = (seconds(step(update, side, LEARNING_RATE)) for side in sides)
    pairs = common.alternate(shared, apart, args.pairs, warm_up=False)
    setting = (
        f"{PROMPTS} prompts of {len(prompts[0].token_ids)} tokens (256 of the image) x {GENERATIONS}, completions of "
        f"{lengths.mean():.1f} tokens on average, beta {beta:g}, fp32, optimizer step included, "
        f"{TOWER[name]}, 1 rank x {args.threads} threads, bound to cores"
    )
    return common.case(name, pairs, "s", setting, more_is_better=False)


def random_groups(prompts: Sequence[Any], lengths: Any) -> list[Any]:
    """Return groups with drawn completions and advantages."""
    from megatron_vlmr1.types import Completion, Group

    rng = np.random.default_rng(0)
    groups = []
    for prompt, row in zip(prompts, lengths, strict=True):
        completions = tuple(
            Completion(rng.integers(0, 400, n).astype(np.int64), np.zeros(n, np.float32), "length", "") for n in row
        )
        groups.append(Group(prompt, completions, (), rng.standard_normal(len(row)).astype(np.float32)))
    return groups


def separately(group: Any, own_image: bool) -> list[Any]:
    """Return a group of one for each completion; `own_image` hides that the prompts' images are the same."""
    from megatron_vlmr1.types import Group

    out = []
    for i, completion in enumerate(group.completions):
        images = tuple(replace(image, digest=image.digest + bytes([i])) for image in group.prompt.images)
        prompt = replace(group.prompt, images=images) if own_image else group.prompt
        out.append(Group(prompt, (completion,), (), group.advantages[i : i + 1]))
    return out


def build(directory: Path, mesh: Any, beta: float, frozen: bool) -> Any:
    """Return the update of a fresh policy."""
    from megatron_vlmr1 import config
    from megatron_vlmr1.grpo.reference import Reference
    from megatron_vlmr1.grpo.update import GrpoUpdate, Updater
    from megatron_vlmr1.parallel import optimizer as parallel_optimizer
    from tools.bench import tiny

    settings = {"precision": "fp32", "model": {"path": "-"}, "data": {"train": "-"}, "grpo": {"beta": beta}}
    cfg = config.parse(settings, "bench")
    policy = tiny.policy(directory, mesh, frozen)
    reference = Reference(policy) if beta else None
    optimizer = parallel_optimizer.build(cfg.optimizer, policy.wrap_for_training())
    return GrpoUpdate(Updater(policy, optimizer, cfg), reference)


def step(update: Any, groups: Sequence[Any], lr: float) -> Callable[[], dict[str, float]]:
    """Return one update on `groups`; it returns its metrics."""

    def run() -> dict[str, float]:
        policy = update.updater.policy
        if not policy.freeze_vision:
            policy.forget_features()
        return dict(update(groups, lr))

    return run


def seconds(side: Callable[[], object]) -> Callable[[], float]:
    """Return a measurement of `side`."""

    def measure() -> float:
        start = time.perf_counter()
        side()
        return time.perf_counter() - start

    return measure


if __name__ == "__main__":
    main()
