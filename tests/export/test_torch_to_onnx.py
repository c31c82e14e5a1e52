from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx")
pytest.importorskip("torch")

import onnx
import torch

from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.export.any_onnx import describe_onnx
from edgeglm.export.parity import assert_parity
from edgeglm.export.torch_to_onnx import onnx_from_module

AXES = {name: {0: "batch", 1: "length"} for name in ("input_ids", "attention_mask")}

TOWER = '''
import torch
from torch import nn

class Text(nn.Module):
    """Masked mean of embeddings through a feed-forward block and a norm."""

    def __init__(self, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, input_ids, attention_mask):
        x = self.norm(self.table(input_ids))
        x = x + self.down(nn.functional.gelu(self.up(x)))
        mask = attention_mask.to(x.dtype).unsqueeze(-1)
        return nn.functional.normalize((x * mask).sum(1) / mask.sum(1), dim=-1)
'''


def _text() -> torch.nn.Module:
    scope: dict[str, Any] = {"__name__": "tower"}
    exec(TOWER, scope)
    module: torch.nn.Module = scope["Text"]()
    return module


def _feeds(batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 50, (batch, length))
    mask = torch.ones_like(ids)
    mask[0, length // 2 + 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    module = _text()
    path = tmp_path_factory.mktemp("export") / "text.onnx"
    return module, onnx_from_module(module, _feeds(2, 6), path, dynamic_axes=AXES)


def test_any_batch_and_length_gives_what_torch_gives(exported: tuple[torch.nn.Module, Path]) -> None:
    module, path = exported
    report = assert_parity(module, path, [_feeds(1, 3), _feeds(3, 9), _feeds(8, 5)], atol=1e-5)
    assert report.rows == 12
    assert report.min_cosine > 0.99999


def test_a_file_of_another_module_is_refused(exported: tuple[torch.nn.Module, Path]) -> None:
    _, path = exported
    torch.manual_seed(1)
    other = _text()
    torch.nn.init.normal_(next(other.parameters()))
    with pytest.raises(EdgeglmError, match="differs from its module"):
        assert_parity(other, path, [_feeds(1, 3), _feeds(3, 9)])


def test_one_shape_alone_proves_no_dynamic_axis(exported: tuple[torch.nn.Module, Path]) -> None:
    with pytest.raises(UserError, match="two shapes"):
        assert_parity(*exported, [_feeds(2, 4)])


def test_nodes_tell_the_module_they_came_from(exported: tuple[torch.nn.Module, Path]) -> None:
    names = [node.name for node in onnx.load(exported[1]).graph.node]
    assert "up/MatMul" in names
    assert "table/Gather" in names
    assert len(set(names)) == len(names)


def test_no_two_values_share_a_name_when_an_output_is_called_like_an_op(
    exported: tuple[torch.nn.Module, Path],
) -> None:
    outputs = [name for node in onnx.load(exported[1]).graph.node for name in node.output]
    assert len(set(outputs)) == len(outputs)
    assert outputs.count("embedding") == 1


def test_two_checkouts_give_the_same_bytes_and_no_path_travels(tmp_path: Path, repository: Path) -> None:
    digests = set()
    for name in ("here", "a/longer/there"):
        checkout = tmp_path / name
        for room in ("core", "export", "evaluate", "engines"):
            shutil.copytree(repository / "edgeglm" / room, checkout / "edgeglm" / room)
        shutil.copy(repository / "edgeglm" / "__init__.py", checkout / "edgeglm")
        (checkout / "tower.py").write_text(TOWER)
        (checkout / "main.py").write_text(
            "import torch\nfrom pathlib import Path\nfrom tower import Text\n"
            "from edgeglm.export.torch_to_onnx import onnx_from_module\n"
            "ids = torch.arange(12).reshape(2, 6)\n"
            "axes = {k: {0: 'batch', 1: 'length'} for k in ('input_ids', 'attention_mask')}\n"
            "onnx_from_module(Text(), {'input_ids': ids, 'attention_mask': torch.ones_like(ids)},"
            " Path('text.onnx'), dynamic_axes=axes)\n"
        )
        subprocess.run(
            [sys.executable, "main.py"],
            cwd=checkout,
            check=True,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(checkout), "HOME": str(tmp_path)},
        )
        data = (checkout / "text.onnx").read_bytes()
        for trace in (str(tmp_path), str(repository), sys.prefix, "site-packages", ".py"):
            assert trace.encode() not in data
        digests.add(hashlib.sha256(data).hexdigest())
    assert len(digests) == 1


def test_an_axis_that_becomes_a_constant_is_named(tmp_path: Path) -> None:
    class Fixed(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels + torch.ones(2, 3)

    with pytest.raises(UserError):
        onnx_from_module(
            Fixed(), {"pixels": torch.rand(2, 3)}, tmp_path / "x.onnx", dynamic_axes={"pixels": {0: "batch"}}
        )


def test_inspect_tells_inputs_weights_and_ops(exported: tuple[torch.nn.Module, Path]) -> None:
    module, path = exported
    description = describe_onnx(path)
    assert [(t.name, t.dtype, t.shape) for t in description.inputs] == [
        ("input_ids", "int64", ("batch", "length")),
        ("attention_mask", "int64", ("batch", "length")),
    ]
    assert description.outputs[0].shape == ("batch", 16)
    assert description.precision == "fp32"
    assert description.opsets == {"ai.onnx": 20}
    assert abs(description.parameters - sum(p.numel() for p in module.parameters())) < 100
    assert description.operators["MatMul"] == 2


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"<html>not found</html>"])
def test_a_file_that_is_no_model_is_a_users_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(UserError, match="no ONNX model"):
        describe_onnx(tmp_path / "x.onnx")
