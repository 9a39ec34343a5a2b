"""Ranks that save and resume on many layouts: ``python -m megatron_vlmr1.drill.pairs WORK -- train CONFIG …``.

WORK is save or resume. The job is one of `vlmr1 train`; in place of GRPO's loop it runs `save_all` or `resume_all`.
"""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_vlmr1.config import Config, ParallelConfig
from megatron_vlmr1.drill import inject
from megatron_vlmr1.drill.layouts import SAVED_STEP, Layout, layouts
from megatron_vlmr1.runtime.ranks import identity

_LOOP = "megatron_vlmr1.train.grpo:train"


def main() -> None:
    """Be the program, with another loop."""
    work, _, *words = sys.argv[1:]
    if identity() is None:
        inject.pass_on("megatron_vlmr1.drill.pairs", [work, "--"])
    else:
        loop = {"save": save_all, "resume": resume_all}[work]
        inject.wrap(_LOOP, lambda _, args, __: loop(*args[:3]))
    sys.argv = ["vlmr1", *words]
    runpy.run_module("megatron_vlmr1.cli", run_name="__main__", alter_sys=True)


def save_all(cfg: Config, mesh: Any, stop: Any) -> Any:
    """Train two steps on each layout of this job's size, save, and write down what the next step sees there."""
    from megatron_vlmr1.train import sft

    for layout in layouts(mesh.world):
        with _laid_out(cfg, layout) as (own, laid):
            sft.train(own, laid, stop)
            _next_step(own, laid, stop, layout, Path(own.run_dir) / "next")
    return SimpleNamespace(step=SAVED_STEP)


def resume_all(cfg: Config, mesh: Any, stop: Any) -> Any:
    """Resume on each layout of this job's size what every other layout saved; the first rank compares."""
    found = []
    for layout in layouts(mesh.world):
        # One mesh for all that are resumed on it: gloo's threads stay when groups are forgotten, and hundreds are slow.
        with _laid_out(cfg, layout) as (own, laid):
            for saved in layouts():
                if saved == layout:
                    continue
                out = Path(cfg.run_dir) / f"again_{mesh.world}"
                _next_step(own, laid, stop, saved, out)
                if mesh.rank == 0:
                    found.append(_compared(Path(cfg.run_dir) / saved.name, out, f"{saved.name} -> {layout.name}"))
    if mesh.rank == 0:
        (Path(cfg.run_dir) / f"pairs_{mesh.world}.json").write_text(json.dumps(found))
    return SimpleNamespace(step=SAVED_STEP)


@contextmanager
def _laid_out(cfg: Config, layout: Layout) -> Iterator[tuple[Config, Any]]:
    """Lay the joined ranks out anew."""
    from megatron_vlmr1.parallel import mesh
    from megatron_vlmr1.runtime.seeds import seed_everything

    mesh.destroy()
    parallel = ParallelConfig(**layout.settings, timeout_s=cfg.parallel.timeout_s)
    built = mesh.build(parallel)
    seed_everything(cfg.seed)
    yield cfg.model_copy(update={"parallel": parallel, "run_dir": str(Path(cfg.run_dir) / layout.name)}), built


def _next_step(cfg: Config, mesh: Any, stop: Any, saved: Layout, out: Path) -> None:
    """Resume from what `saved` has saved, save that again into `out`, and take the next step.

    `out` then holds ``hf`` and ``state``, ``next.json`` and the log-probs of each data-parallel rank's samples.
    """
    import torch.distributed as dist

    from megatron_vlmr1.checkpoint import state, writer
    from megatron_vlmr1.train.run import Run

    source = Path(cfg.run_dir).parent / saved.name / "checkpoints"
    scratch = out.with_name(f"{out.name}_run")
    if mesh.rank == 0:
        for directory in (scratch, out):
            shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(source, scratch / "checkpoints", symlinks=True)
        for part in ("hf", "state"):
            (out / part).mkdir(parents=True)
    dist.barrier()
    with ExitStack() as stack:
        run = Run(cfg.model_copy(update={"run_dir": str(scratch)}), mesh, stop, stack)
        assert run.step == SAVED_STEP
        writer.save(run.actor.policy.chunks, run.actor.directory, out / "hf")
        state.save(run.actor.policy, run.optimizer, {}, out / "state")
        norm = _step(run, out)
    if mesh.rank == 0:
        (out / "next.json").write_text(json.dumps({"norm": norm}))
    dist.barrier()


def _step(run: Any, out: Path) -> float:
    """Write the log-probs of the next samples' answers; return the norm of their gradient."""
    from safetensors.torch import save_file

    from megatron_vlmr1.parallel import reduce
    from megatron_vlmr1.train import sft

    mesh = run.mesh
    batch = run.feed.next(run.cfg.train.prompts_per_step)
    groups = sft.packed(run, batch)
    batches = run.updater.micro_batches(groups)
    lengths = [len(group.completions[0]) for group in groups]
    table = run.updater.logprobs(batches, (len(groups), max(lengths)))
    if mesh.is_last_stage and mesh.tp_rank == 0:
        rows = {f"{p.position} {p.key}": table[i, : lengths[i]].clone() for i, (p, _) in enumerate(batch)}
        save_file(rows, out / f"next_{mesh.dp_rank}.safetensors")
    tokens = reduce.sums({"tokens": float(sum(lengths))}, mesh.is_model_leader)["tokens"]
    _, metrics = run.updater.step(batches, sft.token_mean_loss(run, tokens), run.cfg.optimizer.lr)
    return float(metrics["train/grad_norm"])


def _compared(saved: Path, again: Path, pair: str) -> dict[str, Any]:
    """Compare what was saved with what was made of it on another layout."""
    import torch

    from megatron_vlmr1.drill import digests

    unlike: list[str] = []
    count = 0
    checkpoint = digests.checkpoint_path(saved, SAVED_STEP)
    for read in (digests.weights, digests.optimizer):
        expected, found = read(checkpoint), read(again)
        count += len(expected)
        names = expected.keys() | found.keys()
        unlike += [n for n in names if n not in expected or n not in found or not _same_bits(expected[n], found[n])]
    before, after = _logprobs(saved / "next"), _logprobs(again)
    if before.keys() != after.keys():
        unlike.append("samples of the next step")
    gap = max(float((before[key] - after[key]).abs().max()) for key in before.keys() & after.keys())
    norms = [json.loads((path / "next.json").read_text())["norm"] for path in (saved / "next", again)]
    assert torch.isfinite(torch.tensor([gap, *norms])).all()
    norm = abs(norms[1] / norms[0] - 1)
    return {"pair": pair, "tensors": count, "unlike": unlike, "logprobs": gap, "norm": norm}


def _same_bits(a: Any, b: Any) -> bool:
    import torch

    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _logprobs(directory: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in sorted(directory.glob("next_*.safetensors")):
        found |= load_file(path)
    return found


if __name__ == "__main__":
    main()
