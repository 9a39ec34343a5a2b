"""The policy with the tokenizer, processor and templates that it came with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_vlmr1.checkpoint import weights
from megatron_vlmr1.config import Config, decoding_layout
from megatron_vlmr1.data.images import ImageProcessor
from megatron_vlmr1.data.prompts import PromptBuilder
from megatron_vlmr1.data.tokens import VisionTokens, banned_token_ids, load_tokenizer, stop_token_ids
from megatron_vlmr1.models import fp8
from megatron_vlmr1.models.families import read_shape
from megatron_vlmr1.models.policy import Policy
from megatron_vlmr1.models.specs import layers
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.rollout import graphs
from megatron_vlmr1.rollout.decoding_copy import CopyEngine
from megatron_vlmr1.rollout.engine import Engine
from megatron_vlmr1.rollout.lane import OnFinish
from megatron_vlmr1.rollout.sampling import Sampling
from megatron_vlmr1.runtime import device
from megatron_vlmr1.types import Completion, IntArray, Prompt


class Actor:
    """Everything that turns samples into completions.

    Attributes:
        directory: the Hugging Face directory that tokenizer and config come from.
        policy: the model on this mesh, its weights loaded.
        engine: generates with it.
        stop_ids: token ids that end a completion; the first is the tokenizer's own end of text.
    """

    def __init__(self, directory: Path, cfg: Config, mesh: Mesh) -> None:
        """Build the model of `directory` and load its weights.

        Raises:
            ValueError: the directory does not hold a model that this program and layout can take.
        """
        self.directory = directory
        shape = read_shape(directory)
        shape.check_layout(mesh.layout)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(directory)
        self.stop_ids = stop_token_ids(directory, self.tokenizer)
        banned = banned_token_ids(directory, self.tokenizer).tolist()
        self._processor = ImageProcessor.from_pretrained(directory, cfg.data.min_pixels, cfg.data.max_pixels)
        self._vision_tokens = VisionTokens.from_pretrained(directory)
        self._data = cfg.data
        fp8.check(cfg, shape.text)
        dtype, freeze = device.DTYPES[cfg.precision.dtype], cfg.model.freeze_vision
        self.policy = Policy(shape, mesh, dtype, banned, freeze, cfg.recompute, layers(cfg))
        self.load_weights(directory)
        self._rollout = rollout = cfg.rollout
        how: dict[str, Any] = {
            "max_cache_tokens": rollout.max_cache_tokens,
            "max_prefill_tokens": rollout.max_prefill_tokens,
            "decode_burst": rollout.decode_burst,
            "recorder": graphs.recorder(rollout.cuda_graphs),
            "quantization": rollout.quantization,
        }
        layout = decoding_layout(cfg)
        self.engine = (
            Engine(self.policy, self.text, **how)
            if layout is None
            else CopyEngine(self.policy, layout, banned, self.text, **how)
        )

    def load_weights(self, directory: Path) -> None:
        """Fill the model from another directory of the same architecture.

        Raises:
            ValueError: it does not hold this model.
        """
        weights.load(self.policy.chunks, weights.HfWeights(directory))
        self.policy.weights_changed(tower=True)

    def answers(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_finish: OnFinish | None = None
    ) -> list[tuple[Completion, ...]]:
        """Return one completion of each prompt, by the weights as they are: what is measured is what is saved."""
        with self.engine.exact():
            return self.engine.generate(prompts, 1, sampling, on_finish)

    def prompt_builder(self, template: Callable[[str], str]) -> PromptBuilder:
        """Return a builder of prompts in which `template` surrounds the question."""
        return PromptBuilder(
            self.tokenizer,
            self._processor,
            template,
            self._data.system_prompt,
            self._data.max_prompt_tokens,
            self._vision_tokens,
        )

    def sampling(self, seed: int) -> Sampling:
        """Return sampling as the config's `rollout` says, which stops where this checkpoint says."""
        cfg = self._rollout
        return Sampling(
            max_new_tokens=cfg.max_new_tokens,
            stop_ids=frozenset(self.stop_ids),
            temperature=cfg.temperature,
            seed=seed,
            repetition_penalty=cfg.repetition_penalty,
            top_k=cfg.top_k,
            top_p=cfg.top_p,
            min_p=cfg.min_p,
        )

    def greedy(self) -> Sampling:
        """Return sampling that always takes the likeliest token."""
        return Sampling(self._rollout.max_new_tokens, frozenset(self.stop_ids), greedy=True)

    def text(self, token_ids: IntArray | Sequence[int]) -> str:
        """Decode a completion; special tokens are left out."""
        return str(self.tokenizer.decode(list(map(int, token_ids)), skip_special_tokens=True))
