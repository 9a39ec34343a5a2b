"""Loading megatron-core's checkpoints without running anybody's code.

Their metadata is a pickle, and so are small objects among the tensors. Metadata is read here first, by an unpickler
that knows an allow-list of plain classes; everything else goes through `torch.load`, which is held to its own.
"""

from __future__ import annotations

import io
import os
import pickle  # noqa: S403 - restricted below
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"

# Classes of torch's distributed checkpoint metadata: plain records, whose making runs no code of the file's choice.
_ALLOWED = {
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "pathlib": {"PosixPath"},  # megatron-core's own writer names the directory that it wrote
    "torch": {"Size", "bfloat16", "bool", "float16", "float32", "float64", "int32", "int64", "uint8"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.serialization": {"_get_layout"},
}


_Python: Any = pickle._Unpickler  # type: ignore[attr-defined]  # the one in C lets nobody look at a single step


class _Restricted(_Python):  # type: ignore[misc]
    def load_build(self) -> None:
        """Set a record's fields, but never those of a class, which would change the program itself."""
        if type(self.stack[-2]).__module__ not in _ALLOWED:
            raise ValueError("sets attributes of something that is no record")
        super().load_build()

    dispatch = {**_Python.dispatch, pickle.BUILD[0]: load_build}

    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module == "pathlib._local" else module  # its name in Python 3.13
        if name not in _ALLOWED.get(module, ()):
            raise ValueError(f"asks for {module}.{name}")
        return super().find_class(module, name)


def read_metadata(directory: Path) -> Any:
    """Read the metadata of a megatron-core checkpoint. Its attributes may be anything: only their classes are known.

    Raises:
        ValueError: the metadata names a class outside the allow-list, or is no pickle; nothing was built.
    """
    path = directory / ".metadata"
    try:
        return _Restricted(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError as error:
        raise ValueError(f"{path}: not found; not a megatron-core checkpoint") from error
    except Exception as error:  # a hostile or damaged pickle may raise anything
        raise ValueError(f"{path}: refused before loading: {error}") from error


@contextmanager
def guarded(directory: Path) -> Iterator[Any]:
    """Check the metadata of a megatron-core checkpoint and yield it; `torch.load` builds known types only meanwhile.

    Raises:
        ValueError: the metadata names a class outside the allow-list, or is no pickle; nothing was built.
    """
    metadata = read_metadata(directory)
    former = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        yield metadata
    finally:
        if former is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = former
