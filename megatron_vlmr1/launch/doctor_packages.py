"""Python and the packages, against the ranges of setup.cfg as the installed distribution repeats them.

Imports none of them before it has looked: they may be what is broken.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator
from importlib import metadata

from megatron_vlmr1.launch.doctor_line import Line
from megatron_vlmr1.launch.versions import DISTRIBUTION, installed, nccl_version
from megatron_vlmr1.telemetry import nvml

_EXTRAS = {
    "cuda": "FP8 and fused kernels",
    "wandb": "logging to Weights & Biases",
    "parquet": "shards from parquet files",
    "debug": "Python stacks of a rank that hangs in native code",
    "demo": "the easy-VQA data set",
}


def lines() -> list[Line]:
    """Look at Python, the packages, and whether torch and megatron-core can be imported."""
    try:
        ours = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return [Line(DISTRIBUTION, "bad", "is not installed", "pip install -e . in its checkout"), *_imports()]
    if not installed("packaging"):
        return [Line("packaging", "bad", "is not installed", "pip install packaging"), *_imports()]
    return [_python(ours.metadata["Requires-Python"] or ""), *_requirements(ours.requires or []), *_imports()]


def _python(wanted: str) -> Line:
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Line("Python", "ok", version)
    return Line("Python", "bad", f"{version}, not {wanted}", "make the virtual environment anew with another Python")


def _requirements(texts: list[str]) -> Iterator[Line]:
    """One line for all that is needed and well, one for each that is not, one for each extra."""
    from packaging.requirements import Requirement

    needed = [Requirement(text) for text in texts]
    base = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = [(r, installed(r.name)) for r in base if not _fits(r)]
    for requirement, version in wrong:
        found = f"{version}, not {requirement.specifier}" if version else "is not installed"
        yield Line(requirement.name, "bad", found, f"pip install '{requirement.name}{requirement.specifier}'")
    yield Line("packages", "ok", f"{len(base) - len(wrong)} of {len(base)} in the range of setup.cfg")
    for extra, purpose in _EXTRAS.items():
        if extra == "cuda":
            continue  # has a line of its own, since it may be wrong to have it
        own = [r for r in needed if r not in base and r.marker and r.marker.evaluate({"extra": extra})]
        if not own:  # an installation of another version, which has no such extra
            continue
        lacking = [r.name for r in own if not _fits(r)]
        do = f"for {purpose}: pip install '{DISTRIBUTION}[{extra}]'"
        if lacking:
            yield Line(f"extra {extra}", "missing", ", ".join(lacking), do)
        else:
            yield Line(f"extra {extra}", "ok", ", ".join(f"{r.name} {installed(r.name)}" for r in own))


def _fits(requirement: object) -> bool:
    from packaging.requirements import Requirement

    assert isinstance(requirement, Requirement)
    version = installed(requirement.name)
    return bool(version) and requirement.specifier.contains(version, prereleases=True)


def _imports() -> Iterator[Line]:
    """Import what everything stands on; Transformer Engine never where there is no CUDA, which it would break."""
    yield (torch := _imported("torch"))
    if torch.state == "bad":
        return
    import torch as library

    has_cuda = library.cuda.is_available()
    yield _cuda(has_cuda, library.version.cuda or "")
    yield _transformer_engine(has_cuda)
    apex = importlib.util.find_spec("amp_C") is not None  # NVIDIA's kernels; `apex` of PyPI is another project
    yield Line("apex", "ok" if apex else "missing", "NVIDIA's kernels", "" if apex else _APEX)
    yield Line("Adam", "ok", _adam(has_cuda, apex))
    if has_cuda or importlib.util.find_spec("transformer_engine") is None:
        yield _imported("megatron.core")


def _adam(has_cuda: bool, apex: bool) -> str:
    """Return which one megatron-core takes: the first that it can import."""
    if has_cuda and importlib.util.find_spec("transformer_engine") is not None:
        return "Transformer Engine's, fused"
    return "apex's, fused" if apex else "torch's"


_APEX = "nothing on a CPU; on GPUs fused Adam is quicker: use NVIDIA's PyTorch image (Dockerfile)"


def _cuda(has_cuda: bool, built_for: str) -> Line:
    driver = nvml.driver_version()
    if has_cuda:
        return Line("CUDA", "ok", f"{built_for}, driver {driver or 'unknown'}, NCCL {nccl_version() or 'missing'}")
    if not built_for:
        do = "install a torch with CUDA" if driver else "nothing, if this machine has no GPU"
        return Line("CUDA", "missing", f"torch is built without{f', driver {driver}' if driver else ''}", do)
    do = "install a driver that knows this CUDA, or look at CUDA_VISIBLE_DEVICES"
    return Line(
        "CUDA", "missing", f"torch is built for {built_for}; {f'driver {driver}' if driver else 'no driver'}", do
    )


def _transformer_engine(has_cuda: bool) -> Line:
    there = importlib.util.find_spec("transformer_engine") is not None
    version = installed("transformer-engine") if there else ""
    if there and not has_cuda:
        do = "pip uninstall transformer-engine: it breaks megatron-core where there is no CUDA"
        return Line("Transformer Engine", "bad", f"{version} on a machine without CUDA", do)
    if there:
        return Line("Transformer Engine", "ok", version)
    do = f"pip install --no-build-isolation '{DISTRIBUTION}[cuda]'" if has_cuda else "nothing, without CUDA"
    return Line("Transformer Engine", "missing", "for FP8 and fused kernels", do)


def _imported(name: str) -> Line:
    try:
        version = _IMPORTS[name]()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return Line(f"import {name}", "bad", " ".join(f"{type(error).__name__}: {error}".split())[:300], "reinstall it")
    return Line(f"import {name}", "ok", version)


def _torch() -> str:
    import torch

    return str(torch.__version__)


def _megatron() -> str:
    from megatron_vlmr1.runtime import device

    device.prepare_megatron()
    import megatron.core

    return str(megatron.core.__version__)


_IMPORTS = {"torch": _torch, "megatron.core": _megatron}
