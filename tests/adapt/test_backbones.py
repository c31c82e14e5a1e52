"""If these fail, a user's own image model gives a teacher other features, or an unclear error."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")

from edgeglm.adapt.backbones import backbone_onnx  # noqa: E402
from edgeglm.adapt.stages import source_spec  # noqa: E402
from edgeglm.core.artifact import Artifact  # noqa: E402
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
