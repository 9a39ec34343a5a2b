"""One rank of TRL's GRPOTrainer for `tools/bench/grpo_step.py`, which starts it and gives its settings as JSON."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["ACCELERATE_USE_CPU"] = "true"

import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoTokenizer,
    ProcessorMixin,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    TrainerCallback,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from trl import GRPOConfig, GRPOTrainer

from megatron_vlmr1.data.rows import parse
from megatron_vlmr1.rewards import functions, tasks
from megatron_vlmr1.rewards.item import RewardItem


class ImageOnlyProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without the one for videos, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **_: Any) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class Clock(TrainerCallback):
    """Seconds from the end of each step to the end of the next."""

    def __init__(self) -> None:
        self.step_s: list[float] = []
        self.last = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time of one step."""
        now = time.perf_counter()
        self.step_s.append(now - self.last)
        self.last = now


def rows(root: Path) -> Dataset:
    """Return the rows as TRL's conversations, with the task's own prompt."""
    out = []
    for line in (root / "rows.jsonl").read_bytes().splitlines():
        row = parse(line)
        text = tasks.get("rec").render(row.question)
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        image = Image.open(root / "images" / row.images[0]).convert("RGB")
        out.append({"prompt": [turn], "image": image, "solution": row.solution})
    return Dataset.from_list(out)


def reward(name: str, lengths: list[int]) -> Any:
    """Return one of our reward functions in TRL's form; it notes the completions' lengths in tokens."""
    function = functions.get(name)

    def score(completions: Any, completion_ids: Any, solution: Any, **_: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        texts = [turns[0]["content"] for turns in completions]
        items = [RewardItem(str(t), s, (448, 448), (1, 32, 32)) for t, s in zip(texts, solution, strict=True)]
        return [function(item) for item in items]

    score.__name__ = name
    return score


def main() -> None:
    """Train, and write the seconds of each step."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    root = Path(settings["root"])
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(root / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(root / "model")
    processor = ImageOnlyProcessor(image_processor, tokenizer, chat_template=tokenizer.chat_template)
    never = [model.config.image_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(dir=Path(settings["out"]).parent),
        per_device_train_batch_size=settings["prompts"] * settings["generations"] // 2,
        num_generations=settings["generations"],
        max_completion_length=settings["new_tokens"],
        max_steps=settings["steps"],
        beta=settings["beta"],
        learning_rate=settings["learning_rate"],
        temperature=1.0,
        loss_type="grpo",
        lr_scheduler_type="constant",
        generation_kwargs={"suppress_tokens": never},  # TRL suppresses the image token in any case
        gradient_checkpointing=False,
        ddp_find_unused_parameters=False,
        use_cpu=True,
        bf16=False,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    lengths: list[int] = []
    clock = Clock()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[reward(name, lengths) for name in ("iou", "format")],
        args=args,
        train_dataset=rows(root),
        processing_class=processor,
        callbacks=[clock],
    )
    clock.last = time.perf_counter()
    trainer.train()
    if trainer.accelerator.is_main_process:
        history = [{k: v for k, v in entry.items() if isinstance(v, float)} for entry in trainer.state.log_history]
        result = {"step_s": clock.step_s, "lengths": sorted(set(lengths)), "history": history}
        Path(settings["out"]).write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()
    os._exit(0)  # gloo's threads can abort or hang an interpreter that is being taken down


if __name__ == "__main__":
    main()
