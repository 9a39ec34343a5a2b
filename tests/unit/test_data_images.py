"""Images: bits equal to transformers' PIL processor, hostile files refused from their header."""

from __future__ import annotations

import hashlib
import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference_resize

from megatron_vlmr1.data import images
from megatron_vlmr1.data.images import ImageProcessor, decode, header, pixel_values, smart_resize
from tests.tiny import compressed, picture, plain_png

SIZES = [
    (112, 112),
    (1, 1),
    (1, 199),
    (200, 1),
    (27, 29),
    (28, 28),
    (42, 14),
    (333, 97),
    (640, 480),
    (91, 1000),
    (56, 84),
]


def reference(processor: Qwen2VLImageProcessorPil, image: Image.Image) -> tuple[np.ndarray, list[int]]:
    out = processor(images=[image], return_tensors="np")
    return out["pixel_values"], out["image_grid_thw"][0].tolist()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", SIZES)
def test_patches_equal_transformers_bit_for_bit(size: tuple[int, int], kind: str) -> None:
    data = compressed(picture(*size), kind)
    for bounds in ({}, {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 40}):
        patches, grid = reference(Qwen2VLImageProcessorPil(**bounds), Image.open(io.BytesIO(data)))
        ours = ImageProcessor(**bounds).process(data)
        assert np.array_equal(pixel_values(ours), patches) and pixel_values(ours).dtype == patches.dtype
        assert list(ours.grid_thw) == grid
        assert ours.size == size
        assert ours.digest == hashlib.sha256(data).digest()


def test_patches_equal_transformers_on_random_sizes() -> None:
    rng = np.random.default_rng(1)
    theirs, ours = Qwen2VLImageProcessorPil(max_pixels=28 * 28 * 60), ImageProcessor(max_pixels=28 * 28 * 60)
    for seed in range(60):
        size = tuple(int(side) for side in np.exp(rng.uniform(np.log(8), np.log(700), 2)))
        data = compressed(picture(*size, seed=seed), quality=int(rng.integers(30, 96)))
        patches, grid = reference(theirs, Image.open(io.BytesIO(data)))
        made = ours.process(data)
        assert np.array_equal(pixel_values(made), patches) and list(made.grid_thw) == grid, size


def test_other_patch_sizes_and_normalisations_equal_transformers() -> None:
    settings = dict(patch_size=16, merge_size=3, rescale_factor=1 / 127.5)
    mean, std = (0.5, 0.1, 1.0), (0.5, 0.25, 2.0)
    data = compressed(picture(300, 200), "PNG")
    theirs = Qwen2VLImageProcessorPil(
        **settings, temporal_patch_size=1, image_mean=list(mean), image_std=list(std), resample=2
    )
    patches, grid = reference(theirs, Image.open(io.BytesIO(data)))
    made = ImageProcessor(**settings, image_mean=mean, image_std=std, resample=2).process(data)
    assert np.array_equal(pixel_values(made, frames=1), patches) and list(made.grid_thw) == grid


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_modes_equal_transformers(mode: str) -> None:
    image = picture(90, 60).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image = image.convert(mode)
    data = compressed(image, "JPEG" if mode == "CMYK" else "PNG")
    patches, _ = reference(Qwen2VLImageProcessorPil(), Image.open(io.BytesIO(data)))
    assert np.array_equal(pixel_values(ImageProcessor().process(data)), patches)


def test_transparency_goes_over_white() -> None:
    clear = compressed(Image.new("RGBA", (8, 8), (10, 20, 30, 0)), "PNG")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    for data in (clear, compressed(palette, "PNG", transparency=1)):
        assert decode(data).getpixel((3, 3)) == (255, 255, 255)


def test_sixteen_bits_are_cut_to_eight() -> None:
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    data = compressed(Image.fromarray(values), "PNG")
    assert np.array_equal(np.asarray(decode(data)), np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue", "lime")]
    data = compressed(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert decode(data).getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    image = picture(40, 30)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = compressed(image, "PNG", exif=exif)
    pixels = np.asarray(image)
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: pixels[::-1].transpose(1, 0, 2),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: pixels.transpose(1, 0, 2)[::-1],
    }[orientation]
    assert np.array_equal(np.asarray(decode(data)), upright)
    assert ImageProcessor().process(data).size == (upright.shape[1], upright.shape[0])


def test_a_broken_exif_block_costs_nothing() -> None:
    image = picture(40, 30)
    data = compressed(image, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode(data).size == (40, 30)


def test_smart_resize_equals_transformers() -> None:
    rng = np.random.default_rng(0)
    for _ in range(3000):
        height, width = (int(side) for side in np.exp(rng.uniform(0, np.log(5000), 2)))
        factor = int(rng.choice([28, 32]))
        bounds = sorted(int(pixels) for pixels in np.exp(rng.uniform(np.log(factor**2), np.log(4e6), 2)))
        if max(height, width) / min(height, width) > 200:
            with pytest.raises(ValueError, match="200 times"):
                smart_resize(height, width, factor, *bounds)
        else:
            assert smart_resize(height, width, factor, *bounds) == reference_resize(height, width, factor, *bounds)


@pytest.mark.parametrize("side", [8001, 13_000, 30_000])
def test_too_many_pixels_are_refused_from_the_header(side: int) -> None:
    data = plain_png(side, side)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        with pytest.raises(ValueError, match="64000000 pixels allowed"):
            header(data)
        with pytest.raises(ValueError, match="64000000 pixels allowed"):
            ImageProcessor().process(data)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.01


def test_only_jpeg_png_webp() -> None:
    image = picture(20, 10)
    assert [header(compressed(image, kind)) for kind in images.SUFFIXES] == [(20, 10, kind) for kind in images.SUFFIXES]
    for kind in ("GIF", "BMP", "TIFF", "PPM", "ICO"):
        with pytest.raises(ValueError, match="not a JPEG, PNG or WebP"):
            header(compressed(image, kind))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_images_raise_value_error_only(kind: str) -> None:
    data = compressed(picture(64, 48), kind)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        broken = bytearray(data)
        for at in rng.integers(0, len(data), int(rng.integers(1, 6))):
            broken[at] = int(rng.integers(256))
        try:
            decode(bytes(broken[: int(rng.integers(len(data)))]))
        except ValueError as error:
            refused += "\n" not in str(error)
    assert refused >= 200
    for junk in (b"", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBPVP8 ", b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(ValueError, match="not a JPEG|header"):
            header(junk)


def test_both_forms_of_preprocessor_config(tmp_path: Path) -> None:
    def written(**settings: object) -> Path:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        return tmp_path

    old = ImageProcessor.from_pretrained(written(min_pixels=3136, max_pixels=50_000, patch_size=16))
    assert (old.min_pixels, old.max_pixels, old.patch_size, old.merge_size) == (3136, 50_000, 16, 2)
    new = ImageProcessor.from_pretrained(written(size={"shortest_edge": 784, "longest_edge": 9000}, min_pixels=None))
    assert (new.min_pixels, new.max_pixels) == (784, 9000)
    both = ImageProcessor.from_pretrained(tmp_path, min_pixels=1000, max_pixels=8000)
    assert (both.min_pixels, both.max_pixels) == (1000, 8000)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 9, patch_size=16).save_pretrained(tmp_path)
    saved = ImageProcessor.from_pretrained(tmp_path)
    assert (saved.min_pixels, saved.max_pixels, saved.patch_size) == (784, 7056, 16)
    assert saved.rescale_factor == 1 / 255 and saved.resample == 3
    for problem, settings in {
        "patch_size must be even": {"patch_size": 15},
        "do_resize": {"do_resize": False},
        "max_pixels": {"min_pixels": 9, "max_pixels": 4},
    }.items():
        with pytest.raises(ValueError, match=f"preprocessor_config.json: .*{problem}"):
            ImageProcessor.from_pretrained(written(**settings))
    with pytest.raises(ValueError, match="cannot be read"):
        ImageProcessor.from_pretrained(tmp_path / "nowhere")
