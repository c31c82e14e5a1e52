"""If these fail, a teacher cannot be adapted on a GPU, or learns something else there than on a CPU."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")
pytest.importorskip("peft", reason="the host half is not installed")
pytest.importorskip("transformers", reason="the host half is not installed")

import msgspec  # noqa: E402

import edgeglm  # noqa: E402
from edgeglm.adapt.frozen_prefix import kept_prefix  # noqa: E402
from edgeglm.adapt.tuning import enable_tuning, merge_tuning  # noqa: E402
from edgeglm.core.progress import QuietProgress  # noqa: E402
from edgeglm.core.recipe import TeacherConfig  # noqa: E402
from edgeglm.train.checkpoint import Checkpoint  # noqa: E402
from edgeglm.train.loop import FitOptions, Group, fit, seeded  # noqa: E402
from edgeglm.train.precision import Precision, computes_bfloat16  # noqa: E402
from tests.synthetic import COLOURS, drawn  # noqa: E402
from tests.tiny_towers import write_bert, write_vit  # noqa: E402

pytestmark = pytest.mark.gpu
TEXTS = [f"a {colour} circle" for colour in COLOURS]


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself with it


def model(folder: Path, device: str) -> edgeglm.PretrainedModel:
    folder = Path(tempfile.mkdtemp(dir=folder))
    for name in ("bert", "vit"):
        (folder / name).mkdir()
    torch.manual_seed(0)
    text, image = str(write_bert(folder / "bert")), str(write_vit(folder / "vit"))
    torch.manual_seed(0)
    made = edgeglm.from_pretrained(text, image=image, embedding_dim=16, store=folder / "store")
    return made.to(device)


def pictures(resolution: int, device: str) -> Any:
    shown = [drawn("circle", colour, resolution) for colour in COLOURS]
    return torch.stack([torch.tensor(one).permute(2, 0, 1) / 255 for one in shown]).to(device)


def test_the_documented_loop_learns_on_a_gpu_from_the_cpu_s_own_loss(tmp_path: Path) -> None:
    first = {}
    for device in ("cpu", "cuda"):
        made = model(tmp_path, device).eval()
        first[device] = float(made.contrastive_loss(pictures(made.resolution, device), TEXTS).detach())
    assert first["cuda"] == pytest.approx(first["cpu"], abs=1e-3)
    made.enable_lora(rank=8, dropout=0.1).to("cuda").train()
    optimizer = torch.optim.AdamW(made.trainable_parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = made.contrastive_loss(pictures(made.resolution, "cuda"), TEXTS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    made.eval()
    assert made.merge() < 1e-5


@pytest.mark.parametrize(
    "changed",
    [
        {"tuning": "lora"},
        {"tuning": "lora", "tuned_blocks": 1},
        {"tuning": "full"},
        {"tuning": "partial", "tuned_blocks": 1},
        {"tuning": "bottleneck"},
        {"tuning": "ia3"},
        {"tuning": "prompt"},
        {"tuning": "p-tuning"},
        {"tuning": "rslora"},
        {"tuning": "dora"},
    ],
    ids=lambda changed: "-".join(map(str, changed.values())),
)
def test_every_way_of_tuning_steps_and_merges_on_a_gpu(tmp_path: Path, changed: dict[str, Any]) -> None:
    teacher = model(tmp_path, "cuda").text
    config = msgspec.structs.replace(TeacherConfig(), **changed)
    parameters = enable_tuning(teacher, config)
    assert {parameter.device.type for parameter in parameters} == {"cuda"}
    before = [parameter.detach().clone() for parameter in parameters]
    teacher.tower.train()
    with kept_prefix(teacher, TEXTS, config.tuned_blocks), seeded(0, threads=1):
        fit(
            [Group(parameters=parameters, learning_rate=1e-2)],
            lambda _: [TEXTS] * 4,
            lambda texts: teacher.features(texts).square().mean(),
            epochs=1,
            steps_per_epoch=4,
            title="tuning",
            progress=QuietProgress(),
        )
    assert any(not torch.equal(old, new) for old, new in zip(before, parameters, strict=True))
    teacher.tower.eval()
    assert merge_tuning(teacher, TEXTS) < 1e-4
    assert teacher.all_features(TEXTS).device.type == "cpu"


class StoppedError(Exception):
    """The machine goes down."""


def curve(
    folder: Path, *, precision: Precision = "float32", keep: Path | None = None, steps: int = 18
) -> tuple[list[float], set[Any]]:
    """Return the losses of six epochs of three steps with dropout, and what products were computed in."""
    teacher = model(folder, "cuda").text
    with seeded(1, threads=1):
        parameters = enable_tuning(teacher, TeacherConfig(lora_dropout=0.2))
    wanted = torch.linspace(-1, 1, teacher.tower.feature_dim, device="cuda")
    seen: list[Any] = []

    def loss_of(texts: list[str]) -> Any:
        if len(seen) == steps:
            raise StoppedError
        found = teacher.features(texts)
        seen.append((found @ found.T).dtype)
        return (found.float() - wanted).square().mean()

    teacher.tower.train()
    with seeded(0, threads=1):
        made = fit(
            [Group(parameters=parameters, learning_rate=1e-2)],
            lambda _: [TEXTS] * 3,
            loss_of,
            epochs=6,
            steps_per_epoch=3,
            title="tuning",
            progress=QuietProgress(),
            options=FitOptions(
                precision=precision, checkpoint=None if keep is None else Checkpoint(path=keep, identity="x")
            ),
        )
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    return made, set(seen)


def test_products_are_in_bfloat16_where_the_gpu_multiplies_it_and_lead_to_nearly_the_same(
    tmp_path: Path,
) -> None:
    assert computes_bfloat16("cuda")
    plain, _ = curve(tmp_path)
    mixed, seen = curve(tmp_path, precision="auto")
    assert seen == {torch.bfloat16}
    assert mixed != plain
    assert mixed[-1] == pytest.approx(plain[-1], rel=0.05)


def test_a_run_repeats_itself_and_goes_on_after_a_stop_with_the_same_losses(tmp_path: Path) -> None:
    whole, _ = curve(tmp_path)
    assert curve(tmp_path)[0] == whole
    with pytest.raises(StoppedError):
        curve(tmp_path, keep=tmp_path / "state", steps=10)
    assert curve(tmp_path, keep=tmp_path / "state")[0] == whole
