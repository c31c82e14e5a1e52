"""The stages of distillation: cached targets, then each student tower on its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import numpy as np

from edgeglm.core.artifact import Artifact
from edgeglm.core.progress import Progress
from edgeglm.core.recipe import StudentConfig
from edgeglm.core.stage import Context, Inputs, Stage
from edgeglm.core.store import Store
from edgeglm.data.pairs import PairSet
from edgeglm.data.tokenization import Tokenizer, teacher_tokenizer
from edgeglm.distill.student_stage import StudentStage

if TYPE_CHECKING:
    from edgeglm.models.students import StudentTextTower


def student_inputs(config: StudentConfig, store: Store, progress: Progress) -> dict[str, Artifact]:
    """Fetch what the image student inherits, if anything: ``inherit``."""
    from edgeglm.assets import fetch_asset

    return {name: fetch_asset(spec, store, progress) for name, spec in student_assets(config).items()}


def student_assets(config: StudentConfig) -> dict[str, str]:
    """Return what ``student_inputs`` fetches, by the name of the input."""
    return {"inherit": config.inherit} if config.inherit else {}


class TargetsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many phrases besides the captions, and the seed that draws them."""

    corpus: int
    seed: int


class TargetsStage(Stage[TargetsConfig]):
    """What the teacher says to the texts a student learns from.

    ``texts.json`` (the distinct captions first), ``text_embeddings.npy`` float32 [T, D], and ``words.npy``
    float32 [W, D]: a start for each entry of the vocabulary, which is what the teacher says to it alone
    unless an evaluation asks for it. Of the texts of evaluations the teacher answers captions only.
    """

    name = "targets"
    code: ClassVar[tuple[str, ...]] = (
        "edgeglm.distill.corpus",
        "edgeglm.distill.stages",
        "edgeglm.distill.words",
        "edgeglm.evaluate.towers",
        "edgeglm.data.tokenization",
    )
    libraries: ClassVar[tuple[str, ...]] = ("onnxruntime-gpu", "onnx", "tokenizers", "numpy")

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Draw the texts, embed them in ONNX Runtime."""
        from edgeglm.distill.corpus import distillation_texts, ordinary_words
        from edgeglm.distill.words import asked_entries, forbidden_texts, word_rows
        from edgeglm.evaluate.towers import TextSettings, text_embeddings

        pairs, teacher = PairSet.open(inputs["pairs"]), inputs["teacher"].path
        tokenizer, settings = teacher_tokenizer(teacher)
        asked = {query.text for track in pairs.tracks for query in track.queries}
        captions = pairs.training_texts()
        forbidden = forbidden_texts(asked, captions)
        texts = distillation_texts(
            captions,
            ordinary_words(tokenizer.vocabulary(), captions),
            count=self.config.corpus,
            excluded=asked,
            seed=self.config.seed,
        )
        path, threads = teacher / "text.onnx", context.threads
        with context.progress.task("Student: the teacher's words", total=None):
            text = TextSettings(tokenizer=tokenizer, max_length=settings.max_length)
            rows = text_embeddings(path, texts, text, threads=threads)
            words = word_rows(path, tokenizer, forbidden, threads=threads)
            np.save(out / "words.npy", words)
        (out / "texts.json").write_text(json.dumps(texts, ensure_ascii=False))
        np.save(out / "text_embeddings.npy", rows)
        withheld = int(asked_entries(tokenizer, forbidden).sum())
        return {"captions": len(captions), "texts": len(texts), "words": len(words), "withheld": withheld}


class ImageStudentStage(StudentStage):
    """The image tower: ``image.safetensors`` and ``image.json``."""

    name = "distil-image"

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Train on the cached embeddings."""
        from edgeglm.distill.image_student import fit_image_student, image_student, image_targets
        from edgeglm.models.published import lite0_state
        from edgeglm.train.concepts import Concepts
        from edgeglm.train.loop import seeded

        pairs, config = PairSet.open(inputs["pairs"]), self.config.student
        concepts = Concepts.of(pairs)
        concept_N = concept_of_images(pairs, concepts)
        anchor_KD = anchors(text_rows(inputs), concepts, config.anchors, seed=self.config.seed)
        teacher_VND = mapped(inputs["teacher"].path / "image_embeddings.npy")
        inherit = lite0_state(inputs["inherit"]) if "inherit" in inputs else None
        with (
            self.keeping(inputs, context) as keeper,
            seeded(self.config.seed, threads=context.threads),
        ):
            tower = image_student(config, embedding_dim=teacher_VND.shape[2], inherit=inherit)
            curve = fit_image_student(
                tower,
                pairs,
                image_targets(teacher_VND, config),
                anchor_KD,
                concept_N,
                config,
                seed=self.config.seed,
                view_seed=self.config.view_seed,
                progress=context.progress,
                keeper=keeper,
            )
            return saved(tower, "image", out, {"embedding_dim": int(teacher_VND.shape[2])}, curve)


class TextStudentStage(StudentStage):
    """The text tower: ``text.safetensors`` and ``text.json``."""

    name = "distil-text"

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Train on the cached embeddings."""
        from edgeglm.distill.text_student import fit_text_student
        from edgeglm.train.concepts import Concepts
        from edgeglm.train.loop import seeded

        pairs, config = PairSet.open(inputs["pairs"]), self.config.student
        teacher = inputs["teacher"].path
        texts = json.loads((inputs["targets"].path / "texts.json").read_text("utf-8"))
        rows_TD = text_rows(inputs)
        images_ND = mapped(teacher / "image_embeddings.npy")[0]
        anchor_KD = concept_means(images_ND, Concepts.of(pairs))
        config, tokenizer, kept = own_tokenizer(config, inputs, pairs.training_texts(), out)
        with (
            self.keeping(inputs, context) as keeper,
            seeded(self.config.seed, threads=context.threads),
        ):
            tower = started_text(
                config,
                inputs,
                kept,
                teacher=self.config.teacher,
                embedding_dim=rows_TD.shape[1],
                context=context,
            )
            curve = fit_text_student(
                tower,
                tokenizer,
                texts,
                rows_TD,
                anchor_KD,
                config,
                captions=len(pairs.training_texts()),
                seed=self.config.seed,
                progress=context.progress,
                keeper=keeper,
            )
            return saved(tower, "text", out, text_shape(config, tokenizer, rows_TD.shape[1]), curve)


def own_tokenizer(
    config: StudentConfig, inputs: Inputs, captions: Sequence[str], out: Path
) -> tuple[StudentConfig, Tokenizer, Any]:
    """Write the student's ``tokenizer.json``.

    Returns the configuration with the length that the teacher can take, the tokenizer, and int64 [W], the
    teacher's id of each entry; None for the whole vocabulary.
    """
    from edgeglm.data.vocabulary import trimmed_tokenizer

    teacher = inputs["teacher"].path
    whole, settings = teacher_tokenizer(teacher)
    config = msgspec.structs.replace(config, max_length=min(config.max_length, settings.max_length))
    path, kept = out / "tokenizer.json", None
    if config.vocabulary and config.vocabulary < whole.vocabulary_size:
        trimmed = trimmed_tokenizer(
            teacher / "tokenizer.json", captions, count=config.vocabulary, lowercase=settings.lowercase
        )
        path.write_text(trimmed.text, "utf-8")
        kept = trimmed.kept
    else:
        shutil.copyfile(teacher / "tokenizer.json", path)
    return config, Tokenizer(path, lowercase=settings.lowercase), kept


def started_text(
    config: StudentConfig, inputs: Inputs, kept: Any, *, teacher: str, embedding_dim: int, context: Context
) -> StudentTextTower:
    """Make the text tower and start it from the teacher: its words, or with an heir's shape its layers.

    Args:
        config: The recipe's.
        inputs: ``targets``, and for an heir ``text``, the teacher's source.
        kept: From :func:`own_tokenizer`.
        teacher: What the recipe calls the text teacher; read for an heir alone.
        embedding_dim: D.
        context: For scratch space.
    """
    import torch

    from edgeglm.distill.text_student import text_student
    from edgeglm.models.heirs import inherit_text
    from edgeglm.models.pretrained_hf import load_text_tower
    from edgeglm.models.published import text_model_folder
    from edgeglm.models.student_shapes import student_shape

    words_WD = mapped(inputs["targets"].path / "words.npy")
    rows = None if kept is None else torch.from_numpy(kept)
    tower = text_student(
        config, embedding_dim=embedding_dim, words_WD=words_WD if rows is None else words_WD[rows]
    )
    if student_shape(config.size).heir:
        with context.store.scratch() as folder:
            source = text_model_folder(teacher, inputs["text"], folder / "text")
            inherit_text(tower, load_text_tower(source).encoder, rows)
    return tower


def text_shape(config: StudentConfig, tokenizer: Tokenizer, embedding_dim: int) -> dict[str, int]:
    """Return what a text tower is made anew from, besides its size."""
    return {
        "embedding_dim": int(embedding_dim),
        "vocabulary": tokenizer.vocabulary_size,
        "max_length": config.max_length,
    }


def text_rows(inputs: Inputs) -> Any:
    """Return the teacher's embeddings of the texts, float32 [T, D], mapped from the store."""
    return mapped(inputs["targets"].path / "text_embeddings.npy")


def mapped(path: Path) -> Any:
    """Return a cached array as a tensor over the file itself: what is not read takes no memory.

    The map is private to the process, so that not even a write would reach the store.
    """
    import torch

    return torch.from_numpy(np.load(path, mmap_mode="c"))


def concept_of_images(pairs: PairSet, concepts: Any) -> Any:
    """Return the concept of each image, int64 [N]; -1 where training may not know it."""
    import torch

    concept_N = torch.full((len(pairs),), -1)
    concept_N[concepts.image_N] = concepts.concept_N
    return concept_N


def anchors(rows_TD: Any, concepts: Any, more: int, *, seed: int) -> Any:
    """Return the names' embeddings, and those of ``more`` phrases that are no captions: [K + more, D].

    With names alone a student learns the space only where the domain's names lie, and loses the
    words that people search with.
    """
    import torch

    phrases_TD = rows_TD[len(concepts.texts) :]
    order = torch.randperm(len(phrases_TD), generator=torch.Generator().manual_seed(seed))
    return torch.cat([rows_TD[concepts.names()], phrases_TD[order[:more]]])


def concept_means(images_ND: Any, concepts: Any) -> Any:
    """Return the mean teacher embedding of each concept's labelled images, of length one: [K, D]."""
    import torch

    from edgeglm.models.projection import normalized

    sums_KD = torch.zeros(len(concepts), images_ND.shape[1])
    sums_KD.index_add_(0, concepts.concept_N, images_ND[concepts.image_N])
    return normalized(sums_KD)


def saved(tower: Any, kind: str, out: Path, shape: dict[str, int], curve: list[float]) -> dict[str, Any]:
    """Write a tower and its shape; return its number of parameters and its losses."""
    from safetensors.torch import save_file

    state = {name: tensor.contiguous() for name, tensor in tower.state_dict().items()}
    save_file(state, out / f"{kind}.safetensors")
    (out / f"{kind}.json").write_text(json.dumps(shape, sort_keys=True))
    parameters = sum(parameter.numel() for parameter in tower.parameters())
    return {"parameters": parameters, "loss": curve}
