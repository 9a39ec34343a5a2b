"""One split through the policy: greedy answers, the task's metrics, and sampled rewards."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_vlmr1.config import Config
from megatron_vlmr1.data.feed import agree_on_length
from megatron_vlmr1.data.index import ShardSet
from megatron_vlmr1.data.prompts import PromptBuilder
from megatron_vlmr1.parallel import reduce
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.rewards.item import RewardFailure
from megatron_vlmr1.rewards.judges import Judges
from megatron_vlmr1.rewards.task import Objects, Task
from megatron_vlmr1.rollout.actor import Actor
from megatron_vlmr1.telemetry.files import json_line, write_atomic
from megatron_vlmr1.types import Damage, Group, Prompt, Sample

logger = logging.getLogger(__name__)

PICTURES = 24  # images of the first samples that are kept for the report


@dataclass(frozen=True)
class Evaluation:
    """Figures over a split and, on the model leaders, one row per answer."""

    figures: dict[str, float]
    rows: list[dict[str, Any]]
    pictures: dict[str, bytes]  # file name -> compressed image


def evaluate(actor: Actor, judges: Judges, shards: ShardSet, cfg: Config, mesh: Mesh) -> Evaluation:
    """Answer every sample of a split; all ranks call it, data-parallel ranks share it out.

    Figures are the task's aggregates over greedy answers, ``reward_mean`` over one answer a sample drawn at the
    rollout's temperature (if `evaluate.sampled`), and counts: ``samples`` answered, of which ``failed`` could not be
    judged and count in no figure, ``reward_failed`` whose sampled answer could not, and ``damaged`` ones left out. A
    figure that no sample has is NaN.

    Raises:
        ValueError: the split is empty, or nothing of it can be read.
    """
    task = judges.task
    builder = actor.prompt_builder(task.render)
    counted = [_count_of(figure) for figure in task.aggregates]
    sums = dict.fromkeys((*task.aggregates, *counted, "samples", "failed", "damaged", "reward", "scored"), 0.0)
    rows: list[dict[str, Any]] = []
    pictures: dict[str, bytes] = {}
    total = min(len(shards), cfg.evaluate.limit or len(shards))
    if total == 0:
        raise ValueError(f"{shards.directory}: the split is empty; nothing to evaluate")
    for batch, damaged in _batches(shards, builder, total, cfg, mesh):
        sums["damaged"] += damaged
        prompts = [prompt for prompt, _ in batch]
        answered = actor.answers(prompts, actor.greedy())
        groups = judges.measure([Group(prompt, found) for prompt, found in zip(prompts, answered, strict=True)])
        for group, (_, sample) in zip(groups, batch, strict=True):
            sums["samples"] += 1
            row = _row(group, sample, task, pictures)
            if row is None:
                sums["failed"] += 1
                continue
            rows.append(row)
            for figure, metric in task.aggregates.items():
                if row[metric] is not None:
                    sums[figure] += float(row[metric])
                    sums[_count_of(figure)] += 1
        logger.info("evaluated about %d of %d samples", min(total, int(sums["samples"]) * mesh.dp_size), total)
        if cfg.evaluate.sampled:
            _score_sampled(actor, judges, prompts, cfg, sums, rows)
        actor.engine.policy.forget_features()  # or a whole split's embeddings would stay
    sums = reduce.sums(sums, mesh.is_model_leader)
    if sums["samples"] == sums["failed"]:
        lost = f"{sums['damaged']:.0f} are damaged, {sums['failed']:.0f} could not be judged"
        raise ValueError(f"{shards.directory}: no sample could be measured: {lost}")
    figures = {name: _mean(sums[name], sums[_count_of(name)]) for name in task.aggregates}
    if cfg.evaluate.sampled:
        figures["reward_mean"] = _mean(sums["reward"], sums["scored"])
        figures["reward_failed"] = sums["samples"] - sums["scored"]
    figures |= {name: sums[name] for name in ("samples", "failed", "damaged")}
    return Evaluation(figures, rows if mesh.is_model_leader else [], pictures if mesh.is_model_leader else {})


def _batches(
    shards: ShardSet, builder: PromptBuilder, total: int, cfg: Config, mesh: Mesh
) -> Iterator[tuple[list[tuple[Prompt, Sample]], int]]:
    """Yield this data-parallel rank's samples batch by batch, and how many of them are damaged and left out."""
    mine, size = range(mesh.dp_rank, total, mesh.dp_size), cfg.evaluate.batch_prompts
    for start in range(0, len(range(0, total, mesh.dp_size)), size):  # as many rounds on every rank
        read = [(i, shards.read(i)) for i in mine[start : start + size]]
        built = [(builder.build(i, item) if isinstance(item, Sample) else item, item) for i, item in read]
        if cfg.data.long_prompts == "error":
            agree_on_length((f"{shards.directory} {item.key}", prompt) for prompt, item in built)
        if not built:
            continue
        lost = reduce.lost_anywhere([isinstance(prompt, Damage) for prompt, _ in built], mesh)
        for prompt, _ in built:
            if isinstance(prompt, Damage):
                logger.warning("left out of the evaluation: %s: %s", prompt.key, prompt.reason)
        kept = [pair for pair, gone in zip(built, lost, strict=True) if not gone]
        yield [(p, item) for p, item in kept if isinstance(p, Prompt) and isinstance(item, Sample)], sum(lost)


def _row(group: Group, sample: Sample, task: Task, pictures: dict[str, bytes]) -> dict[str, Any] | None:
    prompt, text, score = group.prompt, group.completions[0].text, group.scores[0]
    try:
        if score.failure is not None:
            raise RewardFailure(score.failure)
        row: dict[str, Any] = {
            "index": prompt.position,
            "key": prompt.key,
            "question": prompt.question,
            "truth": prompt.truth,
            "category": _category(sample),
            "text": text,
            "answer": task.parse(text, prompt),
            **_boxes(task.objects(text, prompt) if task.objects is not None else None),
            **task.metrics(text, prompt, score.parts),
            "reward": None,
            "image": None,
            "image_size": prompt.images[0].size if prompt.images else None,
        }
    except RewardFailure as failure:
        logger.warning("cannot be judged: %s: %s", prompt.key, failure)
        return None
    if prompt.images and prompt.position < PICTURES:
        data = sample.images[0]
        name = prompt.images[0].digest.hex()[:16] + (".png" if data[:4] == b"\x89PNG" else ".jpg")
        pictures[name] = data
        row["image"] = f"images/{name}"
    return row


def _boxes(objects: Objects | None) -> dict[str, Any]:
    """The columns of a task with boxes; `box` is the one of a task that asks for one."""
    if objects is None:
        return {"box": None}
    predicted, true = (
        [{"bbox_2d": box, "label": label} for label, box in side] for side in (objects.predicted, objects.true)
    )
    one = len(predicted) == len(true) == 1
    return {"box": predicted[0]["bbox_2d"] if one else None, "predicted": predicted, "true": true}


def _category(sample: Sample) -> str | None:
    found = sample.extra.get("category", sample.extra.get("class"))
    return str(found) if isinstance(found, str | int) else None


def _count_of(figure: str) -> str:
    return f"{figure} count"


def _mean(total: float, count: float) -> float:
    return total / count if count else float("nan")


def _score_sampled(
    actor: Actor, judges: Judges, prompts: list[Prompt], cfg: Config, sums: dict[str, float], rows: list[dict[str, Any]]
) -> None:
    sampling = actor.sampling(cfg.seed)
    answers = actor.answers(prompts, sampling, lambda i, j, completion: judges.submit(i, j, prompts[i], completion))
    groups = [Group(prompt, completions) for prompt, completions in zip(prompts, answers, strict=True)]
    by_position = {row["index"]: row for row in rows[-len(prompts) :]}
    for group in judges.collect(groups):
        value = group.scores[0].value
        if value is not None:
            sums["reward"] += value
            sums["scored"] += 1
            if row := by_position.get(group.prompt.position):
                row["reward"] = value


def write(evaluation: Evaluation, name: str, run_dir: Path, mesh: Mesh) -> None:
    """Write ``evaluations/NAME.jsonl`` (and the kept pictures) in the run directory; all ranks call it."""
    folder = run_dir / "evaluations"
    part = folder / f".{name}.{mesh.dp_rank}"
    if mesh.is_model_leader:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for file, data in evaluation.pictures.items():
            write_atomic(folder / "images" / file, data)
        write_atomic(part, b"".join(json_line(row) for row in evaluation.rows))
    dist.barrier()
    if mesh.rank == 0:
        parts = [folder / f".{name}.{i}" for i in range(mesh.dp_size)]
        lines = [line for path in parts for line in path.read_bytes().splitlines(keepends=True)]
        lines.sort(key=_index)
        write_atomic(folder / f"{name}.jsonl", b"".join(lines))
        for path in parts:
            path.unlink()
    dist.barrier()


def _index(line: bytes) -> int:
    return int(json.loads(line)["index"])
