"""A config from a YAML file and dotted overrides, and back to YAML."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from megatron_vlmr1.config.data import MIXTURE, ONE_SET, SourceConfig
from megatron_vlmr1.config.section import Section
from megatron_vlmr1.config.settings import Config

_S = TypeVar("_S", bound=Section)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply dotted overrides, validate.

    Raises:
        ValueError: one line naming the file and the key, with the nearest known key for a typo.
    """
    return load_section(Config, path, overrides)


def load_section(kind: type[_S], path: str | Path, overrides: Sequence[str] = ()) -> _S:
    """Read a YAML file that holds one section of any kind; as `load`.

    Raises:
        ValueError: one line naming the file and the key, with the nearest known key for a typo.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such config file")
    try:
        raw = merged(OmegaConf.load(path), overrides)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable config: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: a config is a mapping of sections")
    return parse_section(kind, {str(key): value for key, value in raw.items()}, str(path))


# Sections in whose place a plain word may stand, and the key that it is of.
_WORDS = {"precision": "dtype"}


def merged(base: Any, overrides: Sequence[str]) -> Any:
    """Return a mapping with dotted overrides laid over it, references resolved.

    A plain word in place of a section is written out first: it is one of the section's keys, and the others stay.

    Raises:
        OmegaConfBaseException: something does not parse or resolve.
    """
    given = OmegaConf.create(base)
    written = []
    for override in overrides:
        key, equals, value = override.partition("=")
        plain = key in _WORDS and not value.lstrip().startswith("{")
        written.append(f"{key}.{_WORDS[key]}{equals}{value}" if plain else override)
    for key, inner in _WORDS.items():
        if OmegaConf.is_dict(given) and isinstance(given.get(key), str):
            given[key] = {inner: given[key]}
    return OmegaConf.to_container(OmegaConf.merge(given, OmegaConf.from_dotlist(written)), resolve=True)


def parse(raw: dict[str, Any], origin: str) -> Config:
    """Validate a nested dict; `origin` names it in errors.

    Raises:
        ValueError: one line with the first few problems.
    """
    return parse_section(Config, raw, origin)


def parse_section(kind: type[_S], raw: dict[str, Any], origin: str) -> _S:
    """Validate one section alone, as `parse` does a whole config.

    Raises:
        ValueError: one line with the first few problems.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        problems = [_explain(kind, e["loc"], e["type"], e["msg"]) for e in error.errors()]
        raise ValueError(f"{origin}: " + "; ".join(problems[:3])) from error


def parse_saved(raw: dict[str, Any], origin: str) -> tuple[Config, list[str]]:
    """Validate a nested dict that another version of this program may have saved.

    Keys that it did not have get their defaults; keys that are not known here are left out.

    Returns:
        (the config, the dotted names of what was left out).

    Raises:
        ValueError: as `parse`.
    """
    left_out: list[str] = []
    return parse(_known(raw, Config, "", left_out), origin), left_out


def _known(raw: dict[str, Any], section: type[Section], prefix: str, left_out: list[str]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in section.model_fields:
            left_out.append(prefix + key)
            continue
        inner = section.model_fields[key].annotation
        if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, Section):
            value = _known(value, inner, f"{prefix}{key}.", left_out)
        kept[key] = value
    return kept


def dump(config: Config) -> str:
    """Return the resolved config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def flat(config: Config) -> dict[str, Any]:
    """Return every setting by its dotted name."""
    return _flat(config.model_dump(mode="json"), "")


def _flat(nested: dict[str, Any], prefix: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in nested.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def _explain(root: type[Section], loc: tuple[int | str, ...], kind: str, message: str) -> str:
    loc = tuple(part for part in loc if part not in (ONE_SET, MIXTURE))
    key = ".".join(str(part) for part in loc)
    if kind != "extra_forbidden":
        message = message.removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    section: Any = root
    for part in loc[:-1]:
        section = SourceConfig if isinstance(part, int) else _section(section.model_fields[part].annotation)
    near = difflib.get_close_matches(str(loc[-1]), section.model_fields, n=1, cutoff=0.5)
    return f"unknown key {key}" + (f"; did you mean {'.'.join(str(p) for p in (*loc[:-1], near[0]))}?" if near else "")


def _section(annotation: Any) -> Any:
    """The kind of section in `annotation`, which may allow None too."""
    return next((kind for kind in get_args(annotation) if kind is not type(None)), annotation)
