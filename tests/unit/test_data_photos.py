"""Pictures as cameras and programs write them: bits equal to transformers' PIL processor on real photographs."""

from __future__ import annotations

import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers import Qwen2VLImageProcessorPil

from megatron_vlmr1.data.images import ImageProcessor, decode, header, pixel_values
from tests.photos import photographs
from tests.tiny import compressed, plain_png

BOUNDS = ({}, {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 60})


def assert_equal_to_transformers(data: bytes, picture: Image.Image, **bounds: int) -> None:
    """Compare what we make of a file with what transformers makes of the decoded, upright picture."""
    theirs = Qwen2VLImageProcessorPil(**bounds)(images=[picture], return_tensors="np")
    ours = ImageProcessor(**bounds).process(data)
    assert pixel_values(ours).dtype == theirs["pixel_values"].dtype == np.float32
    assert np.array_equal(pixel_values(ours), theirs["pixel_values"]), picture.size
    assert list(ours.grid_thw) == theirs["image_grid_thw"][0].tolist()
    assert ours.size == picture.size


def test_two_hundred_crops_of_photographs() -> None:
    rng = np.random.default_rng(6)
    sides = []
    for number in range(200):
        photo = photographs()[number % len(photographs())]
        # A third with a side of a few pixels, which rounds to nothing; none beyond 200 : 1.
        smallest = 1 if number % 3 == 0 else 10
        width, height = (int(np.exp(rng.uniform(np.log(smallest), np.log(limit)))) for limit in photo.size)
        width, height = min(width, 200 * height), min(height, 200 * width)
        x, y = int(rng.integers(photo.width - width + 1)), int(rng.integers(photo.height - height + 1))
        crop = photo.crop((x, y, x + width, y + height))
        kind = ("JPEG", "PNG", "WEBP")[number % 3]
        data = compressed(crop, kind, **({} if kind == "PNG" else {"quality": int(rng.integers(40, 96))}))
        assert_equal_to_transformers(data, Image.open(io.BytesIO(data)), **BOUNDS[number % 2])
        sides.append(sorted((width, height)))
    assert sum(short < 14 for short, _ in sides) > 20 and sum(long > 20 * short for short, long in sides) > 10


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 13), (14, 14), (1, 200), (200, 1), (2, 400), (42, 70), (13, 15), (600, 3)]
)
@pytest.mark.parametrize("bounds", BOUNDS, ids=("default", "narrow"))
def test_crops_at_the_edge_of_the_rules(size: tuple[int, int], bounds: dict[str, int]) -> None:
    for photo in photographs()[:3]:
        # 600 pixels are wider than a photograph: a strip of it, upscaled.
        crop = photo.crop((50, 60, 50 + min(size[0], 400), 60 + min(size[1], 200))).resize(size)
        data = compressed(crop, "PNG")
        assert_equal_to_transformers(data, Image.open(io.BytesIO(data)), **bounds)


@pytest.mark.parametrize("size", [(1, 201), (402, 2)])
def test_a_more_extreme_shape_is_refused_here_and_there(size: tuple[int, int]) -> None:
    crop = photographs()[0].crop((0, 0, *size))
    with pytest.raises(ValueError, match="aspect ratio"):
        Qwen2VLImageProcessorPil()(images=[crop])
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}: one side is more than 200 times the other"):
        ImageProcessor().process(compressed(crop, "PNG"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = compressed(photographs()[1].crop((40, 30, 240, 150)), kind, exif=exif.tobytes())
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == ((200, 120) if orientation <= 4 else (120, 200))
    assert_equal_to_transformers(data, upright)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "1"])
def test_colour_modes(mode: str) -> None:
    photo = photographs()[0].crop((100, 50, 260, 170))
    if "A" in mode:
        photo.putalpha(Image.linear_gradient("L").resize(photo.size))
    picture = photo.convert("RGBA").quantize(64) if mode == "PA" else photo.convert(mode)
    data = compressed(picture, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG")
    opened = Image.open(io.BytesIO(data))
    assert opened.mode == {"PA": "P", "YCbCr": "RGB"}.get(mode, mode)
    if mode == "PA":  # a palette with transparency: here over white, as other transparency
        assert "transparency" in opened.info
        rgba = np.asarray(opened.convert("RGBA"), np.float64)
        over_white = rgba[..., :3] * rgba[..., 3:] / 255 + 255 - rgba[..., 3:]
        assert np.abs(np.asarray(decode(data)) - over_white).max() <= 1
    else:
        assert_equal_to_transformers(data, opened)


def png16(pixels: np.ndarray) -> bytes:
    """Return a PNG of 16 bits a channel: pixels [height, width, 1 | 3 | 4], as grey, RGB or RGBA."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    height, width, channels = pixels.shape
    kind = {1: 0, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + ihdr + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_keep_their_upper_eight(channels: int) -> None:
    photo = np.asarray(photographs()[2].crop((0, 0, 90, 60)), np.uint16)
    low = np.random.default_rng(0).integers(0, 256, photo.shape, dtype=np.uint16)
    pixels = photo[..., :1] if channels == 1 else photo
    pixels = pixels * 256 + low[..., : pixels.shape[2]]
    if channels == 4:
        pixels = np.concatenate((pixels, np.full((60, 90, 1), 65535, np.uint16)), axis=2)
    made = np.asarray(decode(png16(pixels)))
    assert np.array_equal(made, np.broadcast_to((pixels[..., :3] >> 8).astype(np.uint8), made.shape))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "MPO"])
def test_of_several_pictures_in_a_file_the_first_counts(kind: str) -> None:
    first, *others = (photo.crop((0, 0, 150, 100)) for photo in photographs()[:3])
    settings = {"lossless": True} if kind == "WEBP" else {}
    data = compressed(first, kind, save_all=True, append_images=others, **settings)
    opened = Image.open(io.BytesIO(data))
    assert opened.n_frames == 3
    assert header(data) == (150, 100, "JPEG" if kind == "MPO" else kind)
    assert_equal_to_transformers(data, opened)
    if kind != "MPO":
        assert np.array_equal(np.asarray(decode(data)), np.asarray(first))


def test_the_default_picture_of_an_apng_counts() -> None:
    cover, *frames = (photo.crop((0, 0, 60, 40)) for photo in photographs()[:3])
    data = compressed(cover, "PNG", save_all=True, append_images=frames, default_image=True)
    assert b"acTL" in data and np.array_equal(np.asarray(decode(data)), np.asarray(cover))


def test_a_small_file_of_many_pixels_is_refused_before_it_is_decoded() -> None:
    data = plain_png(13_000, 13_000)
    assert 20_000 < len(data) < 22_000
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        with pytest.raises(ValueError, match="13000 x 13000 is more than the 64000000 pixels allowed"):
            ImageProcessor().process(data)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05  # decoding takes ten times as long
