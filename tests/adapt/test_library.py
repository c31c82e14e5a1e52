"""If these fail, the loop in the documentation does not run as written."""

from __future__ import annotations

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


def test_equal_texts_in_a_batch_are_no_negatives(model: edgeglm.PretrainedModel) -> None:
    pixels, texts = batch(model.resolution)
    model.eval()
    alike = model.contrastive_loss(pixels, ["a red circle"] * len(texts))
    scores = torch.log(torch.tensor(float(len(texts))))
    assert float(alike.detach()) >= float(scores) - 1e-4


def test_an_unknown_name_of_the_package_is_no_import() -> None:
    with pytest.raises(AttributeError, match="no attribute 'from_nowhere'"):
        edgeglm.from_nowhere  # type: ignore[attr-defined] # noqa: B018
