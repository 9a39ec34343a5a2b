"""What two ranks do: megatron-core itself loads what we exported, and saves what we shall import."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_vlmr1.checkpoint.background import Writes
from megatron_vlmr1.checkpoint.sharded import Sharded
from megatron_vlmr1.checkpoint.weights import HfWeights, load
from megatron_vlmr1.config import ParallelConfig, RecomputeConfig
from megatron_vlmr1.models.families import read_shape
from megatron_vlmr1.models.vlm import VlmModel, build_chunks
from megatron_vlmr1.parallel import mesh as meshes
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.runtime import distributed, seeds

PREFIX = "language_model."
KINDS = ("odd", "tied")
LAYOUTS = {
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "pp2": ParallelConfig(pipeline_model_parallel_size=2, pipeline_layers=[4, 3]),
}
WAYS: dict[str, dict[str, Any]] = {
    "stacked": {},
    "numbered": {"non_homogeneous_layers": True},
    "halves": {"singleton_local_shards": True},  # gate and up are two tensors
}


def everything(root: Path) -> None:
    """All kinds of checkpoints on all layouts."""
    for name, layout in LAYOUTS.items():
        with laid_out(layout) as mesh:
            for kind in KINDS:
                chunks = build_chunks(read_shape(root / kind), mesh, torch.bfloat16, RecomputeConfig())
                load(chunks, HfWeights(root / kind))
                different = loaded_by_megatron(chunks[0], root / f"{kind}_megatron" / "release")
                (root / f"different_{name}_{kind}_{mesh.rank}.json").write_text(json.dumps(different))
                for way in WAYS:
                    save(chunks[0], root / f"saved_{name}_{kind}_{way}", WAYS[way], way == "stacked")


@contextmanager
def laid_out(layout: ParallelConfig) -> Iterator[Mesh]:
    """Lay the joined ranks out, and forget the groups afterwards."""
    try:
        mesh = meshes.build(layout)
        seeds.seed_everything(0)
        yield mesh
    finally:
        meshes.destroy()


def loaded_by_megatron(chunk: VlmModel, directory: Path) -> list[str]:
    """Return the parameters that `dist_checkpointing.load` fills with other numbers than our own reader did."""
    own = {name: parameter.detach().clone() for name, parameter in chunk.named_parameters()}
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.fill_(7.0)
    state = {"model": chunk.language.sharded_state_dict(prefix=PREFIX), "tower": tower(chunk)}
    found = dist_checkpointing.load(state, str(directory))
    words = {name.removeprefix(PREFIX): value for name, value in found["model"].items()}
    chunk.language.load_state_dict(words, strict=True)
    pictures = found.get("tower", {})
    assert chunk.vision is None or len(pictures) > 50
    for name, value in pictures.items():
        chunk.vision.get_parameter(name).data.copy_(value)  # type: ignore[union-attr]
    return [name for name, parameter in chunk.named_parameters() if not torch.equal(parameter, own[name])]


def save(chunk: VlmModel, directory: Path, metadata: dict[str, Any], by_megatron: bool) -> None:
    """Save the model as megatron-core does, by its own writer or by ours."""
    words = chunk.language.sharded_state_dict(prefix=PREFIX, metadata={**metadata, "dp_cp_group": chunk.mesh.dp_group})
    state = {"model": words, "tower": tower(chunk), "iteration": 7}
    if dist.get_rank() == 0:
        directory.mkdir()
    dist.barrier()
    if by_megatron:
        dist_checkpointing.save(state, str(directory))
    else:
        writes = Writes(directory, later=False)
        ours = Sharded(state, directory, writes, None)
        writes.start()
        assert writes.wait()[0] == ""
        results = distributed.gathered(ours.results)
        distributed.together(lambda: ours.finish(results), only_first=True)
    dist.barrier()


def tower(chunk: VlmModel) -> dict[str, ShardedTensor]:
    """Return the tower, which every tensor-parallel rank holds whole."""
    named = [] if chunk.vision is None else chunk.vision.named_parameters()
    replica = (0, chunk.mesh.tp_rank, chunk.mesh.dp_rank)
    return {
        name: ShardedTensor.from_rank_offsets(f"visual.{name}", value.detach(), replica_id=replica)
        for name, value in named
    }
