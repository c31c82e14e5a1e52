"""A teacher that is aligned in a second: its settings, its text tower, and all phases of its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edgeglm.adapt.alignment import Alignment
from edgeglm.adapt.text_teacher import TextTeacher, load_text_teacher
from edgeglm.core.artifact import Artifact
from edgeglm.core.progress import QuietProgress
from edgeglm.core.recipe import TeacherConfig
from edgeglm.train.concepts import Concepts
from edgeglm.train.loop import seeded

CONFIG = TeacherConfig(
    embedding_dim=16, hidden=32, warmup_epochs=1, epochs=1, batch_size=32, lora_epochs=1, lora_batch_size=16
)


def loaded(folder: Path, scratch: Path, *, max_length: int = 12) -> TextTeacher:
    """Return the text tower of a folder, which ``scratch`` may be unpacked into."""
    source = Artifact(kind="asset", path=folder, files={"config.json": "", "tokenizer.json": ""})
    return load_text_teacher(str(folder), source, scratch, max_length=max_length)


def teacher_of(
    features_VNF: torch.Tensor, concepts: Concepts, text: Any, config: TeacherConfig, **more: Any
) -> Alignment:
    """Align a teacher on cached features [views, images, width]; ``more`` goes to the alignment."""
    with seeded(0, threads=1):
        made = Alignment(features_VNF, concepts, text, config, seed=0, progress=QuietProgress(), **more)
        made.run()
    return made
