"""If these fail, a student that was killed starts over or goes another way, or one learns past its best."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")

import msgspec  # noqa: E402

from edgeglm.core.artifact import Artifact, listing_of  # noqa: E402
from edgeglm.core.errors import UserError  # noqa: E402
from edgeglm.core.progress import QuietProgress  # noqa: E402
from edgeglm.core.recipe import LossesConfig, StudentConfig  # noqa: E402
from edgeglm.core.stage import Context  # noqa: E402
from edgeglm.core.store import Store  # noqa: E402
from edgeglm.data.pairs import PairSet  # noqa: E402
from edgeglm.distill.stages import ImageStudentStage, TextStudentStage, mapped, text_rows  # noqa: E402
from edgeglm.distill.student_stage import StudentStage, StudentStageConfig  # noqa: E402
from edgeglm.distill.together import TogetherStage  # noqa: E402
from edgeglm.train.checkpoint import Checkpoint  # noqa: E402
from edgeglm.train.memory import memory_advice  # noqa: E402
from tests.synthetic import write_synthetic_pairs  # noqa: E402
from tests.tiny_towers import SPECIAL, WORDS, write_wordpiece  # noqa: E402

CONFIG = StudentConfig(
    size="edge-xs", inherit="", resolution=32, views=1, image_batch_size=32, max_length=8, text_batch_size=8,
    image_epochs=12, text_epochs=16, checkpoint_epochs=1, anchors=4,
)  # fmt: skip
STAGES: dict[str, type[StudentStage]] = {"image": ImageStudentStage, "text": TextStudentStage}
TOGETHER: dict[str, type[StudentStage]] = {"together": TogetherStage}
SCRIPT = """
import sys
from pathlib import Path
from tests.distill.test_students_go_on import trained
trained(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
"""


def write_inputs(folder: Path) -> None:
    """Pairs, and what a teacher of eight dimensions is said to have said to them."""
    pairs = PairSet.open(write_synthetic_pairs(folder / "pairs", size=32))
    rng = np.random.default_rng(0)
    (folder / "teacher").mkdir()
    write_wordpiece(folder / "teacher" / "tokenizer.json")
    (folder / "teacher" / "text.json").write_text('{"max_length": 8, "lowercase": true}')
    np.save(folder / "teacher" / "image_embeddings.npy", unit(rng, 2, len(pairs)))
    (folder / "targets").mkdir()
    texts = [*pairs.training_texts(), *(f"{a} {b}" for a in WORDS[:6] for b in WORDS[6:10])]
    (folder / "targets" / "texts.json").write_text(json.dumps(texts))
    np.save(folder / "targets" / "text_embeddings.npy", unit(rng, len(texts)))
    np.save(folder / "targets" / "words.npy", unit(rng, len(SPECIAL) + len(WORDS)))


def unit(rng: np.random.Generator, *shape: int) -> Any:
    rows = rng.standard_normal((*shape, 8)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def read_inputs(folder: Path) -> dict[str, Artifact]:
    return {
        name: Artifact(kind=name, path=folder / name, files=listing_of(folder / name), provenance={})
        for name in ("pairs", "teacher", "targets")
    }


def trained(folder: Path, store: Path, tower: str, config: StudentConfig = CONFIG) -> Artifact:
    stage = (STAGES | TOGETHER)[tower](StudentStageConfig(student=config, seed=0, view_seed=0))
    context = Context(store=Store(store), progress=QuietProgress(), threads=1)
    with pytest.MonkeyPatch.context() as patch:
        for name in STAGES:
            patch.setattr(f"edgeglm.distill.{name}_student.MIN_STEPS", 1)
        return stage(read_inputs(folder), context).artifact


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("said")
    write_inputs(folder)
    return folder


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_student_killed_at_once_goes_on_with_the_same_losses_to_the_same_bytes(
    folder: Path, tmp_path: Path, tower: str
) -> None:
    whole = trained(folder, tmp_path / "whole", tower)
    store, root = tmp_path / "store", Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), str(store), tower],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    limit = time.monotonic() + 120
    while not list(store.glob("checkpoints/*/*.pt")):
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < limit
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (kept,) = store.glob("checkpoints/*/*.pt")
    done = torch.load(kept, weights_only=True)["epoch"] + 1
    assert 0 < done < len(whole.provenance["measured"]["loss"])
    again = trained(folder, store, tower)
    assert again.provenance["measured"]["loss"] == whole.provenance["measured"]["loss"]
    assert again.files == whole.files
    assert not list(store.glob("checkpoints/*")), "what was kept goes when the student is stored"


def test_towers_that_learn_together_go_on_where_they_were_with_the_recipe_as_it_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their epochs are quarters of a training, so that every fourth was the end: a kill cost all of it."""
    losses = LossesConfig(steps=12, labels=1.0, affinity=1.0)
    config = msgspec.structs.replace(CONFIG, losses=losses, branches=True)
    config = msgspec.structs.replace(config, checkpoint_epochs=StudentConfig().checkpoint_epochs)
    whole = trained(folder, tmp_path / "whole", "together", config)
    write, kept = Checkpoint.write, list[int]()

    def killed(self: Checkpoint, state: Any) -> bool:
        write(self, state)
        kept.append(state["epoch"])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(folder, tmp_path / "store", "together", config)
    assert kept == [0]
    again = trained(folder, tmp_path / "store", "together", config)
    assert again.files == whole.files


def test_one_pixel_of_one_image_is_no_batch_and_says_what_to_raise(folder: Path, tmp_path: Path) -> None:
    config = msgspec.structs.replace(CONFIG, image_epochs=1, image_batch_size=1, resolution=8)
    with pytest.raises(UserError, match=r"; raise student\.image_batch_size or student\.resolution$"):
        trained(folder, tmp_path / "store", "image", config)
    two = msgspec.structs.replace(config, image_batch_size=2)
    assert trained(folder, tmp_path / "store", "image", two).files


def test_how_often_the_state_is_kept_is_no_part_of_a_student(folder: Path) -> None:
    inputs, keys = read_inputs(folder), set()
    for every in (0, 1, 7):
        student = msgspec.structs.replace(CONFIG, checkpoint_epochs=every)
        keys.add(TextStudentStage(StudentStageConfig(student=student, seed=0, view_seed=0)).key(inputs))
    assert len(keys) == 1


@pytest.mark.parametrize("tower", ["image", "text"])
def test_with_patience_a_student_stops_where_what_it_has_not_seen_gets_no_better(
    folder: Path, tmp_path: Path, tower: str
) -> None:
    # The teacher's words are noise here, so that nothing learnt of some holds for others.
    config = msgspec.structs.replace(CONFIG, patience=2, image_epochs=40, text_epochs=60)
    patient = trained(folder, tmp_path, tower, config).provenance["measured"]
    assert len(patient["loss"]) < {"image": config.image_epochs, "text": config.text_epochs}[tower]


def test_a_second_student_asks_the_teacher_nothing_and_reads_its_words_from_the_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a model was run")

    monkeypatch.setattr("edgeglm.engines.onnxruntime_engine.OnnxRuntimeEngine.__init__", refused)
    for size in ("edge-xs", "edge-s"):
        few = msgspec.structs.replace(CONFIG, size=size, image_epochs=1, text_epochs=1)
        for tower in STAGES:
            trained(folder, tmp_path / "store", tower, few)
    said = folder / "targets" / "text_embeddings.npy"
    before = said.read_bytes()
    rows = text_rows(read_inputs(folder))
    assert isinstance(np.load(said, mmap_mode="c"), np.memmap)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(said.resolve()) in maps.read_text(), "the tensor lies over the file itself"
    rows.zero_()
    assert said.read_bytes() == before, "not even a write reaches the store"
    assert torch.equal(mapped(said), torch.from_numpy(np.load(said)))


@pytest.mark.parametrize(
    "allocated",
    [lambda: torch.empty(1 << 50), lambda: np.empty(1 << 50), lambda: bytearray(1 << 60)],
    ids=["torch", "numpy", "python"],
)
def test_memory_that_does_not_suffice_says_what_to_lower(allocated: Any) -> None:
    told = pytest.raises(UserError, match=r"views: memory does not suffice; lower student\.views$")
    with told, memory_advice("views", "student.views"):
        allocated()
    with pytest.raises(RuntimeError, match="another matter"), memory_advice("views", "student.views"):
        raise RuntimeError("another matter")
