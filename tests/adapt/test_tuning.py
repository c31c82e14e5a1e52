"""If these fail, a text tower is tuned in another way than was asked, or exported as something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")
pytest.importorskip("peft", reason="the host half is not installed")

import msgspec  # noqa: E402

from edgeglm.adapt.frozen_prefix import kept_prefix  # noqa: E402
from edgeglm.adapt.targets import linear_layers, require_heirs_teacher, require_targets  # noqa: E402
from edgeglm.adapt.text_teacher import TextTeacher, keep_entries, load_text_teacher  # noqa: E402
from edgeglm.adapt.tuning import anatomy_of, enable_tuning, merge_tuning  # noqa: E402
from edgeglm.core.artifact import Artifact  # noqa: E402
from edgeglm.core.errors import UserError  # noqa: E402
from edgeglm.core.recipe import TeacherConfig  # noqa: E402
from edgeglm.export.parity import assert_parity  # noqa: E402
from edgeglm.export.torch_to_onnx import onnx_from_module  # noqa: E402
from tests.adapt.teachers import loaded  # noqa: E402
from tests.tiny_towers import write_bert, write_clip  # noqa: E402

TEXTS = ["a red circle", "blue", "river stone cloud", "a green ring"]
WAYS = ("lora", "rslora", "dora", "ia3", "bottleneck", "prompt", "p-tuning", "partial", "full")
#: What is no plain BERT after the merge must still be exported as it is.
EXPORTED = ("bottleneck", "prompt", "p-tuning")


@pytest.fixture
def teacher(bert: Path, tmp_path: Path) -> TextTeacher:
    return loaded(bert, tmp_path)


def configured(way: str, **others: Any) -> TeacherConfig:
    blocks = 1 if way == "partial" else 0
    return msgspec.convert(
        {"tuning": way, "lora_rank": 4, "tuned_blocks": blocks, "virtual_tokens": 3, **others}, TeacherConfig
    )


def trained(teacher: TextTeacher, parameters: list[Any]) -> None:
    """Take a few steps towards other features, so that every way has something to merge."""
    goal = torch.randn(len(TEXTS), teacher.tower.feature_dim, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        torch.autograd.backward(((teacher.features(TEXTS) - goal) ** 2).mean())
        optimizer.step()


@pytest.mark.parametrize("way", WAYS)
def test_each_way_trains_merges_exactly_and_exports(way: str, teacher: TextTeacher, tmp_path: Path) -> None:
    plain = teacher.all_features(TEXTS)
    total = sum(parameter.numel() for parameter in teacher.tower.parameters())
    parameters = enable_tuning(teacher, configured(way))
    count = sum(parameter.numel() for parameter in parameters)
    assert count == total if way == "full" else 0 < count < total
    untouched = {
        name: value.clone()
        for name, value in teacher.tower.named_parameters()
        if not any(value is p for p in parameters)
    }
    trained(teacher, parameters)
    for name, value in teacher.tower.named_parameters():
        if name in untouched:
            assert torch.equal(value, untouched[name]), f"{name} was to stay"
    tuned = teacher.all_features(TEXTS)
    assert float((tuned - plain).abs().max()) > 1e-3
    assert merge_tuning(teacher, TEXTS) < 1e-5
    torch.testing.assert_close(teacher.all_features(TEXTS), tuned, atol=1e-5, rtol=0)
    assert not any(parameter.requires_grad for parameter in teacher.tower.parameters())
    if way not in EXPORTED:
        return
    ids, mask = (torch.from_numpy(a) for a in teacher.tokenizer.encode(TEXTS, max_length=12))
    feeds = {"input_ids": ids, "attention_mask": mask}
    free = {0: "batch", 1: "length"}

    class Features(torch.nn.Module):  # type: ignore[misc,name-defined] # torch may be absent
        def __init__(self) -> None:
            super().__init__()
            self.tower = teacher.tower

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.tower(input_ids, attention_mask)

    module, path = Features().eval(), tmp_path / "text.onnx"
    onnx_from_module(module, feeds, path, output_names=("embedding",),
                     dynamic_axes={"input_ids": free, "attention_mask": free})  # fmt: skip
    assert_parity(
        module, path, [feeds, {"input_ids": ids[:1, :3], "attention_mask": mask[:1, :3]}], atol=1e-5
    )


def test_a_prompt_changes_a_text_whatever_its_company(teacher: TextTeacher) -> None:
    enable_tuning(teacher, configured("prompt"))
    together = teacher.all_features(TEXTS)
    for text, row in zip(TEXTS, together, strict=True):
        torch.testing.assert_close(teacher.all_features([text])[0], row, atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", ["lora", "dora", "ia3", "bottleneck", "partial"])
def test_a_kept_prefix_gives_the_same_features_and_gradients(way: str, teacher: TextTeacher) -> None:
    parameters = enable_tuning(teacher, configured(way, tuned_blocks=1, lora_dropout=0.0))
    teacher.tower.eval()

    def gradients() -> list[Any]:
        found = teacher.features(TEXTS)
        torch.autograd.backward((found**2).sum())
        given = [p.grad.clone() for p in parameters if p.grad is not None]
        for parameter in parameters:
            parameter.grad = None
        return [found.detach(), *given]

    plain = gradients()
    with kept_prefix(teacher, TEXTS, 1):
        assert len(anatomy_of(teacher.tower.encoder).blocks) == 1
        kept = gradients()
    for one, other in zip(plain, kept, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(teacher.features(TEXTS).detach(), plain[0], atol=0, rtol=0)


def test_only_the_last_blocks_train_where_so_many_are_asked_for(teacher: TextTeacher) -> None:
    one = sum(p.numel() for p in enable_tuning(teacher, configured("lora", tuned_blocks=1)))
    assert one == 2 * 2 * 4 * 32, "targets, factors, rank, width of one block"


@pytest.mark.parametrize(
    ("way", "others", "message"),
    [
        ("dora", {"lora_targets": ("q_proj",)}, r"names q_proj.*choose from .*query"),
        ("partial", {"tuned_blocks": 9}, r"has 2 blocks; choose 1 to 2"),
        ("partial", {"tuned_blocks": 0}, r"tuned_blocks is 0 .*choose 1 to 2"),
        ("prompt", {"tuned_blocks": 1}, r"set teacher\.tuned_blocks to 0"),
    ],
)
def test_what_cannot_be_tuned_is_said_with_what_can(
    way: str, others: dict[str, Any], message: str, teacher: TextTeacher
) -> None:
    with pytest.raises(UserError, match=message):
        enable_tuning(teacher, configured(way, **others))


@pytest.mark.parametrize("first", ["lora", "dora", "bottleneck", "prompt"])
def test_what_is_tuned_already_is_not_tuned_again(first: str, teacher: TextTeacher) -> None:
    enable_tuning(teacher, configured(first))
    for second in ("lora", "ia3", "bottleneck", "full"):
        with pytest.raises(UserError, match="is being tuned already; merge what it has"):
            enable_tuning(teacher, configured(second))


@pytest.mark.parametrize(("kind", "names"), [("bert", ("query", "value")), ("clip", ("q_proj", "v_proj"))])
def test_a_model_of_another_family_needs_no_names_of_layers(
    kind: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    folder = {"bert": write_bert, "clip": write_clip}[kind](tmp_path / kind)
    files = {path.name: "" for path in folder.iterdir() if path.is_file()}
    source = Artifact(kind="asset", path=folder, files=files)
    linear = linear_layers(str(folder), source)
    assert {*names, "k_proj" if kind == "clip" else "key"} <= linear
    assert not [name for name in linear if "embed" in name or "projection" in name]
    require_targets(TeacherConfig(text=str(folder)), source)
    wrong = TeacherConfig(text=str(folder), lora_targets=("attention",))
    with pytest.raises(UserError, match=rf"names attention, .*choose from .*{names[0]}"):
        require_targets(wrong, source)
    teacher = load_text_teacher(str(folder), source, tmp_path / "scratch", max_length=12)
    enable_tuning(teacher, TeacherConfig())
    adapted = [name for name, _ in teacher.tower.named_parameters() if ".lora_A" in name]
    assert {name.split(".lora_A")[0].rpartition(".")[2] for name in adapted} == set(names)


def test_a_tower_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match=r"Linear has no blocks .*set teacher\.tuning"):
        anatomy_of(torch.nn.Linear(2, 2))


def test_a_smaller_vocabulary_says_the_same_of_every_text_that_it_kept(
    teacher: TextTeacher, tmp_path: Path
) -> None:
    texts = ["a red circle", "blue", "river"]
    before, whole = teacher.all_features(texts), teacher.tokenizer.vocabulary_size
    keep_entries(teacher, texts, 0, tmp_path / "none")
    assert teacher.tokenizer.vocabulary_size == whole
    keep_entries(teacher, texts, whole - 6, tmp_path / "kept")
    assert teacher.tokenizer.vocabulary_size == whole - 6
    encoder: Any = teacher.tower.encoder
    assert encoder.get_input_embeddings().num_embeddings == whole - 6
    torch.testing.assert_close(teacher.all_features(texts), before, atol=1e-6, rtol=0)
    parameters = enable_tuning(teacher, configured("lora"))
    trained(teacher, parameters)
    assert merge_tuning(teacher, texts) < 1e-5
    with pytest.raises(UserError, match=r"teacher\.vocabulary is 3"):
        keep_entries(teacher, texts, 3, tmp_path / "few")


def test_a_vocabulary_is_not_taken_from_a_tower_that_finds_its_end_by_number(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip")
    source = Artifact(kind="asset", path=clip, files={"config.json": "", "tokenizer.json": ""})
    tower = load_text_teacher(str(clip), source, tmp_path / "scratch", max_length=8)
    with pytest.raises(UserError, match="set it to 0"):
        keep_entries(tower, ["red"], 5, tmp_path / "kept")


@pytest.mark.parametrize(
    ("kind", "said"), [("bert", "32 wide and the student's 384"), ("clip", "no layers of BERT to inherit")]
)
def test_a_student_that_cannot_inherit_is_refused_by_the_teachers_file_alone(
    kind: str, said: str, tmp_path: Path
) -> None:
    folder = {"bert": write_bert, "clip": write_clip}[kind](tmp_path / kind)
    source = Artifact(kind="asset", path=folder, files={path.name: "" for path in folder.iterdir()})
    require_heirs_teacher("edge-s", str(folder), source)
    with pytest.raises(UserError, match=rf"{said}.*; set student.size to 'edge-s'"):
        require_heirs_teacher("edge-heir-s", str(folder), source)


@pytest.mark.parametrize("blocks", [0, 1])
@pytest.mark.parametrize(("dropout", "merged"), [(0.0, True), (0.1, False)])
def test_lora_without_dropout_takes_one_product_a_layer_and_goes_back_to_a_plain_tower(
    teacher: TextTeacher, blocks: int, dropout: float, merged: bool
) -> None:
    config = configured("lora", tuned_blocks=blocks, lora_dropout=dropout)
    for parameter in enable_tuning(teacher, config):
        torch.nn.init.normal_(parameter, std=0.05)
    layers = [module for module in teacher.tower.encoder.modules() if hasattr(module, "lora_A")]
    assert layers
    assert {type(layer).__name__ == "MergingLinear" for layer in layers} == {merged}
    assert merge_tuning(teacher, ["a red circle", "blue"]) < 1e-5
