"""Our engine against transformers' `generate`, the engine of the original, on the same weights and cores.

8 prompts x G=8, T=1 over the whole distribution, fp32, each sequence ends at a length that was drawn beforehand.
Both sides share the prompts out over one process a core, the fastest for both (docs/decisions.md).
Cases: `tail`, images of 448 x 448 (256 image tokens) and long-tailed lengths; `tail_v152k`, the same with 151,936
tokens in the vocabulary; `flat`, 16 image tokens and 64 tokens each, where `generate` wastes least. No image embedding
is kept between repeats.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from megatron_vlmr1.launch.local import run_ranks
from megatron_vlmr1.runtime.ranks import identity
from tools.bench import common

PROMPTS, GENERATIONS = 8, 8
CASES = ("tail", "tail_v152k", "flat")
LARGE_VOCABULARY = 151_936
MAX_GAP = 1e-4
WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Work:
    """One case's prompts on this rank, and how long each completion is."""

    prompts: Sequence[Any]
    lengths: Any  # [prompts, GENERATIONS]


def main() -> None:
    """Measure the cases that were asked for."""
    parser = common.parser(__doc__, CASES)
    ranks = math.gcd(PROMPTS, common.CORES)
    parser.add_argument("--ranks", type=int, default=ranks, help="processes of each side (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads a process (default: cores by ranks)")
    args = parser.parse_args()
    args.threads = args.threads or max(1, common.CORES // args.ranks)
    if PROMPTS % args.ranks:
        parser.error(f"--ranks must divide {PROMPTS} prompts")
    if args.ranks == 1:
        common.bind_threads()
    elif identity() is None:
        with tempfile.TemporaryDirectory() as logs:
            command = [sys.executable, *sys.argv]
            raise SystemExit(run_ranks(args.ranks, command, logs, {"OMP_NUM_THREADS": str(args.threads)}))
    from megatron_vlmr1.runtime import distributed
    from tools.bench import tiny

    with tiny.mesh(args.threads) as mesh, tempfile.TemporaryDirectory() as folder:
        shared = Path(distributed.broadcast_text(folder))
        cases = [run_case(name, shared / name, mesh, args) for name in common.chosen(args, CASES)]
    if mesh.rank == 0:
        common.finish("rollout", cases, args)


def run_case(name: str, directory: Path, mesh: Any, args: Any) -> common.Case:
    """Measure one case; its model lies in `directory` afterwards."""
    import torch.distributed as dist

    from tools.bench import tiny

    side = 112 if name == "flat" else 448
    flat = np.full(PROMPTS * GENERATIONS, tiny.MEAN_LENGTH)
    lengths = flat if name == "flat" else tiny.long_tailed_lengths(PROMPTS * GENERATIONS)
    if mesh.rank == 0:
        tiny.write_model(directory, LARGE_VOCABULARY if name == "tail_v152k" else None)
    dist.barrier()
    prompts = tiny.prompts(directory, PROMPTS, side)
    mine = slice(mesh.rank, None, mesh.world)
    work = Work(prompts[mine], lengths.reshape(PROMPTS, GENERATIONS)[mine])
    policy, model = tiny.policy(directory, mesh), tiny.plain_model(directory)
    few = Work(work.prompts, np.minimum(work.lengths, WARM_UP_TOKENS))
    our_side(policy, few)()
    their_side(model, few)()
    last: list[Any] = []  # our latest completions
    tokens = int(lengths.sum())
    ours = rate(our_side(policy, work), tokens, last)
    pairs = common.alternate(ours, rate(their_side(model, work), tokens), args.pairs, warm_up=False)
    gap = largest_gap(model, policy, work, last[0])
    if gap > MAX_GAP:
        raise SystemExit(f"{name}: our log-probs and transformers' differ by {gap:.2e}")
    image_tokens = int((prompts[0].token_ids == policy.shape.image_token_id).sum())
    setting = (
        f"{PROMPTS} prompts of {len(prompts[0].token_ids)} tokens ({image_tokens} of the image) x {GENERATIONS}, "
        f"lengths {'all ' + str(flat[0]) if name == 'flat' else f'drawn with seed {tiny.SEED}'} "
        f"(mean {lengths.mean():.1f}, max {lengths.max()}), vocabulary {policy.shape.text.vocab_size:,}, fp32, "
        f"each side {args.ranks} rank{'s' * (args.ranks > 1)} x {args.threads} thread{'s' * (args.threads > 1)}"
        f"{', bound to cores' * (args.ranks == 1)}; log-probs agree to {gap:.0e}"
    )
    return common.case(name, pairs, "tokens/s", setting, more_is_better=True)


def rate(side: Callable[[], object], tokens: int, last: list[Any] | None = None) -> Callable[[], float]:
    """Return a measurement of `side` in tokens/s, over all ranks; it leaves what `side` returned in `last`."""
    import torch.distributed as dist

    def measure() -> float:
        dist.barrier()
        start = time.perf_counter()
        found = side()
        dist.barrier()
        seconds = time.perf_counter() - start
        if last is not None:
            last[:] = [found]
        return tokens / seconds

    return measure


def our_side(policy: Any, work: Work) -> Callable[[], Any]:
    """Return one run of our engine."""
    from megatron_vlmr1.rollout.engine import Engine
    from megatron_vlmr1.rollout.sampling import Sampling

    engine = Engine(policy, lambda ids: "", 1 << 20)
    sampling = Sampling(int(work.lengths.max()), frozenset(), temperature=1.0, seed=0)
    limits = [tuple(map(int, row)) for row in work.lengths]

    def run() -> Any:
        policy.forget_features()
        return engine.generate(work.prompts, GENERATIONS, sampling, limits=limits)

    return run


def their_side(model: Any, work: Work) -> Callable[[], Any]:
    """Return one run of `generate`, which shares each image's embedding among its completions by itself."""
    import torch
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    from tools.bench import tiny

    inputs = tiny.plain_inputs(model, work.prompts)
    prompt_tokens = inputs["input_ids"].shape[1]
    limits = torch.from_numpy(work.lengths.reshape(-1))

    class AtItsLength(StoppingCriteria):
        """Ends each sequence at its own length; `generate` pads it from there on."""

        eos_token_id = None  # its presence is what makes `generate` pad

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return input_ids.shape[1] - prompt_tokens >= limits

    pad = 0 if model.generation_config.pad_token_id is None else model.generation_config.pad_token_id
    draw = dict(do_sample=True, temperature=1.0, top_p=1.0, top_k=0, num_return_sequences=GENERATIONS)
    longest = int(limits.max())
    model.generation_config = GenerationConfig(**draw, max_new_tokens=longest, use_cache=True, pad_token_id=pad)
    stopping = StoppingCriteriaList([AtItsLength()])

    @torch.inference_mode()
    def run() -> Any:
        out = model.generate(**inputs, stopping_criteria=stopping)
        assert out.shape == (len(limits), prompt_tokens + longest), out.shape
        return out

    return run


def largest_gap(model: Any, policy: Any, work: Work, completions: Any) -> float:
    """Return how far our log-probs lie from those of transformers' forward over the same tokens; checks the lengths."""
    import torch

    from tools.bench import tiny

    assert [[len(c.token_ids) for c in row] for row in completions] == work.lengths.tolist()
    worst = 0.0
    for prompt, row in zip(work.prompts, completions, strict=True):
        for completion in (row[0], row[-1]):
            inputs = tiny.plain_inputs(model, [prompt], [completion.token_ids])
            with torch.no_grad():
                logits = model(**inputs, use_cache=False).logits[0, len(prompt.token_ids) - 1 : -1]
            logits[:, policy.vocabulary.forbidden] = float("-inf")
            table = torch.log_softmax(logits, dim=-1)
            plain = table.gather(1, torch.from_numpy(completion.token_ids)[:, None])[:, 0]
            worst = max(worst, float((plain - torch.from_numpy(completion.logprobs)).abs().max()))
    return worst


if __name__ == "__main__":
    main()
