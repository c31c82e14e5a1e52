"""A teacher as `edgeglm adapt` wrote it: its towers in ONNX Runtime, and the classifiers that it learned.

Shapes: N images, T texts, F features, C classes of all tasks in a row, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edgeglm.core.errors import UserError, unknown_name
from edgeglm.data.tokenization import teacher_tokenizer
from edgeglm.data.transforms import ImagePreprocessing, model_input_from_files
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.evaluate.towers import BATCH, FloatRows, TextSettings, text_embeddings


class _Backbone(msgspec.Struct, frozen=True, kw_only=True):
    file: str
    resolution: int


class _Told(msgspec.Struct, frozen=True, kw_only=True):
    classes: dict[str, tuple[str, ...]] = {}
    margin: float = 0.0


def is_teacher(folder: Path) -> bool:
    """Return whether a folder holds a teacher."""
    return all((folder / name).is_file() for name in ("teacher.json", "backbones.json", "text.onnx"))


class TeacherTowers:
    """Both towers and the classifiers. Use as a context manager.

    Attributes:
        folder: Where the files are.
        classes: The classes of each task that was learned; empty for a teacher that retrieves only.
    """

    def __init__(self, folder: Path, *, threads: int = 1) -> None:
        """Open the files. Raises UserError where they are not those of a teacher."""
        try:
            decode = msgspec.json.decode
            backbones = decode((folder / "backbones.json").read_bytes(), type=tuple[_Backbone, ...])
            told = decode((folder / "teacher.json").read_bytes(), type=_Told)
            tokenizer, settings = teacher_tokenizer(folder)
        except (OSError, msgspec.DecodeError) as error:
            raise UserError(f"{folder} is no whole teacher: {error}; adapt it again") from error
        self.folder, self._threads, self._stack = folder, threads, ExitStack()
        self._text = TextSettings(tokenizer=tokenizer, max_length=settings.max_length)
        self.classes = told.classes
        self._backbones = [
            (ImagePreprocessing(resolution=one.resolution, margin=told.margin), self._opened(one.file))
            for one in backbones
        ]
        self._head = self._opened("image-head.onnx")
        self._kinds = self._opened("kinds.onnx") if self.classes else None

    def _opened(self, name: str) -> OnnxRuntimeEngine:
        engine = OnnxRuntimeEngine(self.folder / name, threads=self._threads, spinning=False)
        return self._stack.enter_context(engine)

    def __enter__(self) -> TeacherTowers:
        """Return it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close every file."""
        self._stack.close()

    def model_bytes(self) -> int:
        """Return the size of all its models."""
        return sum(path.stat().st_size for path in self.folder.glob("*.onnx"))

    def embed_images(self, images: Sequence[bytes | Path]) -> FloatRows:
        """Return float32 [N, D], of length one, of raw picture files. Raises UserError with the path."""
        return self._of_images(self._head, "embedding", images)

    def embed_text(self, texts: Sequence[str]) -> FloatRows:
        """Return float32 [T, D], of length one."""
        return text_embeddings(self.folder / "text.onnx", texts, self._text, threads=self._threads)

    def told_by_head(self, task: str, images: Sequence[bytes | Path]) -> npt.NDArray[np.int64]:
        """Return which of ``classes[task]`` the teacher's own classifier tells of each image, int64 [N].

        Raises UserError where it has none for the task.
        """
        if self._kinds is None:
            raise UserError(
                f"the teacher in {self.folder} learned no classes; "
                f"adapt it with teacher.multitask.{task}_weight above 0, or classify by prompt or centroid"
            )
        if task not in self.classes:
            raise unknown_name("task of the teacher", task, self.classes)
        first = 0
        for name, classes in self.classes.items():
            if name == task:
                break
            first += len(classes)
        logits_NC = self._of_images(self._kinds, "logits", images)
        ours = logits_NC[:, first : first + len(self.classes[task])]
        return np.asarray(ours.argmax(axis=1), dtype=np.int64)

    def _of_images(self, engine: Any, output: str, images: Sequence[bytes | Path]) -> FloatRows:
        rows = []
        for start in range(0, len(images), BATCH):
            files: Any = list(images[start : start + BATCH])
            features = [
                backbone.infer({"pixels": model_input_from_files(files, preprocessing)})
                for preprocessing, backbone in self._backbones
            ]
            joined_NF = np.concatenate([found["features"] for found in features], axis=1)
            rows.append(np.asarray(engine.infer({"features": joined_NF})[output], np.float32))
        return np.concatenate(rows)
