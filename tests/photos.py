"""Real photographs, from the packages that ship some."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import matplotlib
from PIL import Image

_SKIMAGE = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "camera.png")


@functools.cache
def photographs() -> tuple[Image.Image, ...]:
    """Return six photographs of scikit-image and one of matplotlib, RGB, of 500 pixels a side or so."""
    found = importlib.util.find_spec("skimage")  # its files are enough: an import would need scipy
    assert found is not None and found.origin is not None, "scikit-image is missing: it is in the extra [test]"
    paths = [Path(found.origin).parent / "data" / name for name in _SKIMAGE]
    paths.append(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg")
    return tuple(Image.open(path).convert("RGB") for path in paths)
