"""If these fail, a teacher is trained in a precision that nobody asked for, or not at all in one that was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")

from edgeglm.core.progress import QuietProgress  # noqa: E402
from edgeglm.train.loop import FitOptions, Group, fit, seeded  # noqa: E402
from edgeglm.train.precision import computes_bfloat16, mixed  # noqa: E402


def trained(precision: Any) -> tuple[list[float], Any, set[Any]]:
    seen: set[Any] = set()
    with seeded(0, threads=1):
        model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))
        x, y = torch.randn(64, 16), torch.randint(0, 4, (64,))

        def loss_of(_: int) -> Any:
            hidden = model(x)
            seen.add(hidden.dtype)
            return torch.nn.functional.cross_entropy(hidden, y)

        curve = fit(
            [Group(parameters=list(model.parameters()), learning_rate=1e-2)],
            lambda _: range(4),
            loss_of,
            epochs=10,
            steps_per_epoch=4,
            title="Trial",
            progress=QuietProgress(),
            options=FitOptions(precision=precision),
        )
    return curve, list(model.parameters()), seen


def test_products_are_bfloat16_and_weights_are_not() -> None:
    plain, _, seen = trained("float32")
    assert seen == {torch.float32}
    curve, parameters, seen = trained("bfloat16")
    assert seen == {torch.bfloat16}
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert curve[-1] < 0.5 * curve[0]
    assert curve[-1] == pytest.approx(plain[-1], rel=0.1)
    assert curve != plain


def test_auto_is_what_the_processor_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("edgeglm.train.precision.computes_bfloat16", lambda _, has=has: has)
        assert trained("auto")[2] == {wanted}


@pytest.mark.parametrize(
    ("told", "has"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 sse", True),
        ("flags\t\t: fpu amx_tile amx_bf16", True),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("flags\t\t: fpu avx2 avx512f", False),
        ("processor: 0", False),
    ],
)
def test_a_processor_says_whether_it_multiplies_bfloat16(told: str, has: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor: 0\n{told}\n")
    assert computes_bfloat16("cpu", tmp_path / "cpuinfo") == has
    assert not computes_bfloat16("cpu", tmp_path / "none")
    assert not computes_bfloat16("meta")


def test_float32_is_left_alone() -> None:
    with mixed("float32", "cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
