"""`vlmr1 generate`: images and a question in, an answer out."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlmr1.cli.common import add_overrides, checked_overrides, print_json, run_here
from megatron_vlmr1.errors import DONE
from megatron_vlmr1.runtime.ranks import identity
from megatron_vlmr1.telemetry.files import write_atomic

if TYPE_CHECKING:
    from megatron_vlmr1.config import Config

_EPILOG = """\
example:
  vlmr1 generate runs/quickstart --image scene.png --prompt "Where is the red circle?" --greedy --json

Overrides are those of a config: parallel.tensor_model_parallel_size=2, precision=bf16, rollout.temperature=0.7.
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser("generate", help="ask a model one question", epilog=_EPILOG)
    parser.add_argument("path", help="Hugging Face directory, checkpoint or run directory")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="image; may be repeated")
    parser.add_argument("--prompt", required=True, help="the text, which follows the images")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="rollout.max_new_tokens")
    parser.add_argument("--ignore-eos", action="store_true", help="go on to --max-new-tokens")
    parser.add_argument("--seed", type=int, metavar="N", help="of the sampling (default: 0)")
    parser.add_argument("--json", action="store_true", help="print text, prompt_token_ids, token_ids and logprobs")
    parser.add_argument("--result", help=argparse.SUPPRESS)  # where rank 0 of a job leaves the answer
    add_overrides(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer here, or on as many ranks as the layout asks for."""
    flags = {"rollout.max_new_tokens": args.max_new_tokens, "seed": args.seed}
    given = [f"{key}={value}" for key, value in flags.items() if value is not None]
    overrides = [*checked_overrides(args.overrides), *given]
    cfg = _config(args, overrides)
    nproc = cfg.parallel.tensor_model_parallel_size * cfg.parallel.pipeline_model_parallel_size
    if identity() is None and nproc > 1:
        with tempfile.TemporaryDirectory(prefix="vlmr1-") as folder:
            result = Path(folder) / "answer.json"
            code = run_here(cfg, nproc, [*_words(args), "--result", str(result), *overrides], Path(folder))
            if code == DONE:
                _print(json.loads(result.read_bytes()), args.json)
            return code
    answer = _answer(args, cfg)
    if answer is not None and args.result:
        write_atomic(Path(args.result), json.dumps(answer).encode())
    elif answer is not None:
        _print(answer, args.json)
    return DONE


def _config(args: argparse.Namespace, overrides: list[str]) -> Config:
    from megatron_vlmr1 import config

    base: dict[str, Any] = {"model": {"path": args.path}, "data": {"train": "-"}, "precision": "fp32"}
    raw = config.merged(base, overrides)
    return config.parse({str(key): value for key, value in raw.items()}, "vlmr1 generate")


def _words(args: argparse.Namespace) -> list[str]:
    words = ["generate", args.path, f"--prompt={args.prompt}", *(f"--image={image}" for image in args.image)]
    return words + ["--greedy"] * args.greedy + ["--ignore-eos"] * args.ignore_eos


def _answer(args: argparse.Namespace, cfg: Config) -> dict[str, Any] | None:
    """Return the answer on rank 0, None on the others."""
    from dataclasses import replace

    from megatron_vlmr1.runtime import device

    device.prepare_megatron()  # before megatron-core is imported
    from megatron_vlmr1.checkpoint.locate import hf_directory
    from megatron_vlmr1.parallel.job import joined
    from megatron_vlmr1.rollout.actor import Actor
    from megatron_vlmr1.types import Damage, Sample

    images = tuple(Path(image).read_bytes() for image in args.image)
    with joined(cfg.parallel, cfg.seed) as mesh:
        actor = Actor(hf_directory(cfg.model.path, check=mesh.rank == 0), cfg, mesh)
        prompt = actor.prompt_builder(str).build(0, Sample("--prompt", args.prompt, "", images))
        if isinstance(prompt, Damage):
            raise ValueError(f"{', '.join(args.image) or '--prompt'}: {prompt.reason}")
        sampling = actor.greedy() if args.greedy else actor.sampling(cfg.seed)
        if args.ignore_eos:
            sampling = replace(sampling, stop_ids=frozenset())
        ((completion,),) = actor.answers([prompt], sampling)
        actor.engine.release()
        if mesh.rank != 0:
            return None
    return {
        "text": completion.text,
        "prompt_token_ids": prompt.token_ids.tolist(),
        "token_ids": completion.token_ids.tolist(),
        "logprobs": [float(value) for value in completion.logprobs],
    }


def _print(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(answer)
    else:
        sys.stdout.write(answer["text"] + "\n")
