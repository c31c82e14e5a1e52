"""Coverage-guided fuzzing of what reads bytes from outside: pictures, texts, tensors, messages, requests.

    python -m tests.serve.fuzz_decoders TARGET [FOLDER or FILE] [libFuzzer's options, -max_total_time=600]

``TARGET`` is a key of ``TARGETS``. A decoder may answer, or refuse with an EdgeglmError; whatever else it
raises would be a 500 to the caller. Then libFuzzer ends with an error and leaves the input as ``crash-...``,
which is given as ``FILE`` to see it again. ``FOLDER`` keeps the inputs that reached new code.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["PIL", "edgeglm"], enable_loader_override=False):
    from PIL import Image, features

    from edgeglm.bundle.verify import open_bundle
    from edgeglm.core.errors import EdgeglmError, UserError
    from edgeglm.data.tokenization import Tokenizer
    from edgeglm.data.transforms import ImagePreprocessing, decoded_image
    from edgeglm.index.pictures import thumbnail_of
    from edgeglm.runtime.towers import image_preparation, text_preparation
    from edgeglm.serve.grpc_messages import infer_arrays, limits_of, message
    from edgeglm.serve.grpc_wire import asked_from_bytes
    from edgeglm.serve.models import text_from_bytes
    from edgeglm.serve.plain_routes import picture_from_base64
    from edgeglm.serve.v2_infer import plain_body
    from edgeglm.serve.v2_messages import infer_request
    from edgeglm.serve.whole_requests import Heads
    from scripts.fixtures.colours import colour_bundle

Check = Callable[[bytes], object]


def image_check() -> Check:
    """Decode a picture for the tower, as the server and the index do."""
    prepare = image_preparation(ImagePreprocessing(resolution=32))

    def check(data: bytes) -> None:
        (sample,) = prepare([data])
        if isinstance(sample, EdgeglmError):
            raise sample
        pixels = sample["pixels"]
        assert pixels.shape == (3, 32, 32), pixels.shape
        assert 0 <= pixels.min() <= pixels.max() <= 1, "pixels out of range"
        thumbnail_of(decoded_image(data), 16)

    return check


def text_check() -> Check:
    """Decode and tokenise a text."""
    with tempfile.TemporaryDirectory() as folder, open_bundle(colour_bundle(Path(folder) / "b")) as bundle:
        prepare = text_preparation(Tokenizer(bundle.tokenizer_path, lowercase=True), 5)

    def check(data: bytes) -> None:
        (sample,) = prepare([text_from_bytes(data)])
        if isinstance(sample, EdgeglmError):
            raise sample
        assert 0 < len(sample["input_ids"]) == len(sample["attention_mask"]) <= 5, sample

    return check


def body_check() -> Check:
    """Read an inference request over HTTP; the first two bytes are the length of its JSON, if not 0."""
    return lambda data: infer_request(data[2:], int.from_bytes(data[:2], "little") or None)


def compressed_check() -> Check:
    """Unpack a compressed body, or a picture in base64."""

    def check(data: bytes) -> None:
        kind, rest = data[:1], data[1:]
        if kind == b"b":
            picture_from_base64(rest.decode("latin-1"))
        assert len(plain_body(rest, b"gzip" if kind == b"g" else b"deflate", 1 << 20)) <= 1 << 20

    return check


def message_check() -> Check:
    """Read an inference request over gRPC, from its bytes and as a message, which must agree."""
    from google.protobuf.message import DecodeError

    kind = message("ModelInferRequest")

    def check(data: bytes) -> None:
        try:
            request = kind.FromString(data)
            arrays, limits = infer_arrays(request), limits_of(request)
        except (DecodeError, EdgeglmError):
            with contextlib.suppress(UserError):
                asked_from_bytes(data, lambda *_: None)
                raise AssertionError("what is refused as a message is taken as bytes") from None
            return
        asked = asked_from_bytes(data, lambda *_: None)
        assert (asked.deadline, asked.priority) == limits
        assert list(asked.arrays) == list(arrays)
        for name, array in arrays.items():
            other = asked.arrays[name]
            assert (other.dtype, other.shape) == (array.dtype, array.shape)
            assert other.tolist() == array.tolist() or array.dtype.kind == "f"

    return check


def request_check() -> Check:
    """Take HTTP apart on the short way."""
    return Heads().whole_request


def pictures() -> Iterator[bytes]:
    """Small pictures of every kind that Pillow writes here."""
    modes = {
        "PNG": ("RGBA", "I;16", "P", "1", "LA"),
        "JPEG": ("RGB", "CMYK", "L"),
        "TIFF": ("RGB", "CMYK", "F"),
    }
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "ICO", "PPM", "TGA", "WEBP"):
        for mode in modes.get(kind, ("RGB",)):
            out = io.BytesIO()
            if kind != "WEBP" or features.check("webp"):
                Image.new(mode, (16, 9)).save(out, kind)
                yield out.getvalue()
    frames, out = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")], io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    yield out.getvalue()


def bodies() -> Iterator[bytes]:
    """Requests in JSON and with a binary tensor."""
    yield b'\0\0{"inputs":[{"name":"x","shape":[1,2],"datatype":"INT64","data":[1,2]}],"id":"a"}'
    yield b'\0\0{"inputs":[{"name":"t","shape":[1],"datatype":"BYTES","data":["red"]}]}'
    head = b'{"inputs":[{"name":"x","shape":[2],"datatype":"FP32","parameters":{"binary_data_size":8}}]}'
    yield len(head).to_bytes(2, "little") + head + b"\0" * 8


def messages() -> Iterator[bytes]:
    """Requests with raw and with typed contents."""
    request = message("ModelInferRequest")(model_name="text")
    request.inputs.add(name="x", datatype="INT64", shape=[1, 2]).contents.int64_contents.extend([1, 2])
    request.parameters["timeout"].int64_param = 5
    yield request.SerializeToString()
    request.inputs[0].contents.Clear()
    request.raw_input_contents.append(bytes(16))
    yield request.SerializeToString()


HTTP = b"POST /v2/models/text/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}"
TARGETS: dict[str, tuple[Callable[[], Check], Callable[[], Sequence[bytes]]]] = {
    "image": (image_check, lambda: list(pictures())),
    "text": (text_check, lambda: [b"a red thing", "blå  \u200d\U0001f34e".encode()]),
    "body": (body_check, lambda: list(bodies())),
    "compressed": (compressed_check, lambda: [b"bUElO", b"g\x1f\x8b\x08", b"dx\x9c\x03\0\0\0\0\x01"]),
    "message": (message_check, lambda: list(messages())),
    "request": (request_check, lambda: [HTTP]),
}


def main(target: str, *options: str) -> None:
    """Fuzz until libFuzzer's options say enough."""
    make, seeds = TARGETS[target]
    check = make()
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(seeds()):
            (Path(folder) / f"seed-{number}").write_bytes(seed)

        def one(data: bytes) -> None:
            with contextlib.suppress(EdgeglmError):
                check(data)

        kept = [option for option in options if not option.startswith("-")]
        rest = [option for option in options if option.startswith("-")]
        places = kept if kept and Path(kept[0]).is_file() else [*kept, folder]
        # a picture of 100 million pixels is allowed, and takes some hundred MB
        atheris.Setup([sys.argv[0], *places, "-timeout=20", "-rss_limit_mb=4096", *rest], one)
        atheris.Fuzz()


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"{__doc__}\nTargets: {', '.join(TARGETS)}")
    main(*sys.argv[1:])
