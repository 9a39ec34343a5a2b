"""A rank's life: join, build the mesh, leave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_vlmr1.config import ParallelConfig
from megatron_vlmr1.parallel import mesh as meshes
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.runtime import device, distributed
from megatron_vlmr1.runtime.seeds import seed_everything


@contextmanager
def joined(cfg: ParallelConfig, seed: int) -> Iterator[Mesh]:
    """Join the job that the environment describes and build the groups; leave it when the block ends well.

    After an error the process group is left as it is: leaving in good order would wait for ranks that may be gone.

    Raises:
        ValueError: the number of ranks does not fit the layout.
    """
    device.prepare_megatron()
    distributed.start(cfg.timeout_s)
    mesh = meshes.build(cfg)
    seed_everything(seed)
    yield mesh
    meshes.destroy()
    distributed.stop()
