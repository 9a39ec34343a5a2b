"""Samples to prompts: the checkpoint's chat template around the task's text, images as runs of image tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_vlmr1.data.images import ImageProcessor
from megatron_vlmr1.data.rows import METHOD
from megatron_vlmr1.data.tokens import VisionTokens, encode
from megatron_vlmr1.models.mrope import mrope_positions
from megatron_vlmr1.types import Damage, ImagePatches, IntArray, Prompt, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private-use characters: no template writes them.
_STAND_IN = "\ue000user text\ue001"
_SYSTEM_STAND_IN = "\ue000system text\ue001"


class PromptBuilder:
    """Builds prompts of one user turn: images first, then the text.

    The text is the user's and cannot forge an image or a turn, nor can the system prompt: the template is rendered
    around stand-ins, and what lies between the template's own special tokens on both sides of one is tokenised with
    special tokens disarmed. Special tokens are boundaries to the tokenizer, so harmless text gets exactly the ids of
    the whole rendered string.

    Args:
        tokenizer: the checkpoint's, with its chat template.
        image_processor: the checkpoint's.
        template: makes the task's text of a question.
        system_prompt: content of a system turn; the chat template's own behaviour when None.
        max_prompt_tokens: a longer prompt becomes `Damage`, marked `too_long`.
        spec: the checkpoint's vision tokens.

    Raises:
        ValueError: tokenizer, processor and config.json of the checkpoint do not fit together.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: ImageProcessor,
        template: Callable[[str], str],
        system_prompt: str | None,
        max_prompt_tokens: int,
        spec: VisionTokens,
    ) -> None:
        if image_processor.merge_size != spec.spatial_merge_size:
            raise ValueError(
                f"preprocessor_config.json: merge_size {image_processor.merge_size} differs from "
                f"spatial_merge_size {spec.spatial_merge_size} of config.json"
            )
        self._tokenizer, self._processor, self._template = tokenizer, image_processor, template
        self._system_prompt, self._max_tokens, self._spec = system_prompt, max_prompt_tokens, spec
        self._specials = _special_tokens(tokenizer, spec)
        self._frames: dict[int, tuple[list[int], str, str, list[int]]] = {}

    @property
    def largest_bytes(self) -> int:
        """Bytes of all patches of one prompt, at most."""
        return self._max_tokens * self._processor.token_bytes

    def build(self, position: int, sample: Sample) -> Prompt | Damage:
        """Return the prompt of `sample`, or why there is none (its shard is left empty: a sample knows no shard).

        Raises:
            ValueError: the chat template does not render what it must.
        """
        try:
            text = self._template(sample.question)
            text.encode()  # a lone surrogate cannot be tokenised
            images = tuple(self._processor.process(data) for data in sample.images)
        except ValueError as error:
            return Damage("", sample.key, f"image or text refused: {error}")
        token_ids = self._token_ids(text, images)
        if len(token_ids) > self._max_tokens:
            reason = f"prompt of {len(token_ids)} tokens is longer than data.max_prompt_tokens={self._max_tokens}"
            return Damage("", sample.key, reason, too_long=True)
        spec = self._spec
        features = sum(len(image.patches) // spec.spatial_merge_size**2 for image in images)  # rows that a tower makes
        assert np.count_nonzero(token_ids == spec.image_token_id) == features, f"{sample.key}: {features} features"
        grids = [image.grid_thw for image in images]
        positions = mrope_positions(token_ids, grids, spec.image_token_id, spec.spatial_merge_size)
        method = sample.extra.get(METHOD)
        accuracy = method if isinstance(method, str) else None
        return Prompt(position, sample.key, token_ids, positions, images, sample.question, sample.solution, accuracy)

    def _token_ids(self, text: str, images: tuple[ImagePatches, ...]) -> IntArray:
        head, before, after, tail = self._frame(len(images))
        ids = np.array([*head, *encode(self._tokenizer, before + text + after, plain=True), *tail], np.int64)
        repeats = np.ones(len(ids), np.int64)
        repeats[ids == self._spec.image_token_id] = [
            height * width // self._spec.spatial_merge_size**2 for _, height, width in (i.grid_thw for i in images)
        ]
        return np.repeat(ids, repeats)

    def _frame(self, images: int) -> tuple[list[int], str, str, list[int]]:
        """Return what surrounds the text: ids up to a special token, plain text; plain text, ids from the next one."""
        if images not in self._frames:
            rendered = self._render(images)
            before, _, after = rendered.partition(_STAND_IN)
            cut, end = self._last_special(before), self._first_special(after)
            head, tail = self._framing_ids(before[:cut]), self._framing_ids(after[end:])
            found = (head + tail).count(self._spec.image_token_id)
            if rendered.count(_STAND_IN) != 1 or found != images:
                raise ValueError(
                    f"the checkpoint's chat template renders {images} images and one text as {found} image tokens "
                    f"and {rendered.count(_STAND_IN)} texts"
                )
            system = self._system_prompt or ""
            left, right = (text.replace(_SYSTEM_STAND_IN, system) for text in (before[cut:], after[:end]))
            self._frames[images] = head, left, right, tail
        return self._frames[images]

    def _framing_ids(self, rendered: str) -> list[int]:
        """Tokenise what the template made around the user's text, with the system prompt for its stand-in."""
        before, stand_in, after = rendered.partition(_SYSTEM_STAND_IN)
        if not stand_in:
            return encode(self._tokenizer, rendered, plain=False)
        cut, end = self._last_special(before), self._first_special(after)
        plain = f"{before[cut:]}{self._system_prompt}{after[:end]}"
        return [
            *encode(self._tokenizer, before[:cut], plain=False),
            *encode(self._tokenizer, plain, plain=True),
            *encode(self._tokenizer, after[end:], plain=False),
        ]

    def _last_special(self, text: str) -> int:
        """Return where the last special token ends; 0 without one."""
        return max((text.rfind(token) + len(token) for token in self._specials if token in text), default=0)

    def _first_special(self, text: str) -> int:
        """Return where the first special token begins; the text's length without one."""
        return min((text.find(token) for token in self._specials if token in text), default=len(text))

    def _render(self, images: int) -> str:
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": _STAND_IN}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self._system_prompt is not None:
            messages.insert(0, {"role": "system", "content": _SYSTEM_STAND_IN})
        if not self._tokenizer.chat_template:
            raise ValueError("the checkpoint's tokenizer has no chat template")
        rendered = str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        if rendered.count(_SYSTEM_STAND_IN) != len(messages) - 1:
            times = rendered.count(_SYSTEM_STAND_IN)
            raise ValueError(f"the checkpoint's chat template renders data.system_prompt {times} times, not once")
        return rendered


def _special_tokens(tokenizer: PreTrainedTokenizerBase, spec: VisionTokens) -> tuple[str, ...]:
    added = tokenizer.added_tokens_decoder
    specials = {i: token.content for i, token in added.items() if token.special}
    if lost := spec.ids - specials.keys():
        raise ValueError(f"vision tokens {sorted(lost)} of config.json are not special tokens of the tokenizer")
    for i, token in specials.items():
        if i in encode(tokenizer, token, plain=True):
            raise ValueError(f"the tokenizer cannot disarm {token!r} in a user's text")
    return tuple(specials.values())
