"""How a picture file becomes a model's input: the one implementation, used by the service and by training alike."""

from __future__ import annotations

import ctypes
import io
import warnings
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, _imaging

from app.artifacts.manifest import InputSpec, PictureSpec
from app.errors import ImageNotDecodable, PayloadTooLarge

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
DEFAULT_MAX_PIXELS = 40_000_000

Image.MAX_IMAGE_PIXELS = None  # the limit is `max_pixels` below, enforced before a pixel is decoded
# Pillow remarks on damaged metadata of whatever anybody uploads.
warnings.filterwarnings("ignore", module=r"PIL\.")


def _silence_libtiff() -> None:
    """Libtiff writes its remarks on damaged files to stderr by itself; what matters of them, Pillow raises.

    Where its functions cannot be reached through Pillow's own library, it goes on doing so.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(_imaging.__file__)
        for set_handler in (library.TIFFSetErrorHandler, library.TIFFSetWarningHandler):
            set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            set_handler(None)


_silence_libtiff()

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_RESAMPLE = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def open_picture(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """The picture in a file's bytes, its header read and its size checked, its pixels not decoded yet.

    Raises ImageNotDecodable, and PayloadTooLarge above `max_pixels`.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # Pillow's plugins raise whatever hostile bytes lead them to
        raise ImageNotDecodable(
            f"picture: expected one of {', '.join(FORMATS)}, found {len(data)} bytes that are none of them"
        ) from error
    if image.width * image.height > max_pixels:
        raise PayloadTooLarge(f"picture: {image.width} × {image.height} pixels, expected at most {max_pixels} in all")
    return image


def picture_to_input(image: Image.Image, spec: InputSpec, *, invert: bool | None = None) -> NDArray[np.float32]:
    """Brings a picture to the model's input.

    The written rule, in order: first frame of an animation; EXIF orientation applied; 16 bits a channel scaled to 8;
    transparency laid over white, or over black if what is visible is lighter than middle grey; converted to grey
    (ITU-R 601 luma) or RGB; polarity; resized with antialiasing and fitted as the manifest says, padding with the
    border's median; scaled from 0…255 to the manifest's range.

    Args:
        image: as `open_picture` gave it.
        spec: the manifest's `input`, with `picture` set.
        invert: True inverts, False does not, None leaves it to the manifest's polarity rule.

    Returns:
        (channels, height, width), in the manifest's range.

    Raises ImageNotDecodable if the pixels cannot be decoded.
    """
    if spec.picture is None or spec.range is None:
        raise ValueError("input: expected a manifest that describes a picture")
    channels, height, width = spec.shape
    try:
        image.seek(0)
        image = _to_eight_bits(_upright(image))
        mode = "L" if channels == 1 else "RGB"
        image = image if image.mode == mode else image.convert(mode)
        pixels = np.asarray(image)  # decodes, if nothing else has
    except Exception as error:  # Pillow's plugins raise whatever hostile bytes lead them to
        raise ImageNotDecodable(f"picture: damaged {image.format or 'file'}: {error}") from error
    if invert is None:
        invert = spec.picture.polarity == "light_on_dark" and bool(_median(_border(pixels).reshape(-1)) > 127)
    if image.size != (width, height):
        pixels = np.asarray(_fit(ImageOps.invert(image) if invert else image, (width, height), spec.picture))
    elif invert:
        pixels = 255 - pixels
    pixels = pixels.reshape(height, width, channels).transpose(2, 0, 1)  # (channels, height, width)
    return pixels_to_range(pixels, spec)


def mask_to_input(image: Image.Image, spec: InputSpec) -> NDArray[np.float32]:
    """Brings a mask picture, light where something is missing, to the model's input as a picture of that size would be.

    Returns (1, height, width): 1 where any part of the pixel is missing, else 0; what is padded is not missing.

    Raises ImageNotDecodable if the pixels cannot be decoded.
    """
    if spec.picture is None:
        raise ValueError("input: expected a manifest that describes a picture")
    _, height, width = spec.shape
    try:
        image.seek(0)
        image = _to_eight_bits(_upright(image)).convert("L").point(lambda value: 255 * (value > 127))
    except Exception as error:  # Pillow's plugins raise whatever hostile bytes lead them to
        raise ImageNotDecodable(f"mask: damaged {image.format or 'file'}: {error}") from error
    fitted = _fit(image, (width, height), spec.picture.model_copy(update={"resample": "box"}), fill=0)
    return (np.asarray(fitted) > 0).astype(np.float32)[np.newaxis]


def pixels_to_range(pixels: NDArray[np.uint8], spec: InputSpec) -> NDArray[np.float32]:
    """Pixels 0…255 of any shape, in the manifest's range: divided by 255 in float32 where that is 0 to 1."""
    low, high = spec.range or (0.0, 1.0)
    unit = pixels.astype(np.float32) / np.float32(255)
    return unit if (low, high) == (0.0, 1.0) else np.float32(low) + unit * np.float32(high - low)


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says; as it is where that cannot be read."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001  damaged metadata, of which Pillow raises anything, is no damage to the pixels
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """The picture with 8 bits a channel and no transparency: mode L, RGB, or one that `convert` reads faithfully."""
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own conversion clips instead of scaling.
        values = np.nan_to_num(np.clip(np.asarray(image), 0, 65535)).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "LAB":
        return image.convert("RGB")  # Pillow has no direct way to grey
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        weight = np.asarray(rgba.getchannel("A"))
        grey = np.asarray(rgba.convert("L"))
        # 255 · 255 fits: a large picture would not fit as often in anything wider.
        visible = np.multiply(grey, weight, dtype=np.uint16).sum() / weight.sum() if weight.any() else 0.0
        background = (0, 0, 0, 255) if visible > 127 else (255, 255, 255, 255)
        return Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba).convert("RGB")
    return image


def _border(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The outermost ring of pixels, (n,) or (n, channels), of (height, width) or (height, width, channels)."""
    return np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])


def _median(values: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The median along the first axis: as numpy's, whose own costs more than decoding a small picture."""
    ordered = np.sort(values, axis=0)
    return np.asarray((ordered[(len(ordered) - 1) // 2].astype(np.float64) + ordered[len(ordered) // 2]) / 2)


def _fit(
    image: Image.Image, size: tuple[int, int], spec: PictureSpec, fill: int | tuple[int, ...] | None = None
) -> Image.Image:
    """The picture at (width, height), padded with `fill` or the border's median."""
    if image.size == size:
        return image
    filter_ = _RESAMPLE[spec.resample]
    if spec.fit == "stretch":
        return image.resize(size, filter_)
    if spec.fit == "crop":
        return ImageOps.fit(image, size, filter_)
    if fill is None:
        median = _median(_border(np.asarray(image))).astype(int)
        fill = tuple(median.tolist()) if median.ndim else int(median)
    canvas = Image.new(image.mode, size, fill)
    scale = min(size[0] / image.width, size[1] / image.height)
    # At least a pixel: a picture of 10000 × 1 must not shrink to nothing.
    inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas.paste(image.resize(inner, filter_), ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2))
    return canvas
