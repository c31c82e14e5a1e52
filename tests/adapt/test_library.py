"""If these fail, the loop in the documentation does not run as written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")
pytest.importorskip("peft", reason="the host half is not installed")

import edgeglm  # noqa: E402
from edgeglm.core.errors import UserError  # noqa: E402
from tests.synthetic import COLOURS, drawn  # noqa: E402
from tests.tiny_towers import write_bert, write_vit  # noqa: E402


@pytest.fixture
def model(tmp_path: Path) -> edgeglm.PretrainedModel:
    text, image = tmp_path / "bert", tmp_path / "vit"
    for folder in (text, image):
        folder.mkdir()
    torch.manual_seed(0)
    return edgeglm.from_pretrained(
        str(write_bert(text)), image=str(write_vit(image)), embedding_dim=16, store=tmp_path / "store"
    )


def batch(resolution: int) -> tuple[Any, list[str]]:
    pictures = [drawn("circle", colour, resolution) for colour in COLOURS]
    pixels = torch.stack([torch.tensor(picture).permute(2, 0, 1) / 255 for picture in pictures])
    return pixels, [f"a {colour} circle" for colour in COLOURS]


def test_the_documented_loop_learns(model: edgeglm.PretrainedModel) -> None:
    model.enable_lora(rank=8, dropout=0.1)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)
    schedule = edgeglm.AdaptiveLR(optimizer, warmup_steps=5)
    pixels, texts = batch(model.resolution)
    losses = []
    for _ in range(60):
        loss = model.contrastive_loss(pixels, texts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    model.eval()
    with torch.no_grad():
        before = model.embed_text(texts)
        assert model.merge() < 1e-5
        torch.testing.assert_close(model.embed_text(texts), before, atol=1e-5, rtol=0)
        found = (model.embed_image(pixels) @ before.T).argmax(1)
    assert float((found == torch.arange(len(texts))).float().mean()) > 0.6


def test_only_heads_and_adapters_train(model: edgeglm.PretrainedModel) -> None:
    heads = {id(p) for head in (model.text_head, model.image_head) for p in head.parameters()}  # type: ignore[union-attr]
    assert {id(p) for p in model.trainable_parameters()} == heads
    model.enable_lora(rank=2)
    extra = [p for p in model.trainable_parameters() if id(p) not in heads]
    assert sum(p.numel() for p in extra) == 2 * 2 * 2 * 2 * 32


def test_targets_that_match_nothing_are_named_with_those_that_exist(model: edgeglm.PretrainedModel) -> None:
    with pytest.raises(UserError, match=r"names q_proj.*choose from .*query"):
        model.enable_lora(targets=("q_proj",))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"targets": ("q_proj",)}, r"^targets names q_proj"),
        ({"last_blocks": 9}, r"^last_blocks is 9 and .* choose 1 to 2$"),
        ({"last_blocks": -1}, r"^last_blocks is -1"),
    ],
)
def test_what_is_wrong_is_named_as_the_call_names_it(
    model: edgeglm.PretrainedModel, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        model.enable_lora(**given)


def test_a_layer_may_be_named_by_itself(model: edgeglm.PretrainedModel) -> None:
    model.enable_lora(targets="key")
    names = {name for name, p in model.text_tower.named_parameters() if p.requires_grad}
    assert names
    assert all(".key." in name for name in names)


def test_what_no_loop_could_go_on_with_is_refused_and_not_read_letter_by_letter(
    model: edgeglm.PretrainedModel, tmp_path: Path
) -> None:
    pixels, texts = batch(model.resolution)
    for wrong in ("a red circle", ()):
        with pytest.raises(ValueError, match="give a list of one or more strings"):
            model.embed_text(wrong)
    with pytest.raises(ValueError, match="8 images and 3 texts; give one text an image"):
        model.contrastive_loss(pixels, texts[:3])
    refused: tuple[dict[str, Any], ...] = (
        {"rank": 0},
        {"dropout": 1.0},
        {"alpha": 0.0},
    )
    for numbers in refused:
        with pytest.raises(UserError, match="give a rank from 1, an alpha above 0 and a dropout below 1"):
            model.enable_lora(**numbers)
    for width, length, side in ((0, 32, 0), (16, 1, 0), (16, 32, -1)):
        with pytest.raises(UserError, match="give at least 1, 2 and 0"):
            edgeglm.from_pretrained(embedding_dim=width, max_length=length, resolution=side, store=tmp_path)


def test_a_loop_that_was_kept_goes_on_as_it_would_have(
    model: edgeglm.PretrainedModel, tmp_path: Path
) -> None:
    def begun(one: edgeglm.PretrainedModel) -> tuple[Any, Any]:
        one.enable_lora(rank=4, dropout=0.1)
        optimizer = torch.optim.AdamW(one.trainable_parameters(), lr=1e-2)
        return optimizer, edgeglm.AdaptiveLR(optimizer, warmup_steps=5, patience=2)

    def steps(one: edgeglm.PretrainedModel, optimizer: Any, schedule: Any, count: int) -> list[float]:
        pixels, texts = batch(one.resolution)
        losses = []
        for _ in range(count):
            loss = one.contrastive_loss(pixels, texts)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            schedule.watch(1.0)  # stands still, so that the rate is halved
            losses.append(float(loss.detach()))
        return losses

    other = copy.deepcopy(model)
    parts = (model, *begun(model))
    steps(*parts, 6)
    torch.save([part.state_dict() for part in parts] + [torch.random.get_rng_state()], tmp_path / "kept.pt")
    went_on = steps(*parts, 4)
    *states, random = torch.load(tmp_path / "kept.pt", weights_only=True)
    resumed = (other, *begun(other))
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    torch.random.set_rng_state(random)
    assert steps(*resumed, 4) == went_on


def test_folders_may_be_given_as_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("bert", "vit"):
        (tmp_path / folder).mkdir()
    write_bert(tmp_path / "bert")
    write_vit(tmp_path / "vit")
    model = edgeglm.from_pretrained(Path("bert"), image=tmp_path / "vit", store=str(tmp_path / "store"))
    assert model.embed_text(["a red circle"]).shape == (1, 256)


def test_pixels_as_a_decoder_gives_them_are_refused(model: edgeglm.PretrainedModel) -> None:
    pixels, texts = batch(model.resolution)
    whole = (pixels * 255).to(torch.uint8)
    for call in (lambda: model.embed_image(whole), lambda: model.contrastive_loss(whole, texts)):
        with pytest.raises(ValueError, match=r"uint8; give floats in \[0, 1\]: pixels / 255"):
            call()


def test_equal_texts_in_a_batch_are_no_negatives(model: edgeglm.PretrainedModel) -> None:
    pixels, texts = batch(model.resolution)
    model.eval()
    alike = model.contrastive_loss(pixels, ["a red circle"] * len(texts))
    scores = torch.log(torch.tensor(float(len(texts))))
    assert float(alike.detach()) >= float(scores) - 1e-4


def test_an_unknown_name_of_the_package_is_no_import() -> None:
    with pytest.raises(AttributeError, match="no attribute 'from_nowhere'"):
        edgeglm.from_nowhere  # type: ignore[attr-defined] # noqa: B018
