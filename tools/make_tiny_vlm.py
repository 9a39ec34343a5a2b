"""Make megatron_vlmr1/assets/tiny_vlm from random weights with the project's own SFT on generated scenes.

Three phases: captions (what and where), true boxes, then rough answers: boxes pushed outward and 3 in 10 without tags,
so that the model can do the task but not well, and GRPO has something real to mend. About 15 minutes on 2 cores.
`--check` measures the shipped model instead of making one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ASSET = ROOT / "megatron_vlmr1" / "assets" / "tiny_vlm"
CONFIG = ROOT / "configs" / "tiny_base.yaml"
SEED = 0
MODEL = {
    "text_config": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.08,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [8, 4, 4]},
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 96,
        "num_heads": 3,
        "intermediate_size": 192,
        "out_hidden_size": 128,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [],
        "initializer_range": 0.08,
    },
}
# style of the rows, number of scenes, steps, and what the phase's optimizer does
PHASES = (
    ("caption", 6400, ["train.steps=200", "optimizer.decay=constant"]),
    ("clean", 12800, ["train.steps=1600"]),
    ("rough", 6400, ["train.steps=500", "optimizer.lr=1e-3", "optimizer.decay=linear"]),
)


def main() -> None:
    """Make the model, or measure the one that is shipped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="runs/tiny_base", help="where runs and data go (default: runs/tiny_base)")
    parser.add_argument("--check", action="store_true", help="only measure the shipped model")
    args = parser.parse_args()
    work = (ROOT / args.work).resolve()
    if work.exists() and not args.check:
        parser.error(f"{work} exists: delete it first, or nothing would be made anew")
    for split, count in (("heldout", 320), ("ood", 240)):
        build(work, split, split, "rough", count)
    splits = [f"data.evaluate.{split}={work / 'data' / split}" for split in ("heldout", "ood")]
    model = ASSET
    if not args.check:
        model = work / "random"
        make_random(model)
        for style, count, overrides in PHASES:
            build(work, style, "train", style, count)
            paths = [f"run_dir={work / style}", f"model.path={model}", f"data.train={work / 'data' / style}"]
            vlmr1("train", CONFIG, "--nproc", 2, *paths, *splits, *overrides)
            model = work / style
        made = work / "tiny_vlm"
        shutil.rmtree(made, ignore_errors=True)
        vlmr1("convert", "export", model, made)
        model = made
    paths = [f"run_dir={work / 'measure'}", f"model.path={model}", f"data.train={work / 'data' / 'heldout'}"]
    vlmr1("evaluate", CONFIG, "--nproc", 2, "--label", "base", *paths, *splits)
    if not args.check:
        figures = json.loads((work / "measure" / "evaluations" / "base.json").read_bytes())
        publish(model, figures)


def make_random(directory: Path) -> None:
    """Write the random model: transformers' own initialisation, seeded."""
    import torch
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    from megatron_vlmr1.data.scene_tokenizer import build_checkpoint_files

    shutil.rmtree(directory, ignore_errors=True)
    build_checkpoint_files(directory, MODEL)
    torch.manual_seed(SEED)
    model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(directory)).float()
    generation = (directory / "generation_config.json").read_bytes()
    config = (directory / "config.json").read_bytes()
    model.save_pretrained(directory)
    (directory / "generation_config.json").write_bytes(generation)
    (directory / "config.json").write_bytes(config)


def build(work: Path, name: str, split: str, style: str, count: int) -> None:
    """Draw scenes and build their shards, once."""
    out = work / "data" / name
    if out.is_dir():
        return
    scenes = work / "scenes" / name
    vlmr1("shards", "scenes", scenes, "--split", split, "--count", count, "--style", style)
    vlmr1("shards", "build", out, "--jsonl", scenes / f"{split}.jsonl", "--images", scenes / "images")
    shutil.rmtree(scenes)


def publish(model: Path, figures: dict[str, dict[str, float]]) -> None:
    """Put the made model in the package, with its card."""
    rows = "".join(
        f"| {split} | {values['acc50']:.3f} | {values['iou_parsed']:.3f} | {values['format_rate']:.3f} | "
        f"{values['reward_mean']:.3f} |\n"
        for split, values in figures.items()
    )
    (model / "README.md").write_text(CARD.format(rows=rows), encoding="utf-8")
    fresh = ASSET.with_name(ASSET.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(model, fresh)
    shutil.rmtree(ASSET, ignore_errors=True)
    fresh.rename(ASSET)


CARD = """\
---
license: apache-2.0
pipeline_tag: image-text-to-text
---
# A tiny Qwen2.5-VL for grounding drawn scenes

Real architecture, 1.2 million parameters, trained from random weights by `tools/make_tiny_vlm.py` on pictures of
coloured shapes ("the red shape at the bottom left"). It finds the object but boxes it loosely, and when sampled
answers without tags three times in ten: a start for reinforcement learning, of no other use.

| split | Acc@0.5, greedy | mean IoU of parsed answers | format, greedy | reward (IoU + format), T=1 |
|---|---|---|---|---|
{rows}"""


def vlmr1(*words: object) -> None:
    """Run one verb; leave with its exit code if it fails."""
    command = [sys.executable, "-m", "megatron_vlmr1.cli", *map(str, words)]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode  # noqa: S603 - our own program
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
