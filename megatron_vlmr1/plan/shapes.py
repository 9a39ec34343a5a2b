"""The numbers of a model that is planned for: any that this program trains, and plain dense text models. No torch.

A text model is never trained here; its plan is held against figures that others have published for it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import megatron_vlmr1
from megatron_vlmr1.checkpoint.locate import hf_directory
from megatron_vlmr1.config import ParallelConfig
from megatron_vlmr1.models import families
from megatron_vlmr1.models.shape import TextShape, VisionShape, VlmShape

# Plain dense decoders by their architecture: (bias of query, key and value; norms of query and key heads).
_TEXT = {
    "LlamaForCausalLM": (False, False),
    "Qwen2ForCausalLM": (True, False),
    "Qwen3ForCausalLM": (False, True),
}
_HEAD_DIM = {"Qwen3ForCausalLM": 128}  # where its config.json says nothing; else hidden_size / heads


@dataclass(frozen=True)
class PlanShape:
    """A model, as far as memory, work and time depend on it."""

    name: str  # its directory's
    text: TextShape  # of a text model without true rotary numbers, on which nothing here depends
    vision: VisionShape | None
    qkv_bias: bool
    qk_norm: bool
    vlm: VlmShape | None  # as the program reads it, where this is a model that it trains

    def check_layout(self, layout: ParallelConfig) -> None:
        """Refuse a layout that this model cannot be cut into.

        Raises:
            ValueError: naming the number that does not divide, and the nearest layouts that fit.
        """
        self.text.check_layout(layout)


def plan_shape(shape: VlmShape, name: str = "") -> PlanShape:
    """Return a vision-language model's shape as a plan takes it."""
    return PlanShape(name, shape.text, shape.vision, qkv_bias=True, qk_norm=False, vlm=shape)


def read_plan_shape(path: str | Path) -> PlanShape:
    """Read a config.json: the file, its directory, ``asset:NAME``, or a name below configs/model.

    Raises:
        ValueError: there is none, it is broken, or of an architecture that is not counted here.
    """
    directory = _directory(path)
    config = _read(directory / "config.json")
    if config.get("model_type") in families.known():
        return plan_shape(families.read_shape(directory), directory.name)
    return _text_shape(config, directory)


def _directory(path: str | Path) -> Path:
    given, shipped = Path(path), Path(megatron_vlmr1.__file__).parent / "configs" / "model"
    if given.name == "config.json" and given.is_file():
        return given.parent
    if given.parent == Path(".") and not given.exists() and (shipped / given / "config.json").is_file():
        return shipped / given
    try:
        return hf_directory(path, check=False)
    except ValueError as error:
        names = ", ".join(sorted(entry.name for entry in shipped.iterdir()))
        raise ValueError(f"{error}, or one of the shapes that came with the package: {names}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable config.json: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: not an object")
    return config


def _text_shape(config: dict[str, Any], directory: Path) -> PlanShape:
    path = directory / "config.json"
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else named
    if not isinstance(architecture, str) or architecture not in _TEXT:
        known = ", ".join([*_TEXT, *families.known()])
        raise ValueError(f"{path}: architecture {architecture!r} cannot be planned; known: {known}")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise ValueError(f"{path}: {key}=true: biases of these layers are not counted; {architecture} has none")
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        text = TextShape(
            hidden_size=hidden,
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or _HEAD_DIM.get(architecture) or hidden // heads,
            ffn_hidden_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=1e4,
            mrope_section=(1, 0, 0),
            max_positions=int(config.get("max_position_embeddings", 1 << 31)),
        )
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: missing or malformed {error}") from error
    for field in fields(text):
        value = getattr(text, field.name)
        if field.type == "int" and (type(value) is not int or value < 1):
            raise ValueError(f"{path}: {field.name}: {value!r} is not a positive whole number")
    if text.num_heads % text.num_kv_heads:
        raise ValueError(f"{path}: {text.num_kv_heads} key/value heads do not divide {text.num_heads} attention heads")
    bias, norm = _TEXT[architecture]
    return PlanShape(directory.name, text, None, qkv_bias=bias, qk_norm=norm, vlm=None)
