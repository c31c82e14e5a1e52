"""Raw texts and pictures through a whole bundle."""

from __future__ import annotations

import asyncio
import io
import itertools
import os
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edgeglm.bundle.atomic import put_in_place
from edgeglm.bundle.opened import Bundle
from edgeglm.bundle.verify import open_bundle
from edgeglm.core.errors import UserError
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.engines.protocol import Feeds
from edgeglm.runtime.config import RunnerConfig
from edgeglm.runtime.requests import EngineFailedError, RunnerClosedError
from edgeglm.runtime.retrieval import Retriever
from edgeglm.runtime.runner import Runner
from edgeglm.runtime.sync import SyncRunner
from edgeglm.runtime.towers import default_length_buckets, sources_from_bundle
from scripts.fixtures.colours import COLOURS, colour_bundle, colour_engine, colour_tower, picture
from tests.runtime.faults import ended, run

CONFIG = RunnerConfig(engine=colour_engine, hang_after=5.0)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return colour_bundle(tmp_path / "colours")


@pytest.fixture
def bundle(path: Path) -> Bundle:
    return open_bundle(path)


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 10^10 pixels."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def test_texts_and_pictures_asked_together_get_the_vectors_that_the_retriever_gets(path, tmp_path):
    file = tmp_path / "red.png"
    file.write_bytes(picture(COLOURS["red"]))
    words = ["red", "green", "blue", "red blue", "green green red red red"]
    with open_bundle(path) as bundle, Retriever(bundle, engine=colour_engine) as retriever:
        texts = retriever.embed_text(words)
        images = retriever.embed_images([picture(colour) for colour in COLOURS.values()])

    async def main() -> None:
        async with Runner(path, CONFIG) as served:
            found = await asyncio.gather(
                *(served.embed_text(word, deadline=5) for word in words),
                *(served.embed_image(picture(colour)) for colour in COLOURS.values()),
                served.embed_image(file),
            )
        np.testing.assert_allclose(found[:5], texts, atol=1e-6)
        np.testing.assert_allclose(found[5:8], images, atol=1e-6)
        np.testing.assert_allclose(found[8], images[0], atol=1e-6)

    run(main)


def test_a_real_bundle_runs_through_onnx_runtime_in_every_length(tmp_path):
    parts: dict[str, bytes] = {
        f"models/{variant}/{kind}.onnx": colour_tower(kind, scale=scale)
        for variant, scale in (("fp32", 1.0), ("int8", -1.0))
        for kind in ("image", "text")
    }
    with SyncRunner(
        colour_bundle(tmp_path / "b", **parts), RunnerConfig(threads=1, variant="int8")
    ) as served:
        rows = served.embed_texts(["red", "green blue", "blue red red red red red red red"])
        np.testing.assert_array_equal(rows, -np.eye(3, dtype=np.float32))
        image = served.embed_images([picture(COLOURS["green"])])
        np.testing.assert_allclose(image, [[0, 1, 0]], atol=1e-6)
        assert served.stats().answered == 4
        assert served._runner._current is not None
        assert served._runner._current.source.variant == "int8"
        assert served._runner._current.source.words == "ONNX Runtime"


FIRST_REQUESTS = """
import sys
from pathlib import Path
from edgeglm.runtime import RunnerConfig, SyncRunner
with SyncRunner(Path(sys.argv[1]), RunnerConfig(threads=1)) as served:
    before = set(sys.modules)
    served.embed_text("red")
    served.embed_image(Path(sys.argv[2]).read_bytes())
    print(sorted(set(sys.modules) - before))
"""


def test_the_first_requests_wait_for_no_import(tmp_path, repository):
    """It took ten times as long as the next; and a child forked meanwhile waited for ever for its lock."""
    parts = {f"models/{v}/{k}.onnx": colour_tower(k) for v in ("fp32", "int8") for k in ("image", "text")}
    served, image = colour_bundle(tmp_path / "b", **parts), tmp_path / "green.png"
    image.write_bytes(picture(COLOURS["green"]))
    command = [sys.executable, "-c", FIRST_REQUESTS, str(served), str(image)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_a_bundle_that_no_thread_can_open_is_told_as_that_and_not_opened_for_nobody_later(path, monkeypatch):
    start, opened = threading.Thread.start, []

    def none(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("edgeglm.runtime.opening._opened", lambda *source: opened.append(source))

    async def main() -> None:
        monkeypatch.setattr(threading.Thread, "start", none)
        with pytest.raises(EngineFailedError, match=r"no thread for opening the bundle .*; raise the limit"):
            await Runner(path, CONFIG).__aenter__()
        monkeypatch.setattr(threading.Thread, "start", start)
        await asyncio.get_running_loop().run_in_executor(None, str)
        assert opened == []

    run(main)


def test_a_picture_in_a_memoryview_that_was_released_is_the_callers_fault(path):
    released = memoryview(picture(COLOURS["green"]))
    released.release()
    with SyncRunner(path, CONFIG) as served, pytest.raises(UserError, match="was released; keep it until"):
        served.embed_image(released)  # type: ignore[arg-type]


def test_one_bad_input_among_good_ones_fails_alone(path, bundle, tmp_path):
    async def main() -> None:
        async with Runner(bundle, CONFIG) as served:
            expected = [None, "text is empty", "text is a int"]
            expected += [
                "tower 'text' got None; give a text",
                "",
                None,
                "over the limit of 40960; shorten it",
            ]
            expected += ["not an image", "more than"]
            expected += ["nowhere.png", "an image is a str; give the bytes", None]
            answers = await ended(
                served.embed_text("red"),
                served.embed_text("  "),
                served.embed_text(3),  # type: ignore[arg-type]
                served.embed_text(None),  # type: ignore[arg-type]
                served.embed_text("\ud800"),
                served.embed_text("red " * 10_000),
                served.embed_text("red " * 250_000),
                served.embed_image(b"no picture"),
                served.embed_image(bomb()),
                served.embed_image(tmp_path / "nowhere.png"),
                served.embed_image("nowhere.png"),  # type: ignore[arg-type]
                served.embed_image(picture(COLOURS["blue"])),
            )
            for answer, words in zip(
                answers,
                expected,
                strict=True,
            ):
                if words is None:
                    assert isinstance(answer, np.ndarray), answer
                else:
                    assert isinstance(answer, Exception)
                    assert words in str(answer)
            assert served.stats().held == 0

    run(main)
    assert path.is_dir()


def test_texts_of_one_length_bucket_share_a_call_and_others_do_not(bundle):
    seen: list[tuple[int, ...]] = []

    def engine(path: Path, threads: int):
        made = colour_engine(path, threads)
        made.calls = seen  # type: ignore[assignment]
        return made

    config = RunnerConfig(engine=engine, warm_up=False, length_buckets=(2, 5))

    async def main() -> None:
        async with Runner(bundle, config) as served:
            texts = ["red", "red blue", "red red red red", "red red red red red"]
            await asyncio.gather(*(served.embed_text(text) for text in texts))

    run(main)
    shapes = sorted(call["input_ids"] for call in seen)  # type: ignore[call-overload]
    assert shapes == [(2, 2), (2, 5)]


@given(st.integers(1, 600))
def test_length_buckets_rise_to_the_longest_and_waste_at_most_a_third(longest: int):
    buckets = default_length_buckets(longest)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] == longest
    assert all(longer <= max(8, 1.5 * shorter) for shorter, longer in itertools.pairwise(buckets))


def test_buckets_that_cannot_hold_the_longest_text_are_refused(bundle):
    with pytest.raises(UserError, match="add a bucket of 5"):
        sources_from_bundle(bundle, engine=colour_engine, length_buckets=(2, 4))
    with pytest.raises(UserError, match=r"\(5, 2\) do not rise from 1; sort them"):
        sources_from_bundle(bundle, engine=colour_engine, length_buckets=(5, 2))


def test_a_bucket_that_is_longer_than_any_text_is_refused_and_does_not_fail_in_the_engine(bundle):
    with pytest.raises(UserError, match="is 1000 and texts have up to 5 ids; let 5 be the longest"):
        sources_from_bundle(bundle, engine=colour_engine, length_buckets=(2, 1000))


@pytest.mark.parametrize(
    ("lengths", "words"),
    [((6, 6), "takes at most 5 along its ragged axis, got 6; cut it"), ((3, 2), "make them equal")],
)
def test_raw_ids_that_do_not_fit_are_refused(bundle, lengths, words):
    async def main() -> None:
        async with Runner(bundle, CONFIG) as served:
            ids, mask = (np.ones(length, np.int64) for length in lengths)
            with pytest.raises(UserError, match=words):
                await served.infer("text", {"input_ids": ids, "attention_mask": mask})
            short = np.zeros(2, np.int64)
            answer = await served.infer("text", {"input_ids": short, "attention_mask": short + 1})
            np.testing.assert_array_equal(answer["embedding"], np.eye(3)[0])

    run(main)


@pytest.mark.parametrize(
    ("name", "number", "words"),
    [
        ("input_ids", 10**6, "input_ids holds 1000000; give whole numbers from 0 to "),
        ("input_ids", -1, "input_ids holds -1; give whole numbers from 0 to "),
        ("attention_mask", 7, "attention_mask holds 7; give whole numbers from 0 to 1"),
    ],
)
def test_ids_that_no_token_has_fail_alone_and_never_reach_the_engine(bundle, name, number, words):
    def sample(one: int) -> dict[str, np.ndarray]:
        ids = np.ones(2, np.int64)
        return {"input_ids": ids, "attention_mask": ids, name: np.array([1, one])}

    async def main() -> None:
        async with Runner(bundle, CONFIG) as served:
            rows = [served.infer("text", sample(one)) for one in (1, number, 1)]
            first, bad, last = await asyncio.gather(*rows, return_exceptions=True)
            assert isinstance(bad, UserError)
            assert words in str(bad)
            for row in (first, last):
                assert not isinstance(row, BaseException)
                np.testing.assert_array_equal(row["embedding"], np.eye(3)[1])
            assert served.stats().accepted == 2

    run(main)


def test_a_swap_takes_the_tokenizer_with_it(path, tmp_path):
    other = colour_bundle(tmp_path / "other")

    async def main() -> None:
        async with Runner(path, CONFIG) as served:
            before = await served.embed_text("blue")
            await served.swap(other)
            np.testing.assert_array_equal(await served.embed_text("blue"), before)
            with pytest.raises(UserError, match="there is no bundle at"):
                await served.swap(tmp_path / "none")
            np.testing.assert_array_equal(await served.embed_text("blue"), before)

    run(main)


def test_a_bundle_that_lost_a_model_is_refused_by_the_name_of_the_file(path):
    (path / "models/fp32/text.onnx").unlink()

    async def main() -> None:
        with pytest.raises(UserError, match=r"text\.onnx"):
            async with Runner(path, CONFIG):
                pass

    run(main)


def test_an_instance_that_is_replaced_after_a_build_does_not_answer_for_another_bundle(tmp_path):
    """A build puts its bundle under the same path: its vectors passed for those of the opened one."""
    hangs, released = threading.Event(), threading.Event()

    class Hanging(OnnxRuntimeEngine):
        def _run(self, feeds: Feeds) -> list[np.ndarray]:
            if hangs.is_set():
                hangs.clear()
                released.wait(20)
            return super()._run(feeds)

    def made(place: str, scale: float) -> Path:
        names = [(variant, kind) for variant in ("fp32", "int8") for kind in ("image", "text")]
        parts = {f"models/{variant}/{kind}.onnx": colour_tower(kind, scale=scale) for variant, kind in names}
        return colour_bundle(tmp_path / place, **parts)

    def engine(file: Path, threads: int) -> Hanging:
        return Hanging(file, threads=threads)

    path, other = made("b", 1.0), made("other", -1.0)

    async def main() -> None:
        async with Runner(path, RunnerConfig(threads=1, engine=engine, hang_after=0.5)) as served:
            put_in_place(other, path)
            hangs.set()
            with pytest.raises(EngineFailedError, match="was given up"):
                await served.embed_text("red")
            with pytest.raises(EngineFailedError, match="another since the bundle was opened"):
                await served.embed_text("red")
            await served.swap(path)
            np.testing.assert_array_equal(await served.embed_text("red"), [-1, 0, 0])
            released.set()

    run(main)


def test_scripts_embed_lists_without_a_loop_of_their_own(path):
    with SyncRunner(path, CONFIG) as served:
        np.testing.assert_array_equal(served.embed_texts(["green", "red"]), np.eye(3)[[1, 0]])
        np.testing.assert_array_equal(served.embed_text("blue", deadline=5.0), np.eye(3)[2])
        assert served.embed_texts([]).shape[0] == 0
        np.testing.assert_allclose(served.embed_image(picture(COLOURS["red"])), np.eye(3)[0], atol=1e-6)
        with pytest.raises(UserError, match="empty"):
            served.embed_texts(["red", " ", "blue"])
        with pytest.raises(UserError, match=r"damaged|not an image"):
            served.embed_images([b""])
        assert served.infer("image", {"pixels": np.ones((3, 4, 4), np.float32)})["embedding"].shape == (3,)
        served.swap(path)
        assert served.stats().held == 0
    with pytest.raises(RunnerClosedError, match="use it in a 'with' statement"):
        served.embed_text("red")
    with pytest.raises(UserError, match="opened once"):
        served.__enter__()


def test_a_script_hears_why_its_bundle_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match="there is no bundle at"), SyncRunner(tmp_path / "none", CONFIG):
        pass


def test_a_large_photo_is_prepared_while_texts_go_on(bundle):
    buffer = io.BytesIO()
    Image.new("RGB", (3000, 3000), (255, 0, 0)).save(buffer, "PNG")

    async def main() -> None:
        async with Runner(bundle, CONFIG) as served:
            photo = asyncio.create_task(served.embed_image(buffer.getvalue()))
            await asyncio.sleep(0)
            await served.embed_text("red")
            assert not photo.done()
            await photo

    run(main)


def test_a_pipe_or_a_device_is_the_callers_error_and_holds_nobody_up(path, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    async def main() -> None:
        async with Runner(path, CONFIG) as served:
            for place in (pipe, Path("/dev/zero")):
                with pytest.raises(UserError, match=r"is a pipe or a device; give the bytes"):
                    await served.embed_image(place, deadline=1.0)
            assert served.stats().replaced == 0

    run(main)
