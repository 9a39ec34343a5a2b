"""`vlmr1 generate` through the real program: one JSON line, the same on one and two ranks, equal to transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from megatron_vlmr1.checkpoint.locate import hf_directory
from megatron_vlmr1.data.scenes import scene
from megatron_vlmr1.data.tokens import banned_token_ids, load_tokenizer
from tests import jobs

ASK = ("generate", "asset:tiny_vlm", "--json", "--max-new-tokens", 12)


def answer(code: int, output: str) -> dict:
    assert code == 0, output
    return json.loads(output.splitlines()[-1])


@pytest.mark.timeout(200)
def test_one_question_two_images(tmp_path: Path) -> None:
    images = []
    for i in range(2):
        scene("heldout", i).image.save(tmp_path / f"{i}.png")
        images += ["--image", tmp_path / f"{i}.png"]
    ask = [*images, "--prompt", "the red circle", "--greedy", "--ignore-eos"]
    alone = answer(*jobs.run_forked(1, *ASK, *ask))
    assert alone.keys() == {"text", "prompt_token_ids", "token_ids", "logprobs"}
    assert len(alone["token_ids"]) == len(alone["logprobs"]) == 12
    image_id = json.loads((hf_directory("asset:tiny_vlm") / "config.json").read_text())["image_token_id"]
    assert alone["prompt_token_ids"].count(image_id) == 2 * 16
    for split in (
        answer(
            *jobs.run(*ASK, *ask, "parallel.tensor_model_parallel_size=2", "rollout.decode_burst=5")
        ),  # which starts the ranks itself
        answer(*jobs.run_forked(2, *ASK, *ask, "parallel.pipeline_model_parallel_size=2")),
    ):
        assert split["token_ids"] == alone["token_ids"] and split["text"] == alone["text"]
        assert split["logprobs"] == pytest.approx(alone["logprobs"], abs=1e-5)


@pytest.mark.timeout(100)
def test_text_only_equals_transformers() -> None:
    ours = answer(*jobs.run_forked(1, *ASK, "--prompt", "the red circle", "--greedy"))
    model = AutoModelForImageTextToText.from_pretrained(hf_directory("asset:tiny_vlm"), dtype=torch.float32).eval()
    ids = torch.tensor([ours["prompt_token_ids"] + ours["token_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
    directory = hf_directory("asset:tiny_vlm")
    logits[:, banned_token_ids(directory, load_tokenizer(directory)).tolist()] = float("-inf")
    n = len(ours["prompt_token_ids"])
    logprobs = torch.log_softmax(logits, -1)[range(n - 1, ids.shape[1] - 1), ours["token_ids"]]
    assert ours["logprobs"] == pytest.approx(logprobs.tolist(), abs=1e-4)


def test_bad_input(tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"not an image")
    for words, says in (
        (["--image", str(tmp_path / "gone.png")], "gone.png: No such file"),
        (["--image", str(tmp_path / "no.png")], "no.png"),
        (["parallel.tensor_model_parallel_size=0"], "greater than 0"),
    ):
        code, output = jobs.run_forked(1, "generate", "asset:tiny_vlm", "--prompt", "x", *words)
        assert code == 2 and says in output, output
        assert len([line for line in output.splitlines() if "error" in line]) == 1
