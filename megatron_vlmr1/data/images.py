"""Compressed images to the vision tower's patches, bit for bit as transformers' PIL processor for Qwen2-VL makes them.

numpy and Pillow only. Images are hostile input: only JPEG, PNG and WebP are opened, and the number of pixels is read
from the header before anything is decoded.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from megatron_vlmr1.types import FloatArray, ImagePatches

MAX_PIXELS = 64_000_000
MAX_ASPECT_RATIO = 200
SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_ORIENTATION = 0x0112  # EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = (5, 6, 7, 8)


def header(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int, str]:
    """Return (width, height, "JPEG" | "PNG" | "WEBP") as the file states them, without decoding pixels.

    Raises:
        ValueError: not such an image, or more than `max_pixels` pixels.
    """
    with _open(data, max_pixels) as image:
        return image.width, image.height, _format(image)


def upright_header(data: bytes | BinaryIO, max_pixels: int = MAX_PIXELS) -> tuple[int, int, str]:
    """Return what `header` does, with width and height of the picture once EXIF orientation is applied.

    Of a file only the header is read, and what a PNG says behind its pixels is not.

    Raises:
        ValueError: as `header`.
    """
    with _open(data, max_pixels) as image:
        known = image.format != "PNG" or "exif" in image.info  # else Pillow would decode it to look for more
        turned = known and _orientation(image) in _ON_ITS_SIDE
        width, height = (image.height, image.width) if turned else (image.width, image.height)
        return width, height, _format(image)


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode to upright RGB: EXIF orientation applied, transparency over white, 16 bits cut to 8, first frame only.

    Raises:
        ValueError: as `header`, or the data cannot be decoded.
    """
    with _open(data, max_pixels) as image:
        try:
            image.load()
            turn = _TURNS.get(_orientation(image))
            rgb = _to_rgb(image)
            return rgb if turn is None else rgb.transpose(turn)
        except Exception as error:  # decoders raise what they like on hostile bytes
            raise ValueError(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from error


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return (height, width) as multiples of `factor`, near the image's shape and with an area within the bounds.

    The rule of Qwen2-VL's image processor: sides are rounded (half to even); where the area then leaves the bounds,
    both are scaled by the same factor and rounded into the bounds.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"{width} x {height}: one side is more than {MAX_ASPECT_RATIO} times the other")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


@dataclass(frozen=True)
class ImageProcessor:
    """Resizes, normalises and cuts images. Defaults are those that transformers gives missing keys."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    patch_size: int = 14
    merge_size: int = 2
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: float = 1 / 255
    resample: int = Image.Resampling.BICUBIC

    def __post_init__(self) -> None:
        for name in ("min_pixels", "max_pixels", "patch_size", "merge_size"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        if self.patch_size % 2:
            raise ValueError(f"patch_size must be even, not {self.patch_size}")
        for name in ("image_mean", "image_std"):
            if len(value := getattr(self, name)) != 3 or not all(isinstance(part, int | float) for part in value):
                raise ValueError(f"{name} must be three numbers, not {value!r}")
        if min(self.image_std) <= 0 or not isinstance(self.rescale_factor, int | float):
            raise ValueError(
                f"image_std {self.image_std!r} and rescale_factor {self.rescale_factor!r} must be positive"
            )
        Image.Resampling(self.resample)  # raises on what is none
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is more than max_pixels {self.max_pixels}")

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> ImageProcessor:
        """Read preprocessor_config.json of a Hugging Face directory; the pixel bounds given here override its own.

        Raises:
            ValueError: the file is missing or broken, or asks for what is not done here.
        """
        path = Path(directory) / "preprocessor_config.json"
        try:
            raw = json.loads(path.read_bytes())
            return cls(**_settings(raw, min_pixels, max_pixels))
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def token_bytes(self) -> int:
        """Bytes of the patches that one image token stands for."""
        return 4 * 3 * (self.patch_size * self.merge_size) ** 2

    def table(self) -> FloatArray:
        """Return the normalised value of each byte: [3, 256].

        With the same roundings as transformers: product in float64, then float32 throughout.
        """
        scaled = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean, std = np.array(self.image_mean, np.float32), np.array(self.image_std, np.float32)
        return (scaled[None] - mean[:, None]) / std[:, None]

    def process(self, data: bytes, pixel_cap: int = MAX_PIXELS) -> ImagePatches:
        """Decode, resize, normalise and cut one compressed image.

        Returns:
            patches float32 [grid_h * grid_w, 3, patch_size**2], in Hugging Face's order: blocks of
            merge_size x merge_size patches row by row, patches within a block row by row.

        Raises:
            ValueError: as `decode` and `smart_resize`.
        """
        image = decode(data, pixel_cap)
        height, width = smart_resize(
            image.height, image.width, self.patch_size * self.merge_size, self.min_pixels, self.max_pixels
        )
        resized = image.resize((width, height), self.resample)
        grid = (1, height // self.patch_size, width // self.patch_size)
        patches = self._cut(resized, grid[1], grid[2])
        return ImagePatches(patches, grid, image.size, hashlib.sha256(data).digest())

    @functools.cached_property
    def _pairs(self) -> list[np.ndarray[Any, np.dtype[np.complex64]]]:
        """Per channel, the two values of each two neighbouring bytes: one look-up for both."""
        pairs = np.empty((3, 1 << 16, 2), np.float32)
        neighbours = np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2)
        for made, values in zip(pairs, self.table(), strict=True):
            made[:] = values[neighbours]
        return list(pairs.view(np.complex64)[:, :, 0])

    def _cut(self, image: Image.Image, grid_h: int, grid_w: int) -> FloatArray:
        merge, patch = self.merge_size, self.patch_size
        blocks = (grid_h // merge, grid_w // merge, merge, merge)
        out = np.empty((*blocks, 3, patch * patch // 2), np.complex64)
        for channel, (band, pairs) in enumerate(zip("RGB", self._pairs, strict=True)):
            # [block rows, merge_h, patch_h, block columns, merge_w] of a patch's row of bytes
            plane = np.frombuffer(image.tobytes("raw", band), f"V{patch}")
            plane = plane.reshape(blocks[0], merge, patch, blocks[1], merge).transpose(0, 3, 1, 4, 2)
            pixels = np.ascontiguousarray(plane).view(np.uint16).reshape(*blocks, -1)
            for row, made in zip(pixels, out, strict=True):  # a row of blocks stays in the processor's cache
                # mode: no pair is out of range, and not to look is quicker
                made[:, :, :, channel] = pairs.take(row, mode="clip")
        return out.view(np.float32).reshape(grid_h * grid_w, 3, -1)


def pixel_values(image: ImagePatches, frames: int = 2) -> FloatArray:
    """Return what transformers calls so, a still's frame repeated: [grid_h * grid_w, 3 * frames * patch_size**2]."""
    return np.repeat(image.patches[:, :, None], frames, 2).reshape(len(image.patches), -1)


def _settings(raw: dict[str, Any], min_pixels: int | None, max_pixels: int | None) -> dict[str, Any]:
    for key in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if raw.get(key, True) is False:
            raise ValueError(f"{key}=false is not supported")
    size = raw.get("size") or {}
    found = {
        "min_pixels": min_pixels or raw.get("min_pixels") or size.get("shortest_edge"),
        "max_pixels": max_pixels or raw.get("max_pixels") or size.get("longest_edge"),
        "image_mean": tuple(raw.get("image_mean") or ()) or None,
        "image_std": tuple(raw.get("image_std") or ()) or None,
    }
    for key in ("patch_size", "merge_size", "rescale_factor", "resample"):
        found[key] = raw.get(key)
    return {key: value for key, value in found.items() if value is not None}


def _open(data: bytes | BinaryIO, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures (our own cap is checked below) and of broken EXIF
            image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=tuple(SUFFIXES))
    except UnidentifiedImageError as error:
        raise ValueError("not a JPEG, PNG or WebP image") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"more than the {max_pixels} pixels allowed") from error
    except Exception as error:  # header parsers raise what they like on hostile bytes
        raise ValueError(f"its header cannot be read: {error}") from error
    if image.width * image.height > max_pixels:
        raise ValueError(f"{image.width} x {image.height} is more than the {max_pixels} pixels allowed")
    return image


def _format(image: Image.Image) -> str:
    # A JPEG that holds several pictures calls itself MPO.
    return "JPEG" if image.format == "MPO" else str(image.format)


def _orientation(image: Image.Image) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a broken EXIF block says nothing about the pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: the upper byte, as Pillow itself takes it from 16-bit colour
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
