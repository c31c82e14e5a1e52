"""Raw image bytes to model input: the one way, used to make training pixels, in evaluation and on a device.

Needs Pillow and numpy only. The steps: decode upright in RGB over the background; pad to a square, and by a
margin beyond it; resize by Pillow's antialiased bicubic; divide by 255. Normalisation is inside the model.
"""

from __future__ import annotations

import io
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from edgeglm.core.errors import UserError
from edgeglm.core.quiet import quiet

if TYPE_CHECKING:
    from PIL.Image import Image

Byte = Annotated[int, msgspec.Meta(ge=0, le=255)]
#: Share of the side of what a model is shown that is background, on each of the four sides.
Margin = Annotated[float, msgspec.Meta(ge=0.0, le=0.4)]
WHITE = (255, 255, 255)
# A decoder must not be made to fill the memory by a file of a few kilobytes.
MAX_PIXELS = 100_000_000
_MAX_BYTES = 8 * MAX_PIXELS  # no file whose pixels are all wanted needs more, uncompressed
_BAND = 2**22  # pixels that are converted at once
#: Floating point below it is a share of white: 1, and what a sharpening filter puts beyond it.
_MOST_SHARE = 2.0


class ImagePreprocessing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The ``image`` table of a bundle's ``preprocessing.json``."""

    resolution: Annotated[int, msgspec.Meta(ge=1)]
    resample: Literal["bicubic"] = "bicubic"
    background: tuple[Byte, Byte, Byte] = WHITE
    fit: Literal["pad"] = "pad"
    margin: Margin = 0.0


def decoded_image(
    source: bytes | Path, *, background: tuple[int, int, int] = WHITE, max_pixels: int = MAX_PIXELS
) -> Image:
    """Decode an image file to upright RGB.

    The EXIF orientation is applied; transparency (alpha, or a transparent palette entry) is laid over
    ``background``; 16 bit grey is scaled to 8, and so is floating point up to 1; CMYK and other modes are
    converted; of an animation the first frame is taken.

    Args:
        source: The bytes of a file, or its path.
        background: RGB in 0..255.
        max_pixels: Larger images are refused before they are decoded.

    Raises:
        UserError: Missing, empty, cut off, not an image, or too large; the message names the path.
    """
    from PIL import Image as Images
    from PIL import UnidentifiedImageError

    where = str(source) if isinstance(source, Path) else f"the image of {len(source)} bytes"
    data = _bytes_of(source) if isinstance(source, Path) else source
    try:
        # Quiet: the size is judged below, and odd metadata does no harm.
        with quiet, Images.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UserError(
                    f"{where} has {width} x {height} pixels, more than {max_pixels}; give a smaller one"
                )
            if image.format == "EPS":  # Pillow would start Ghostscript on whatever a stranger sent
                raise UserError(f"{where} is a PostScript program; give a PNG, JPEG or WebP")
            image.seek(0)
            image.load()
            _turn_upright(image)
            return _flat(image, background)
    except UserError:
        raise
    except Images.DecompressionBombError:
        raise UserError(f"{where} has more than {max_pixels} pixels; give a smaller one") from None
    except UnidentifiedImageError:
        raise UserError(f"{where} is not an image that can be read; give a PNG, JPEG or WebP") from None
    except Exception as error:  # what Pillow's decoders raise on damaged files has no base: struct.error, ...
        raise UserError(f"{where} is damaged: {error}; give a whole image file") from error


def _turn_upright(image: Image) -> None:
    """Apply the EXIF orientation, as far as it can be read: the pixels are good beside metadata that is not.

    Pillow writes the metadata again, and falls over odd entries that it has read: none are left to write.
    """
    from PIL import ImageOps

    try:
        image.getexif()
    except Exception:  # anything, of a few odd bytes; viewers show such pictures as they lie
        return
    for key in ("exif", "Raw profile type exif"):
        image.info.pop(key, None)
    ImageOps.exif_transpose(image, in_place=True)


def _bytes_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            size, is_file = (state := os.fstat(file.fileno())).st_size, stat.S_ISREG(state.st_mode)
            # What is no file, such as a device, has no size and may have no end.
            data = file.read(None if is_file else _MAX_BYTES + 1) if size <= _MAX_BYTES else b""
    except FileNotFoundError:
        raise UserError(f"no image at {path}; give the path of an image file") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}; give the path of an image file") from error
    if size > _MAX_BYTES or len(data) > _MAX_BYTES:
        raise UserError(f"{path} has more than {_MAX_BYTES} bytes; give an image file of a usual size")
    return data


def pixels_from_image(
    image: Image, resolution: int, *, background: tuple[int, int, int] = WHITE, margin: float = 0.0
) -> npt.NDArray[np.uint8]:
    """Pad an RGB image to a square, the image in the middle, and resize it. Returns uint8 [R, R, 3].

    ``margin`` is the share of R that stays background on each side of a square image.

    An image whose square would have more than ``MAX_PIXELS`` is reduced by a whole factor first: a strip of
    65,000 x 9 pixels, a file of 60 bytes, would otherwise take 12 GB.
    """
    from PIL import Image as Images

    longest = int(math.isqrt(MAX_PIXELS) * (1 - 2 * margin))
    if max(image.size) > longest:
        image = image.reduce(-(-max(image.size) // longest))
    width, height = image.size
    side = round(max(width, height) / (1 - 2 * margin))
    if (width, height) != (side, side):
        square = Images.new("RGB", (side, side), background)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    if image.width != resolution:
        image = image.resize((resolution, resolution), Images.Resampling.BICUBIC)
    return np.array(image, dtype=np.uint8)


def model_input_from_pixels(
    pixels: npt.NDArray[np.uint8], resolution: int, *, margin: float = 0.0
) -> npt.NDArray[np.float32]:
    """Resize stored pixels as ``pixels_from_image`` does and scale them: what the models take.

    Args:
        pixels: uint8 [N, S, S, 3], RGB, without a margin.
        resolution: R.
        margin: As ``pixels_from_image`` takes it, over white.

    Returns:
        float32 [N, 3, R, R], contiguous, in [0, 1].
    """
    from PIL import Image as Images

    out = np.empty((len(pixels), 3, resolution, resolution), np.float32)
    for i, square in enumerate(pixels):
        resized = pixels_from_image(Images.fromarray(np.ascontiguousarray(square)), resolution, margin=margin)
        out[i] = resized.transpose(2, 0, 1)
    out /= np.float32(255)
    return out


def shown_pixels(image: Image, preprocessing: ImagePreprocessing) -> npt.NDArray[np.uint8]:
    """Return what a model is shown of a decoded image, uint8 [R, R, 3]."""
    return pixels_from_image(
        image, preprocessing.resolution, background=preprocessing.background, margin=preprocessing.margin
    )


def model_input_from_files(
    sources: list[bytes] | list[Path], preprocessing: ImagePreprocessing
) -> npt.NDArray[np.float32]:
    """Decode image files and make the model input of them: float32 [N, 3, R, R] in [0, 1].

    Raises UserError for a file that cannot be decoded.
    """
    size = preprocessing.resolution
    pixels = [
        shown_pixels(decoded_image(source, background=preprocessing.background), preprocessing)
        for source in sources
    ]
    stacked = np.stack(pixels) if pixels else np.empty((0, size, size, 3), np.uint8)
    return model_input_from_pixels(stacked, size)


def _flat(image: Image, background: tuple[int, int, int]) -> Image:
    """Convert any mode to RGB over the background.

    A large one is converted in bands: else 16 bit grey takes 35 bytes a pixel on the way, 3.5 GB for a file
    of 200 kB.
    """
    from PIL import Image as Images

    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    scale = _white_of(image) / 255.0
    if image.height <= _rows_at_once(image):
        return _flat_band(image, scale, background)
    flat = Images.new("RGB", image.size)
    for top, band in _bands(image):
        flat.paste(_flat_band(band, scale, background), (0, top))
    return flat


def _rows_at_once(image: Image) -> int:
    return max(1, _BAND // max(1, image.width))


def _bands(image: Image) -> Iterator[tuple[int, Image]]:
    """Yield parts of an image that lie under one another, each with its first row."""
    rows = _rows_at_once(image)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _white_of(image: Image) -> float:
    """Return the value that means white: that of 16 bits, or, in a wide mode, that of what it holds.

    Floating point up to 1, and what filters leave a little beyond it, is a share of white, as libraries keep
    pictures; what is within 8 bits in a wide mode is taken as it is. What is no number says nothing of it.
    """
    if image.mode not in ("I", "F"):
        return 65535.0 if image.mode.startswith("I;16") else 255.0
    _, most = image.getextrema()
    assert isinstance(most, (int, float))
    if not math.isfinite(most):
        most = _largest_number(image)
    if image.mode == "F" and most < _MOST_SHARE:
        return 1.0
    return 65535.0 if most > 255.0 else 255.0


def _largest_number(image: Image) -> float:
    """Return the largest value of a picture in floating point that is a number; 0 for one without any."""
    most = 0.0
    for _, band in _bands(image):
        values: npt.NDArray[np.float32] = np.asarray(band, dtype=np.float32)
        most = float(values.max(where=np.isfinite(values), initial=most))
    return most


def _flat_band(image: Image, scale: float, background: tuple[int, int, int]) -> Image:
    from PIL import Image as Images

    if image.mode.startswith("I") or image.mode == "F":
        scaled: npt.NDArray[Any] = np.nan_to_num(np.asarray(image, dtype=np.float64) / scale)
        return Images.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        ground = Images.new("RGBA", layer.size, (*background, 255))
        return Images.alpha_composite(ground, layer).convert("RGB")
    return image.convert("RGB")
