"""The written rule of `picture_to_input`, a test for each clause, and files that are not what they claim to be."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.artifacts.manifest import InputSpec, PictureSpec
from app.artifacts.pictures import open_picture, picture_to_input
from app.errors import ImageNotDecodable, PayloadTooLarge

# As in production, where the filter that `app.artifacts.pictures` sets is not overridden by pytest's.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")

GREY = InputSpec(shape=(1, 8, 8), range=(0, 1), picture=PictureSpec())
RGB = InputSpec(shape=(3, 8, 8), range=(0, 1), picture=PictureSpec())
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)


def spec(shape: tuple[int, ...] = (1, 8, 8), value_range: tuple[float, float] = (0, 1), **picture: Any) -> InputSpec:
    return InputSpec(shape=shape, range=value_range, picture=PictureSpec(**picture))


def file(image: Image.Image, fmt: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()


def read(data: bytes, wanted: InputSpec = GREY, *, invert: bool | None = None) -> np.ndarray:
    return picture_to_input(open_picture(data), wanted, invert=invert)


def unit(pixels: np.ndarray) -> np.ndarray:
    """What a lossless picture of the model's size must give: pixel / 255 in float32, channels first."""
    return (pixels.astype(np.float32) / np.float32(255))[np.newaxis]


@pytest.mark.parametrize(
    ("fmt", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
    ],
)
def test_lossless_picture_of_the_right_size_is_taken_verbatim(fmt: str, options: dict[str, Any]) -> None:
    """Every pixel of a lossless 8×8 grey picture becomes exactly pixel / 255."""
    found = read(file(Image.fromarray(PIXELS), fmt, **options))
    assert found.dtype == np.float32
    assert (found == unit(PIXELS)).all()


def test_colour_is_taken_verbatim_where_the_model_has_colour() -> None:
    """An RGB picture keeps its channels, first."""
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert (read(file(Image.fromarray(pixels)), RGB) == pixels.transpose(2, 0, 1).astype(np.float32) / 255).all()


def test_grey_fills_all_channels_of_a_colour_model() -> None:
    """A grey picture for an RGB model has three equal channels."""
    assert (read(file(Image.fromarray(PIXELS)), RGB) == np.repeat(unit(PIXELS), 3, axis=0)).all()


@pytest.mark.parametrize(("colour", "luma"), [((255, 0, 0), 76), ((0, 255, 0), 150), ((0, 0, 255), 29)])
def test_colour_becomes_grey_by_luma(colour: tuple[int, int, int], luma: int) -> None:
    """RGB becomes grey by ITU-R 601: .299 R + .587 G + .114 B."""
    assert (read(file(Image.new("RGB", (8, 8), colour))) == np.float32(luma) / 255).all()


def test_values_are_scaled_to_the_manifests_range() -> None:
    """Pixels 0 and 255 become the lowest and highest value of the manifest's range."""
    found = read(file(Image.fromarray(PIXELS)), spec(value_range=(-1, 1)))
    np.testing.assert_allclose(found, unit(PIXELS) * 2 - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, PIXELS),
        (2, PIXELS[:, ::-1]),
        (3, PIXELS[::-1, ::-1]),
        (4, PIXELS[::-1]),
        (5, PIXELS.T),
        (6, np.rot90(PIXELS, -1)),
        (7, PIXELS[::-1, ::-1].T),
        (8, np.rot90(PIXELS)),
        (0, PIXELS),
        (9, PIXELS),
    ],
)
def test_exif_orientation_is_applied(orientation: int, upright: np.ndarray) -> None:
    """A picture is turned as its EXIF says; an orientation that does not exist turns nothing."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (read(file(Image.fromarray(PIXELS), exif=exif.tobytes())) == unit(upright)).all()


DAMAGED_EXIF = {
    "garbage": b"garbagegarbage",
    "truncated": b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12",
    "orientation is text": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04ab\0\0\0\0\0\0",
    "unknown type, huge tag": b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x63\0\0\0\x01\0\x06\0\0"
    + b"\x01\x0f\0\x02\xff\xff\xff\xff"
    + bytes(8),
}


@pytest.mark.parametrize("fmt", ["PNG", "JPEG"])
@pytest.mark.parametrize("exif", DAMAGED_EXIF)
def test_damaged_exif_is_no_damage_to_the_picture(exif: str, fmt: str) -> None:
    """A picture whose EXIF cannot be read is taken as it is."""
    image = Image.new("L", (8, 8), 200)
    assert (read(file(image, fmt, exif=DAMAGED_EXIF[exif])) == np.float32(200) / 255).all()


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_to_eight(fmt: str) -> None:
    """16-bit grey is divided by 257 and rounded, not clipped at 255."""
    wide = PIXELS.astype(np.uint16) * 257 + np.random.default_rng(2).integers(-128, 129, (8, 8)).clip(0).astype(
        np.uint16
    )
    wide = np.where(PIXELS == 255, 65535, wide).astype(np.uint16)
    assert (read(file(Image.fromarray(wide), fmt)) == unit(PIXELS)).all()


@pytest.mark.parametrize(("value", "expected"), [(np.nan, 0), (np.inf, 255), (-5, 0), (65535, 255), (257 * 9, 9)])
def test_float_pictures_never_give_anything_but_pixels(value: float, expected: int) -> None:
    """A 32-bit float picture is read on the 16-bit scale, clipped, NaN as black."""
    image = Image.fromarray(np.full((8, 8), value, np.float32))
    assert (read(file(image, "TIFF")) == np.float32(expected) / 255).all()


def with_alpha(grey: int) -> Image.Image:
    """Grey pixels in the left half, fully transparent ones of the opposite brightness in the right."""
    image = Image.new("LA", (8, 8), (255 - grey, 0))
    image.paste((grey, 255), (0, 0, 4, 8))
    return image


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize(("ink", "background"), [(20, 255), (120, 255), (135, 0), (230, 0)])
def test_transparency_is_laid_over_the_opposite(mode: str, ink: int, background: int) -> None:
    """Dark ink gets a white background, light ink a black one, whatever colour the invisible pixels have."""
    found = read(file(with_alpha(ink).convert(mode)))
    assert (found[0, :, :4] == np.float32(ink) / 255).all()
    assert (found[0, :, 4:] == np.float32(background) / 255).all()


def test_half_transparent_pixels_are_blended() -> None:
    """Alpha 128 of dark ink over white is half of both."""
    found = read(file(Image.new("RGBA", (8, 8), (0, 0, 0, 128))))
    assert (found == np.float32(127) / 255).all()


def test_nothing_visible_is_a_blank_picture() -> None:
    """A wholly transparent picture is its background alone."""
    assert len(np.unique(read(file(Image.new("RGBA", (8, 8), (10, 200, 30, 0)))))) == 1


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_palette_with_transparency_is_laid_over_the_opposite(transparency: int | bytes) -> None:
    """A palette's transparent entry is background, given as an index or as alphas."""
    image = Image.new("P", (8, 8), 1)
    image.putpalette([20, 20, 20, 230, 230, 230])
    image.paste(0, (0, 0, 4, 8))
    found = read(file(image, transparency=transparency))
    assert (found[0, :, :4] == np.float32(20) / 255).all()
    assert (found[0, :, 4:] == 1).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_every_mode_is_brought_to_grey_and_to_colour(mode: str) -> None:
    """White stays white and black black, whatever mode the file has."""
    image = Image.new("RGB", (8, 8), "white")
    image.paste("black", (0, 0, 4, 8))
    data = file(image.convert(mode), "TIFF")
    for wanted in (GREY, RGB):
        found = read(data, wanted)
        assert found[..., :4].max() < 0.02
        assert found[..., 4:].min() > 0.98


def test_cmyk_jpeg_keeps_its_polarity() -> None:
    """A CMYK JPEG's white is white."""
    assert read(file(Image.new("RGB", (8, 8), "white").convert("CMYK"), "JPEG")).min() > 0.98


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation_is_taken(fmt: str) -> None:
    """Of an animation or a stack the first frame counts."""
    frames = [Image.new("RGB", (8, 8), (value, value, value)) for value in (200, 20, 90)]
    options = {"lossless": True} if fmt == "WEBP" else {}
    data = file(frames[0], fmt, save_all=True, append_images=frames[1:], **options)
    assert open_picture(data).n_frames == 3
    assert (read(data) == np.float32(200) / 255).all()


def test_padding_takes_the_borders_median() -> None:
    """Another aspect ratio is padded with the median of the border, the picture in the middle."""
    image = Image.new("L", (16, 8), 50)
    image.paste(255, (4, 2, 12, 6))
    image.putpixel((0, 0), 255)  # a speck does not move the median
    found = np.rint(read(file(image), spec(fit="pad", resample="box"))[0] * 255)
    assert (found[:2] == 50).all()
    assert (found[6:] == 50).all()
    assert (found[3:5, 2:6] == 255).all()


def test_stretching_fills_the_input() -> None:
    """With `stretch` each axis is scaled by itself."""
    image = Image.new("L", (16, 8), 0)
    image.paste(255, (8, 0, 16, 8))
    found = read(file(image), spec(fit="stretch", resample="box"))[0]
    assert (found[:, :4] == 0).all()
    assert (found[:, 4:] == 1).all()


def test_cropping_keeps_the_centre() -> None:
    """With `crop` the middle of the longer axis is kept."""
    image = Image.new("L", (16, 8), 0)
    image.paste(255, (4, 0, 12, 8))
    assert (read(file(image), spec(fit="crop"))[0] == 1).all()


@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos", "box"])
def test_shrinking_is_antialiased(resample: str) -> None:
    """One-pixel stripes of a large picture shrink to their mean, not to some of them."""
    stripes = np.zeros((256, 256), np.uint8)
    stripes[:, ::2] = 254
    found = read(file(Image.fromarray(stripes)), spec(resample=resample))
    assert abs(found * 255 - 127).max() < 8


@pytest.mark.parametrize("fit", ["pad", "stretch", "crop"])
@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1), (3, 2000), (9, 8)])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7)])
def test_any_size_is_brought_to_the_input(fit: str, size: tuple[int, int], shape: tuple[int, ...]) -> None:
    """No aspect ratio and no size is too odd; a flat picture stays flat."""
    found = read(file(Image.new("L", size, 77)), spec(shape, fit=fit))
    assert found.shape == shape
    assert abs(found * 255 - 77).max() <= 1


def test_dark_on_light_is_inverted_for_a_model_of_light_on_dark() -> None:
    """With a polarity in the manifest a picture with a light border is inverted, one with a dark border is not."""
    ink = Image.new("L", (8, 8), 230)
    ink.paste(10, (2, 2, 6, 6))
    light_on_dark = spec(polarity="light_on_dark")
    assert (read(file(ink), light_on_dark) == unit(255 - np.asarray(ink))).all()
    negative = Image.fromarray(255 - np.asarray(ink))
    assert (read(file(negative), light_on_dark) == unit(np.asarray(negative))).all()
    assert (read(file(ink), GREY) == unit(np.asarray(ink))).all()


@pytest.mark.parametrize("polarity", ["light_on_dark", None])
@pytest.mark.parametrize("background", [10, 230])
def test_the_callers_word_on_inversion_counts(polarity: str | None, background: int) -> None:
    """invert=True always inverts and invert=False never does, whatever polarity would decide."""
    data = file(Image.new("L", (8, 8), background))
    assert (read(data, spec(polarity=polarity), invert=True) == np.float32(255 - background) / 255).all()
    assert (read(data, spec(polarity=polarity), invert=False) == np.float32(background) / 255).all()


def png_claiming(width: int, height: int) -> bytes:
    """A PNG with a header of that size and hardly any pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def test_huge_picture_is_refused_by_its_header() -> None:
    """60000×60000 pixels are refused before one of them is decoded, with found and expected."""
    with pytest.raises(PayloadTooLarge, match="60000 × 60000 pixels, expected at most 40000000"):
        open_picture(png_claiming(60000, 60000))
    assert open_picture(png_claiming(100, 100), max_pixels=10_000).size == (100, 100)
    with pytest.raises(PayloadTooLarge):
        open_picture(png_claiming(100, 101), max_pixels=10_000)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "text": lambda: b"this is no picture",
    "only a signature": lambda: b"\x89PNG\r\n\x1a\n",
    "PNG without its pixels": lambda: png_claiming(500, 500),
    "truncated PNG": lambda: file(Image.fromarray(PIXELS))[:-40],
    "truncated JPEG": lambda: half(file(Image.effect_noise((64, 64), 90), "JPEG")),
    "truncated WebP": lambda: half(file(Image.effect_noise((64, 64), 90).convert("RGB"), "WEBP")),
    "truncated TIFF": lambda: half(file(Image.effect_noise((64, 64), 90), "TIFF")),
    "truncated GIF": lambda: half(file(Image.effect_noise((64, 64), 90), "GIF")),
    "truncated BMP": lambda: half(file(Image.effect_noise((64, 64), 90), "BMP")),
    "a format not offered": lambda: file(Image.fromarray(PIXELS), "PPM"),
    "EPS, which Pillow would run Ghostscript for": lambda: file(Image.fromarray(PIXELS), "EPS"),
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>',
}


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_picture_is_refused(name: str) -> None:
    """Truncated files, other files and nothing at all are ImageNotDecodable, never another exception."""
    with pytest.raises(ImageNotDecodable, match="picture: "):
        read(HOSTILE[name]())


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_damaged_bytes_never_raise_anything_else(fmt: str) -> None:
    """Files with a few bytes changed at random are read or refused."""
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = file(
        Image.fromarray(PIXELS).convert("RGB"), fmt, **({"exif": exif} if fmt in ("PNG", "JPEG", "WEBP") else {})
    )
    chance = random.Random(3)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            found = read(bytes(data))
        except (ImageNotDecodable, PayloadTooLarge):
            refused += 1
        else:
            assert found.shape == (1, 8, 8)
            assert found.min() >= 0
            assert found.max() <= 1
    assert 0 < refused < 150


def test_pillows_remarks_reach_nobody() -> None:
    """Pillow's warnings about damaged metadata do not reach the terminal of whoever serves."""
    exif = DAMAGED_EXIF["unknown type, huge tag"]
    script = (
        "import sys; from app.artifacts.pictures import *; from app.artifacts.manifest import *\n"
        "spec = InputSpec(shape=(1, 8, 8), range=(0, 1), picture=PictureSpec())\n"
        "picture_to_input(open_picture(sys.stdin.buffer.read()), spec)"
    )
    data = file(Image.new("L", (8, 8)), "JPEG", exif=exif)
    run = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, check=True)
    assert (run.stdout, run.stderr) == (b"", b"")


def test_a_manifest_without_pictures_is_the_callers_mistake() -> None:
    """Records have no pictures: asking for one is a programming error."""
    with pytest.raises(ValueError, match="describes a picture"):
        picture_to_input(Image.new("L", (8, 8)), InputSpec(shape=(64,)))


def test_libtiff_keeps_to_itself(capfd: pytest.CaptureFixture[str]) -> None:
    """A TIFF whose compressed pixels are damaged is refused, and the C library below writes nothing to stderr."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "TIFF", compression="tiff_lzw")
    refused = 0
    for position in range(8, stream.tell(), 97):
        damaged = bytearray(stream.getvalue())
        damaged[position] ^= 0xFF
        try:
            picture_to_input(open_picture(bytes(damaged)), GREY)
        except (ImageNotDecodable, PayloadTooLarge):
            refused += 1
    assert refused > 5
    assert capfd.readouterr().err == ""
