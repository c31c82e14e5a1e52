"""Any image file a person has becomes the same pixels everywhere, or a clear error."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from edgeglm.core.errors import UserError
from edgeglm.data import transforms
from edgeglm.data.transforms import (
    ImagePreprocessing,
    decoded_image,
    model_input_from_files,
    model_input_from_pixels,
    pixels_from_image,
)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("resolution", [80, 128, 144, 200])
def test_the_device_sees_the_pixels_that_training_saw(resolution: int) -> None:
    pixels = noise(3, 144, 144, 3)
    files = [encoded(Image.fromarray(image)) for image in pixels]
    from_files = model_input_from_files(files, ImagePreprocessing(resolution=resolution))
    from_arrays = model_input_from_pixels(pixels, resolution)
    assert from_arrays.dtype == np.float32
    assert from_arrays.shape == (3, 3, resolution, resolution)
    assert from_arrays.flags.c_contiguous
    np.testing.assert_array_equal(from_files, from_arrays)
    assert from_arrays.min() >= 0.0
    assert from_arrays.max() <= 1.0


@pytest.mark.parametrize("margin", [0.0, 0.05, 0.125, 0.4])
def test_a_margin_is_the_same_from_files_and_from_stored_pixels(margin: float) -> None:
    pixels = noise(2, 144, 144, 3)
    files = [encoded(Image.fromarray(image)) for image in pixels]
    found = model_input_from_files(files, ImagePreprocessing(resolution=64, margin=margin))
    np.testing.assert_array_equal(found, model_input_from_pixels(pixels, 64, margin=margin))


def test_a_margin_leaves_background_on_every_side_and_the_picture_whole() -> None:
    black = Image.new("RGB", (30, 60))
    pixels = pixels_from_image(black, 100, background=(255, 0, 0), margin=0.1)
    dark = pixels.max(axis=2) == 0
    rows, columns = (np.flatnonzero(dark.any(axis=axis)) for axis in (1, 0))
    assert (rows.min(), rows.max()) == (pytest.approx(10, abs=2), pytest.approx(89, abs=2))
    assert (columns.min(), columns.max()) == (pytest.approx(30, abs=2), pytest.approx(69, abs=2))
    assert (pixels[:8, :, 0] == 255).all()
    assert not pixels[:8, :, 1:].any(), "the margin is of the background's colour"


def test_the_largest_picture_is_reduced_for_its_margin_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "MAX_PIXELS", 10_000)
    seen: list[int] = []
    new = Image.new

    def watched(mode: str, size: tuple[int, int], *rest: Any) -> Image.Image:
        seen.append(size[0] * size[1])
        return new(mode, size, *rest)

    monkeypatch.setattr(Image, "new", watched)
    pixels_from_image(new("RGB", (100, 10)), 8, margin=0.2)
    assert seen
    assert max(seen) <= 10_000


def test_pixels_at_their_own_size_are_not_touched() -> None:
    pixels = noise(1, 20, 20, 3)
    np.testing.assert_array_equal(
        model_input_from_pixels(pixels, 20), pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255
    )


def test_a_wide_image_is_padded_and_not_stretched() -> None:
    pixels = pixels_from_image(Image.new("RGB", (40, 20), (255, 0, 0)), 40)
    assert pixels.shape == (40, 40, 3)
    assert (pixels[:10] == 255).all()
    assert (pixels[10:30] == (255, 0, 0)).all()


def test_a_photo_on_its_side_is_turned_upright() -> None:
    image = Image.new("RGB", (8, 4), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decoded_image(encoded(image, "JPEG", exif=exif)).size == (4, 8)


def test_transparency_shows_the_background_and_not_black() -> None:
    clear = encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))
    assert decoded_image(clear).getpixel((0, 0)) == (255, 255, 255)
    assert decoded_image(clear, background=(1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)
    grey = encoded(Image.new("LA", (4, 4), (0, 0)))
    assert decoded_image(grey).getpixel((0, 0)) == (255, 255, 255)


def test_a_transparent_palette_entry_shows_the_background() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    assert decoded_image(encoded(image)).getpixel((0, 0)) == (10, 20, 30)
    assert decoded_image(encoded(image, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    image = Image.fromarray(np.full((4, 4), 32896, np.uint16))
    assert decoded_image(encoded(image)).getpixel((0, 0)) == (128, 128, 128)


def test_other_modes_become_rgb() -> None:
    for mode in ("1", "L", "CMYK", "YCbCr"):
        form = "PNG" if mode in ("1", "L") else "TIFF"
        assert decoded_image(encoded(Image.new(mode, (3, 3)), form)).mode == "RGB"


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        *((mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "YCbCr", "I", "F")),
        *((mode, {"transparency": 7}) for mode in ("L", "P")),
        ("RGB", {"transparency": (0, 0, 0)}),
    ],
)
def test_a_large_image_is_converted_in_bands_and_looks_the_same(
    monkeypatch: pytest.MonkeyPatch, mode: str, options: dict[str, object]
) -> None:
    grey = Image.fromarray(noise(9, 5))
    image = Image.fromarray(noise(9, 5, 4)).convert("RGB") if mode in ("CMYK", "YCbCr") else grey
    if mode in ("I;16", "I", "F"):
        image = Image.fromarray(noise(9, 5).astype(np.uint16) * 200)
    data = encoded(image.convert(mode), "TIFF" if mode in ("CMYK", "YCbCr", "I", "F") else "PNG", **options)
    whole = np.asarray(decoded_image(data, background=(1, 2, 3)))
    monkeypatch.setattr("edgeglm.data.transforms._BAND", 11)
    banded = decoded_image(data, background=(1, 2, 3))
    assert banded.mode == "RGB"
    assert (np.asarray(banded) == whole).all()
    assert len(np.unique(whole)) > 1


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0])
def test_a_picture_of_floating_point_is_not_black(white: float) -> None:
    shares = np.array([[0.0, 0.5, 1.0]], np.float32)
    shown = np.asarray(decoded_image(encoded(Image.fromarray(shares * white), "TIFF")))
    assert np.abs(shown[0, :, 0].astype(int) - [0, 128, 255]).max() <= 1
    odd = np.array([[0.5, np.nan, np.inf]], np.float32) * white
    assert np.asarray(decoded_image(encoded(Image.fromarray(odd), "TIFF")))[0, 1:, 0].tolist() == [0, 255]


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("band", [2, 2**22])
def test_what_is_no_number_in_a_picture_of_floating_point_leaves_the_rest_as_it_is(
    monkeypatch: pytest.MonkeyPatch, odd: float, place: int, band: int
) -> None:
    """As where a depth camera saw nothing: the rest of the picture was black."""
    monkeypatch.setattr("edgeglm.data.transforms._BAND", band)
    shares = np.insert(np.array([0.0, 0.5, 1.0], np.float32), place, odd)[:, None]
    shown = np.asarray(decoded_image(encoded(Image.fromarray(shares), "TIFF")))[:, 0, 0]
    assert np.abs(np.delete(shown, place).astype(int) - [0, 128, 255]).max() <= 1
    assert shown[place] == (255 if odd == np.inf else 0)
    nothing = np.full((3, 1), odd, np.float32)
    assert len(np.unique(np.asarray(decoded_image(encoded(Image.fromarray(nothing), "TIFF"))))) == 1


def test_what_a_filter_leaves_beyond_white_does_not_make_a_picture_black() -> None:
    sharpened = np.array([[-0.03, 0.0, 0.5, 1.0, 1.04]], np.float32)
    shown = np.asarray(decoded_image(encoded(Image.fromarray(sharpened), "TIFF")))[0, :, 0]
    assert np.abs(shown.astype(int) - [0, 0, 128, 255, 255]).max() <= 1


_PEAK = """
import sys
from pathlib import Path
from typing import Any
from edgeglm.data.transforms import decoded_image
decoded_image(sys.stdin.buffer.read())
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("mode", ["I;16", "RGBA"])
def test_a_small_file_of_many_pixels_takes_no_multiple_of_them_on_the_way(mode: str) -> None:
    data = encoded(Image.new(mode, (4096, 4096)))
    assert len(data) < 100_000
    run = subprocess.run([sys.executable, "-c", _PEAK], input=data, capture_output=True, check=True)
    assert int(run.stdout) < 350_000  # kB: the pixels twice, and what a band takes


def test_what_a_decoder_raises_of_a_damaged_file_is_the_files_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("Failed to decode image: Missing or empty image item")  # as of an AVIF

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", refused)
    with pytest.raises(UserError, match="is damaged: Failed to decode image"):
        decoded_image(encoded(Image.new("L", (2, 2))))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("entry", ["odd", "whole", "junk"])
def test_a_photo_is_taken_upright_though_its_metadata_is_odd(form: str, entry: str) -> None:
    metadata = Image.Exif()
    metadata[ExifTags.Base.Orientation], metadata[ExifTags.Base.Make] = 6, "abcde"
    written = metadata.tobytes()
    if entry == "odd":  # a number where text is said to be: Pillow reads it and cannot write it
        text = struct.pack(">HHI", ExifTags.Base.Make, 2, 6)
        assert written.count(text) == 1
        written = written.replace(text, struct.pack(">HHI", ExifTags.Base.ImageLength, 2, 5))
    elif entry == "junk":
        written = written.replace(b"MM\0*", b"MQ\0*")
    size = (4, 8) if entry == "junk" else (8, 4)
    assert decoded_image(encoded(Image.new("RGB", (4, 8)), form, exif=written)).size == size


def test_a_decoder_that_falls_over_itself_means_a_damaged_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fallen(*_: object) -> None:
        raise AttributeError("'SpiderImageFile' object has no attribute 'stkoffset'")  # really seen

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fallen)
    with pytest.raises(UserError, match=r"is damaged: 'SpiderImageFile'.*give a whole image file"):
        decoded_image(encoded(Image.new("L", (2, 2))))


def test_what_is_no_file_to_read_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory; give the path of an image file"):
        decoded_image(tmp_path)
    with pytest.raises(UserError, match=r"cannot read .*null byte; give the path of an image file"):
        decoded_image(tmp_path / "a\0b")


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (0, 255, 0))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decoded_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(UserError, match=r"more than 99.*give a smaller one"):
        decoded_image(encoded(Image.new("L", (10, 10))), max_pixels=99)


@pytest.mark.parametrize("size", [(60_000, 9), (9, 60_000)])
def test_a_long_strip_does_not_fill_the_memory_with_its_square(size: tuple[int, int]) -> None:
    pixels = pixels_from_image(Image.new("RGB", size, (255, 0, 0)), 32)
    assert pixels.shape == (32, 32, 3)
    assert (pixels[0, 0] == 255).all()
    assert pixels[..., 1].min() < 255  # the strip is seen


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    path.write_bytes(encoded(Image.fromarray(noise(64, 64, 3)))[:2000])
    with pytest.raises(UserError, match=r"cut\.png"):
        decoded_image(path)
    with pytest.raises(UserError, match="no image at"):
        decoded_image(tmp_path / "absent.png")
    for junk in (b"", b"not an image"):
        with pytest.raises(UserError, match="not an image"):
            decoded_image(junk)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]), st.data())
def test_no_damage_escapes_as_a_traceback(form: str, data: st.DataObject) -> None:
    whole = bytearray(encoded(Image.fromarray(noise(9, 7, 3)), form))
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=4)):
        whole[place] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    with contextlib.suppress(UserError):
        assert decoded_image(cut, max_pixels=10_000).mode == "RGB"


def test_a_device_needs_no_heavy_library() -> None:
    code = (
        "import sys, edgeglm.data.transforms, edgeglm.data.tokenization\n"
        "heavy = {'torch', 'transformers', 'modelopt', 'PIL', 'tokenizers', 'onnxruntime', 'resvg_py'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_path_without_an_end_does_not_fill_the_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("edgeglm.data.transforms._MAX_BYTES", 2_000)
    large = tmp_path / "large.png"
    large.write_bytes(bytes(2_001))
    for path in (Path("/dev/zero"), large):
        with pytest.raises(UserError, match="has more than 2000 bytes; give an image file of a usual size"):
            decoded_image(path)


def test_a_picture_that_comes_through_a_pipe_is_read(tmp_path: Path) -> None:
    pipe, found = tmp_path / "pipe", list[tuple[int, int]]()
    os.mkfifo(pipe)
    reading = threading.Thread(target=lambda: found.append(decoded_image(pipe).size))
    reading.start()
    pipe.write_bytes(encoded(Image.new("RGB", (3, 2))))
    reading.join(20)
    assert found == [(3, 2)]


def test_a_postscript_file_starts_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("Ghostscript was asked for")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", started)
    source = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(UserError, match="is a PostScript program; give a PNG, JPEG or WebP"):
        decoded_image(source)


def test_pictures_decoded_in_two_threads_at_once_leave_the_process_its_warnings(monkeypatch):
    inside = [threading.Event(), threading.Event()]
    left = threading.Event()
    turn_upright = transforms._turn_upright

    def first_in_first_out(image: Image.Image) -> None:
        turn_upright(image)
        place = 0 if threading.current_thread() is first else 1
        inside[place].set()
        assert (inside[1], left)[place].wait(20)

    monkeypatch.setattr(transforms, "_turn_upright", first_in_first_out)
    picture = encoded(Image.fromarray(noise(4, 4, 3)))
    first, second = (threading.Thread(target=decoded_image, args=(picture,)) for _ in range(2))
    former = list(warnings.filters)
    first.start()
    assert inside[0].wait(20)
    second.start()
    first.join(20)
    left.set()
    second.join(20)
    assert warnings.filters == former
    with pytest.raises(UserWarning, match="half of it"):
        warnings.warn("half of it is lost", UserWarning, stacklevel=1)
