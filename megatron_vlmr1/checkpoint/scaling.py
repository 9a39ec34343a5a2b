"""What FP8's delayed scaling remembers: the scale of each tensor, and the largest values of its last passes.

Transformer Engine keeps them in its modules' `fp8_meta`, and offers them as an extra state that is a pickle; that is
neither written nor read here. Ranks write the numbers as tensors, each its own, since data-parallel ranks see other
values. They are read on the same layout only; on another one, scaling begins anew and settles within
`precision.amax_history_len` passes. The other recipes remember nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from megatron_vlmr1.parallel.mesh import Mesh

_DIRECTIONS = ("scaling_fwd", "scaling_bwd")
_PARTS = ("scale", "amax_history")
_FORWARD_TENSORS = 3  # of a matrix product, which has so many columns in its history: input, weight, output


def path(directory: Path, rank: int) -> Path:
    """Return the file of a rank."""
    return directory / f"fp8_{rank:05d}.safetensors"


def remembered(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Return copies in host memory, by module, direction and part; {} before a pass, or with another recipe."""
    return {
        f"{name}.{direction}.{part}": getattr(state, part).detach().cpu().clone()
        for name, module in _modules(chunks)
        for direction in _DIRECTIONS
        if hasattr(state := module.fp8_meta.get(direction), "amax_history")
        for part in _PARTS
    }


def write(tensors: dict[str, torch.Tensor], mesh: Mesh, file: Path) -> list[Path]:
    """Write what `remembered` returned; return the file."""
    file.write_bytes(safetensors_bytes(tensors, {"layout": _layout(mesh)}))
    return [file]


def restore(chunks: Sequence[torch.nn.Module], mesh: Mesh, file: Path, recipe: Callable[[], Any]) -> bool:
    """Give modules that have not run yet what was saved; return whether all of it fitted, else nothing is changed.

    Args:
        chunks: of this rank.
        mesh: the layout.
        file: of this rank.
        recipe: returns Transformer Engine's recipe.

    Raises:
        ValueError: the file is damaged.
    """
    if not file.is_file():
        return False
    try:
        with safe_open(file, framework="pt") as opened:
            same = (opened.metadata() or {}).get("layout") == _layout(mesh)
            saved = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from error
    found = [(name, module) for name, module in _modules(chunks) if f"{name}.scaling_fwd.scale" in saved]
    expected = {f"{name}.{way}.{part}" for name, _ in found for way in _DIRECTIONS for part in _PARTS}
    if not same or not saved or saved.keys() != expected:
        return False
    made = recipe()
    if any(len(tensor) != made.amax_history_len for name, tensor in saved.items() if name.endswith("amax_history")):
        return False
    for name, module in found:
        _fill(name, module, saved, made)
    return True


@torch.no_grad()
def _fill(name: str, module: Any, saved: dict[str, torch.Tensor], recipe: Any) -> None:
    module.fp8_meta["recipe"] = recipe
    module.fp8_meta["num_gemms"] = saved[f"{name}.scaling_fwd.scale"].numel() // _FORWARD_TENSORS
    module.init_fp8_meta_tensors(recipe)
    for direction in _DIRECTIONS:
        for part in _PARTS:
            getattr(module.fp8_meta[direction], part).copy_(saved[f"{name}.{direction}.{part}"])


def _modules(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, Any]]:
    for i, chunk in enumerate(chunks):
        for name, module in chunk.named_modules():
            if isinstance(getattr(module, "fp8_meta", None), dict):
                yield f"chunk_{i}.{name}", module


def _layout(mesh: Mesh) -> str:
    return json.dumps({"rank": mesh.rank, **mesh.describe()}, sort_keys=True)
