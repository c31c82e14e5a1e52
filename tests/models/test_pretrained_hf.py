"""If these fail, a user's own towers load as something else than their authors made, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")
pytest.importorskip("transformers", reason="the host half is not installed")

from edgeglm.core.errors import UserError  # noqa: E402
from edgeglm.models.pretrained_hf import (  # noqa: E402
    load_dual_encoder,
    load_image_tower,
    load_text_tower,
)

VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 20,
}
CLIP_TEXT: dict[str, Any] = {**TEXT, "bos_token_id": 1, "eos_token_id": 59, "pad_token_id": 59}
SIGLIP_TEXT: dict[str, Any] = {**TEXT, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def save(folder: Path, model: Any, **processor: Any) -> Path:
    """Write a model as save_pretrained does, with what a processor and a tokenizer would leave."""
    with torch.no_grad():  # far from the small initial values, so that a slip shows
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    model.eval().save_pretrained(folder)
    settings = {"image_mean": MEAN, "image_std": STD, "resample": 3, "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, **processor}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(text_config=CLIP_TEXT, vision_config=VISION, projection_dim=12)
    return save(folder, CLIPModel(config), do_center_crop=True, crop_size={"height": 32, "width": 32})


def older_clip(folder: Path) -> Path:
    """A CLIP whose config says 2 where its tokenizer ends with the largest id, as the first ones do."""
    from transformers import CLIPConfig, CLIPModel

    text = {**CLIP_TEXT, "eos_token_id": 2}
    return save(folder, CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12)))


def siglip(folder: Path) -> Path:
    from transformers import SiglipConfig, SiglipModel

    return save(folder, SiglipModel(SiglipConfig(text_config=SIGLIP_TEXT, vision_config=VISION)))


def chinese_clip(folder: Path) -> Path:
    from transformers import ChineseCLIPConfig, ChineseCLIPModel

    config = ChineseCLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)
    return save(folder, ChineseCLIPModel(config))


def vit_bert(folder: Path) -> Path:
    from transformers import BertConfig, VisionTextDualEncoderConfig, VisionTextDualEncoderModel, ViTConfig

    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        ViTConfig(**VISION), BertConfig(**TEXT), projection_dim=12
    )
    return save(folder, VisionTextDualEncoderModel(config))


DUAL: dict[str, Callable[[Path], Path]] = {
    "clip": clip,
    "older-clip": older_clip,
    "siglip": siglip,
    "chinese-clip": chinese_clip,
    "vit-bert": vit_bert,
}


def tokens(kind: str = "") -> tuple[Any, Any]:
    """Return ids and mask, int64 [2, 9]: one whole text and one of 5 tokens."""
    pad = {"clip": 59, "older-clip": 59, "siglip": 1}.get(kind, 0)
    ids = torch.randint(4, 58, (2, 9), generator=torch.Generator().manual_seed(5))
    ids[0, 8] = ids[1, 4] = 59
    ids[1, 5:] = pad
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return ids, mask


def normalised(pixels: Any) -> Any:
    return (pixels - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


@pytest.mark.parametrize("kind", sorted(DUAL))
def test_both_towers_of_a_dual_encoder_equal_its_own_features(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    folder = DUAL[kind](tmp_path)
    image, text, preprocessing = load_dual_encoder(folder)
    reference = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    ids, mask = tokens(kind)
    filled, whole = ids, mask
    if kind == "siglip":  # trained on texts filled up to the full length, without a mask
        filled, whole = torch.nn.functional.pad(ids, (0, 11), value=1), None
    with torch.no_grad():
        expected_image = reference.get_image_features(pixel_values=normalised(pixels)).pooler_output
        expected_text = reference.get_text_features(input_ids=filled, attention_mask=whole).pooler_output
        torch.testing.assert_close(image(pixels), expected_image, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(text(ids, mask), expected_text, atol=1e-5, rtol=1e-5)
    assert expected_image.std() > 1e-2
    assert (image.feature_dim, text.feature_dim) == (expected_image.shape[1], expected_text.shape[1])
    assert (image.resolution, text.max_length) == (32, 20)
    assert text.tokenizer_path == folder / "tokenizer.json"
    assert preprocessing.resample == "bicubic"
    assert preprocessing.fit == ("crop" if kind == "clip" else "stretch")
    assert preprocessing.lowercase == (kind == "siglip")


@pytest.mark.parametrize("kind", sorted(DUAL))
def test_padding_changes_no_feature(kind: str, tmp_path: Path) -> None:
    _, text, _ = load_dual_encoder(DUAL[kind](tmp_path))
    ids, mask = tokens(kind)
    with torch.no_grad():
        torch.testing.assert_close(text(ids, mask)[1:], text(ids[1:, :5], mask[1:, :5]), atol=1e-5, rtol=1e-5)


def image_models() -> dict[str, Any]:
    import transformers as t

    stages: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 1]}
    return {
        "vit": lambda: t.ViTModel(t.ViTConfig(**VISION)),
        "deit": lambda: t.DeiTModel(t.DeiTConfig(**VISION)),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**{**VISION, "image_size": 64})),
        "convnext": lambda: t.ConvNextModel(t.ConvNextConfig(num_stages=2, **stages)),
        "resnet": lambda: t.ResNetModel(t.ResNetConfig(embedding_size=8, layer_type="basic", **stages)),
        "swin": lambda: t.SwinModel(
            t.SwinConfig(
                image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4
            )
        ),
        "clip_vision_model": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**VISION)),
        "siglip_vision_model": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**VISION)),
    }


@pytest.mark.parametrize(
    "kind",
    ["vit", "deit", "dinov2", "convnext", "resnet", "swin", "clip_vision_model", "siglip_vision_model"],
)
def test_an_image_model_gives_its_own_features(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    folder = save(tmp_path, image_models()[kind]())
    tower = load_image_tower(folder)
    reference = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = reference(pixel_values=normalised(pixels))
        expected = found.last_hidden_state[:, 0] if kind in ("vit", "deit", "dinov2") else found.pooler_output
        torch.testing.assert_close(tower(pixels), expected.flatten(1), atol=1e-5, rtol=1e-5)
    assert (tower.resolution, tower.feature_dim) == (32, tower(pixels).shape[1])


def test_a_tower_takes_another_resolution_when_asked(tmp_path: Path) -> None:
    tower = load_image_tower(save(tmp_path, image_models()["vit"]()), resolution=48)
    assert tower.resolution == 48
    assert tower(torch.rand(1, 3, 48, 48)).shape == (1, 16)


def test_raw_pixels_of_a_model_without_normalisation_are_scaled_as_it_was_trained(tmp_path: Path) -> None:
    folder = save(tmp_path, image_models()["vit"](), do_normalize=False, do_rescale=False)
    tower = load_image_tower(folder)
    assert tower.gain.unique().tolist() == [255.0]
    assert tower.shift.unique().tolist() == [0.0]


def text_models() -> dict[str, Any]:
    import transformers as t

    small: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    size: dict[str, Any] = {"vocab_size": 60, "max_position_embeddings": 20}
    after: dict[str, Any] = {**size, "pad_token_id": 0, "max_position_embeddings": 21}
    return {
        "bert": lambda: t.BertModel(t.BertConfig(**small, **size)),
        "camembert": lambda: t.CamembertModel(t.CamembertConfig(**small, **after)),
        "distilbert": lambda: t.DistilBertModel(
            t.DistilBertConfig(dim=16, hidden_dim=32, n_layers=2, n_heads=2, **size)
        ),
        "electra": lambda: t.ElectraModel(t.ElectraConfig(embedding_size=16, **small, **size)),
        "roberta": lambda: t.RobertaModel(t.RobertaConfig(**small, **after)),
        "xlm-roberta": lambda: t.XLMRobertaModel(t.XLMRobertaConfig(**small, **after)),
    }


@pytest.mark.parametrize("kind", ["bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
def test_a_text_model_gives_its_own_features_under_each_pooling(
    kind: str, pooling: str, tmp_path: Path
) -> None:
    from transformers import AutoModel

    folder = save(tmp_path, text_models()[kind]())
    if pooling != "cls":
        (folder / "1_Pooling").mkdir()
        flag = {f"pooling_mode_{pooling}_tokens": True, "pooling_mode_cls_token": False}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(flag))
    tower = load_text_tower(folder)
    reference = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    ids, mask = tokens()
    with torch.no_grad():
        hidden = reference(input_ids=ids, attention_mask=mask).last_hidden_state
        rows = [row[real.bool()] for row, real in zip(hidden, mask, strict=True)]
        pool = {"cls": lambda r: r[0], "mean": lambda r: r.mean(0), "max": lambda r: r.amax(0)}[pooling]
        torch.testing.assert_close(
            tower(ids, mask), torch.stack([pool(r) for r in rows]), atol=1e-5, rtol=1e-5
        )
    assert (tower.max_length, tower.feature_dim) == (20, 16)


@pytest.mark.filterwarnings("ignore")  # the exporter warns about torch's own code; the outcome is checked
@pytest.mark.parametrize("kind", ["clip", "siglip", "bert"])
def test_a_text_tower_exports_to_onnx_with_dynamic_batch_and_length(kind: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    if kind == "bert":
        tower = load_text_tower(save(tmp_path, text_models()[kind]()))
    else:
        tower = load_dual_encoder(DUAL[kind](tmp_path))[1]
    ids, mask = tokens(kind)
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=20)
    shape = {0: batch, 1: length}
    program = torch.onnx.export(
        tower, (ids, mask), dynamic_shapes=(shape, shape), opset_version=20, dynamo=True, verbose=False
    )
    assert program is not None
    onnx.checker.check_model(program.model_proto)
    kinds = {node.op_type for node in program.model_proto.graph.node}
    assert not kinds & {"GatherND", "And", "IsNaN"}, "the mask is not the plain additive one"
    session = ort.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    for these, real in ((ids, mask), (ids[1:, :5], mask[1:, :5])):
        (found,) = session.run(None, dict(zip(names, (these.numpy(), real.numpy()), strict=True)))
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), tower(these, real), atol=1e-5, rtol=1e-5)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json; give a folder made by save_pretrained"):
        load_text_tower(tmp_path)


def test_an_unknown_architecture_names_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bertt"}')
    with pytest.raises(UserError, match=r"'bertt'; known: bert, camembert.*did you mean 'bert'\?"):
        load_text_tower(tmp_path)
    with pytest.raises(UserError, match=r"known: chinese_clip, clip, siglip, vision-text-dual-encoder"):
        load_dual_encoder(tmp_path)


def test_a_folder_without_tokenizer_says_how_to_write_one(tmp_path: Path) -> None:
    folder = clip(tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json; write one with AutoTokenizer"):
        load_dual_encoder(folder)


@pytest.mark.parametrize("content", [None, "{", '{"image_mean": [0.5]}', '{"image_mean": 1, "image_std": 0}'])
def test_a_folder_without_normalisation_is_refused(content: str | None, tmp_path: Path) -> None:
    folder = clip(tmp_path)
    path = folder / "preprocessor_config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=r"copy preprocessor_config\.json from the model's page"):
        load_dual_encoder(folder)


def test_a_checkpoint_without_some_weights_is_refused_and_not_filled_with_random_ones(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = clip(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors .*visual_projection\.weight"):
        load_dual_encoder(folder)


def test_cut_off_weights_are_refused(tmp_path: Path) -> None:
    path = clip(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cannot load the model in .*fetch the folder again"):
        load_dual_encoder(tmp_path)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    folder = clip(tmp_path)
    (folder / "model.safetensors").unlink()
    canary = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (canary,))

    torch.save({"logit_scale": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load the model"):
        load_dual_encoder(folder)
    assert not canary.exists()


def test_a_sentence_model_with_a_layer_after_its_pooling_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, text_models()["bert"]())
    (folder / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(UserError, match="adds Dense after the pooling"):
        load_text_tower(folder)


@pytest.mark.assets
def test_the_real_minilm_equals_its_reference(tmp_path: Path) -> None:
    """The text teacher of the default recipe, from a local folder, to 1e-5."""
    from tokenizers import Tokenizer
    from transformers import AutoModel

    from edgeglm.assets import extract_member_to, fetch_asset, member_names
    from edgeglm.core.progress import QuietProgress
    from edgeglm.core.store import Store, default_store_root

    artifact = fetch_asset("minilm-l6", Store(default_store_root()), QuietProgress())
    for name in member_names(artifact):
        if "/model/" in name and not name.endswith("/"):
            extract_member_to(artifact, name, tmp_path / name.partition("/model/")[2])
    tower = load_text_tower(tmp_path)
    reference = AutoModel.from_pretrained(tmp_path, local_files_only=True, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(tower.tokenizer_path))
    tokenizer.enable_padding()
    found = tokenizer.encode_batch(["a red apple", "the flag of an island far away", "cat"])
    ids, mask = (torch.tensor([getattr(one, key) for one in found]) for key in ("ids", "attention_mask"))
    with torch.no_grad():
        hidden = reference(input_ids=ids, attention_mask=mask).last_hidden_state
        expected = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        torch.testing.assert_close(tower(ids, mask), expected, atol=1e-5, rtol=1e-5)
    assert (tower.feature_dim, tower.max_length) == (384, 256)
