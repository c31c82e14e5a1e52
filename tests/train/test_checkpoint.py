"""If these fail, a training that was killed starts over, goes another way, or goes on from the wrong file."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")

from edgeglm.core.errors import UserError  # noqa: E402
from edgeglm.core.progress import QuietProgress  # noqa: E402
from edgeglm.train import loop  # noqa: E402
from edgeglm.train.checkpoint import CarriedTensor, Checkpoint  # noqa: E402
from edgeglm.train.loop import DivergedError, FitOptions, Group, fit, seeded, shuffled  # noqa: E402
from edgeglm.train.memory import memory_advice  # noqa: E402
from edgeglm.train.schedules import AdaptiveLR, clip_adaptively, warmup_exponential  # noqa: E402

EPOCHS = 12
SCRIPT = textwrap.dedent(
    """
    import json, sys, time
    from pathlib import Path
    from tests.train.test_checkpoint import trained

    slow = float(sys.argv[2])
    print(json.dumps(trained(Path(sys.argv[1]), slow=slow)), flush=True)
    """
)


def trained(
    path: Path | None, *, slow: float = 0.0, identity: str = "one", stop: int = EPOCHS
) -> list[float]:
    """Train with dropout and a bank that the loop fills; what is drawn hangs on torch's random state."""
    with seeded(0, threads=1):
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.4), torch.nn.Linear(16, 1))
        bank = torch.zeros(1)
        keeper = None
        if path is not None:
            keeper = Checkpoint(path=path, identity=identity, carried=(CarriedTensor(bank),))

        def batches(epoch: int) -> Iterator[Any]:
            if epoch >= stop:
                raise KeyboardInterrupt
            for chosen in shuffled(32, 8, seed=epoch):
                time.sleep(slow)
                yield torch.rand(8, 8) + chosen[:, None] / 32

        def loss_of(x: Any) -> Any:
            found = (model(x) ** 2).mean() + 0.01 * bank.sum()
            bank.add_(found.detach())
            return found

        return fit(
            [Group(parameters=list(model.parameters()), learning_rate=1e-2, weight_decay=0.1)],
            batches,
            loss_of,
            epochs=EPOCHS,
            steps_per_epoch=4,
            title="Trial",
            progress=QuietProgress(),
            options=FitOptions(checkpoint=keeper),
        )


def test_killed_at_any_moment_it_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    path = tmp_path / "kept" / "state.pt"
    command = [sys.executable, "-c", SCRIPT, str(path), "0.05"]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE)
    try:
        for _ in range(2400):
            if path.exists() and torch.load(path, weights_only=True)["epoch"] >= 2:
                break
            time.sleep(0.05)
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert first.returncode == -signal.SIGKILL
    kept = torch.load(path, weights_only=True)
    assert 2 <= kept["epoch"] < EPOCHS - 1
    assert not kept["finished"]
    command[-1] = "0"
    second = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, check=True)
    assert json.loads(second.stdout) == trained(None)


def test_what_is_finished_is_not_trained_again(tmp_path: Path) -> None:
    curve = trained(tmp_path / "a.pt")
    assert trained(tmp_path / "a.pt", stop=0) == curve


def test_a_checkpoint_of_another_recipe_or_a_broken_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    trained(path)
    with pytest.raises(UserError, match="of another model or recipe; delete it or choose another"):
        trained(path, identity="two")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"cannot read the checkpoint .*delete it"):
        trained(path)


@pytest.mark.parametrize("held", [[1, 2], {"identity": "one"}, torch.zeros(3)])
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, held: Any) -> None:
    torch.save(held, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt is no checkpoint of a training; delete it"):
        trained(tmp_path / "a.pt")


def fitted(losses: list[float], options: FitOptions, *, epochs: int = 2, per_epoch: int = 3) -> Any:
    weight = torch.nn.Parameter(torch.ones(1))
    values = iter(losses)
    curve = fit(
        [Group(parameters=[weight], learning_rate=1e-3)],
        lambda _: range(per_epoch),
        lambda _: (weight * next(values)).sum() / weight.detach().sum(),
        epochs=epochs,
        steps_per_epoch=per_epoch,
        title="Trial",
        progress=QuietProgress(),
        options=options,
    )
    return curve, weight.detach()


def test_a_loss_that_is_no_number_leaves_the_last_good_state_and_says_where(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    keeper = Checkpoint(path=path, identity="x")
    message = r"loss of batch 1 is nan at step 4 of epoch 1; the last good state is kept in .*a\.pt; lower"
    with pytest.raises(DivergedError, match=message):
        fitted([1, 1, 1, 1, math.nan, 1], FitOptions(checkpoint=keeper))
    kept = torch.load(path, weights_only=True)
    assert kept["epoch"] == 0
    assert torch.isfinite(kept["parameters"][0]).all()


def test_a_diverged_training_leaves_a_good_state_though_none_was_to_be_kept(tmp_path: Path) -> None:
    path, before = tmp_path / "a.pt", tmp_path / "before.pt"
    options = FitOptions(checkpoint=Checkpoint(path=path, identity="x", every=0), rate="x.rate")
    with pytest.raises(DivergedError, match=r"epoch 1; the last good state .*a\.pt; lower x\.rate"):
        fitted([1, 1, 1, 1, math.nan, 1], options)
    assert torch.load(path, weights_only=True)["epoch"] == 0
    path.unlink()
    before.touch()
    options = FitOptions(checkpoint=Checkpoint(path=path, identity="x", every=0, before=before))
    with pytest.raises(DivergedError, match=r"kept in .*before\.pt; lower"):
        fitted([math.nan], options)
    assert not path.exists()


def test_a_last_step_that_leaves_no_numbers_behind_is_no_training_that_ended(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    path = tmp_path / "a.pt"
    message = (
        r"what is trained is no number after batch 1, step 3 of epoch 1; .* kept in .*a\.pt; lower x\.rate"
    )
    with pytest.raises(DivergedError, match=message):
        fit(
            [Group(parameters=[weight], learning_rate=1e-3)],
            lambda epoch: [0.0, 0.0] if epoch == 0 else [0.0, 1.0],
            lambda last: (weight - (weight.detach() if last else 0.0)).sqrt().sum(),  # steep without end at 0
            epochs=2,
            steps_per_epoch=2,
            title="Trial",
            progress=QuietProgress(),
            options=FitOptions(checkpoint=Checkpoint(path=path, identity="x", every=0), rate="x.rate"),
        )
    kept = torch.load(path, weights_only=True)
    assert kept["epoch"] == 0
    assert torch.isfinite(kept["parameters"][0]).all()


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(1 << 60, dtype=torch.uint8),  # a real refusal of torch's allocator
        lambda: (_ for _ in ()).throw(MemoryError()),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")),
    ],
)
def test_too_little_memory_says_what_to_lower(tmp_path: Path, allocate: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    path = tmp_path / "a.pt"

    def loss_of(batch: int) -> Any:
        if batch == 4:
            allocate()
        return weight.square().sum()

    with pytest.raises(UserError, match=r"Trial: memory does not .* kept in .*a\.pt; lower teacher\.x$"):
        fit(
            [Group(parameters=[weight], learning_rate=1e-3)],
            lambda epoch: range(3 * epoch, 3 * epoch + 3),
            loss_of,
            epochs=2,
            steps_per_epoch=3,
            title="Trial",
            progress=QuietProgress(),
            options=FitOptions(checkpoint=Checkpoint(path=path, identity="x"), lower="teacher.x"),
        )
    assert torch.load(path, weights_only=True)["epoch"] == 0


def wrapped(cause: Exception) -> Exception:
    """Return an error of an exporter, as one is raised that met another."""
    try:
        try:
            raise cause
        except Exception as met:
            raise ValueError("cannot serialize the model") from met
    except ValueError as error:
        return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (wrapped(MemoryError()), r"^Stage: memory does not suffice; lower teacher\.x$"),
        (OSError(errno.ENOMEM, "Cannot allocate"), r"^Stage: memory does not suffice; lower teacher\.x$"),
        (wrapped(ImportError("x.so: failed to map segment from shared object")), "give the process more$"),
        (UserError("told already; lower teacher.y"), "^told already; lower teacher.y$"),
    ],
)
def test_too_little_memory_is_known_whatever_it_is_wrapped_in(error: Exception, message: str) -> None:
    with pytest.raises(UserError, match=message), memory_advice("Stage", "teacher.x"):
        raise error


def test_what_a_training_told_of_memory_is_not_told_anew() -> None:
    told = pytest.raises(UserError, match=r"^inner: memory does not suffice; lower a$")
    with told, memory_advice("outer", "b"), memory_advice("inner", "a"):
        raise MemoryError


def test_another_error_that_is_wrapped_is_no_lack_of_memory() -> None:
    with pytest.raises(ValueError, match="cannot serialize"), memory_advice("Stage", "teacher.x"):
        raise wrapped(KeyError("a"))


def test_another_error_of_a_step_is_not_taken_for_too_little_memory() -> None:
    with pytest.raises(RuntimeError, match="must match"):
        fit(
            [Group(parameters=[torch.nn.Parameter(torch.ones(2))], learning_rate=1e-3)],
            lambda _: [torch.ones(2)],
            lambda x: (x + torch.ones(3)).sum(),
            epochs=1,
            steps_per_epoch=1,
            title="Trial",
            progress=QuietProgress(),
        )


def test_parameters_that_are_no_numbers_are_never_kept(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.tensor([math.nan]))
    keeper = Checkpoint(path=tmp_path / "a.pt", identity="x")
    optimizer = torch.optim.AdamW([weight])
    state = keeper.state(epoch=0, curve=[], parameters=[weight], optimizer=optimizer, finished=False)
    assert state is None
    assert not keeper.write(state)
    assert not keeper.path.exists()


def test_a_loss_that_stands_still_ends_the_training() -> None:
    curve, _ = fitted([5, 4, 3, 3, 3, 3, 3, 1], FitOptions(patience=2), epochs=8, per_epoch=1)
    assert curve == [5, 4, 3, 3, 3]
    curve, _ = fitted([5, 4, 3, 3, 3, 3, 3, 1], FitOptions(), epochs=8, per_epoch=1)
    assert len(curve) == 8


def test_accumulated_batches_step_as_one_large_batch() -> None:
    torch.manual_seed(0)
    data = torch.randn(8, 4)

    def final(size: int, accumulate: int) -> Any:
        torch.manual_seed(1)
        layer = torch.nn.Linear(4, 1)
        fit(
            [Group(parameters=list(layer.parameters()), learning_rate=1e-2)],
            lambda _: data.split(size),
            lambda x: (layer(x) ** 2).mean(),
            epochs=1,
            steps_per_epoch=8 // size,
            warmup=1,
            title="Trial",
            progress=QuietProgress(),
            options=FitOptions(accumulate=accumulate),
        )
        return layer.weight.detach()

    torch.testing.assert_close(final(4, 2), final(4, 2))
    large = final(8, 1)
    assert float((final(4, 2) - large).abs().max()) < 1e-2
    assert not torch.equal(final(4, 1), final(4, 2))


def test_a_rest_of_accumulated_batches_is_not_lost() -> None:
    _, weight = fitted([1.0, 1.0, 1.0], FitOptions(accumulate=8), epochs=1)
    assert float(weight) != 1.0


def test_a_rest_of_accumulated_batches_counts_as_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, seen = torch.nn.Parameter(torch.ones(1)), list[float]()
    plain = loop._stepped

    def stepped(*arguments: Any) -> None:
        seen.append(float(weight.grad))
        plain(*arguments)

    monkeypatch.setattr(loop, "_stepped", stepped)
    fit(
        [Group(parameters=[weight], learning_rate=1e-3)],
        lambda _: [1.0, 3.0, 5.0, 7.0, 9.0],
        lambda slope: slope * weight.sum(),
        epochs=1,
        steps_per_epoch=5,
        title="Trial",
        progress=QuietProgress(),
        options=FitOptions(accumulate=3),
    )
    assert seen == pytest.approx([3.0, 8.0])


def test_gradients_are_kept_in_proportion_unit_by_unit() -> None:
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 0.0, 4.0], [0.0, 0.0, 0.0]]))
        layer.bias.copy_(torch.tensor([3.0, 4.0]))
    layer.weight.grad = torch.tensor([[0.0, 100.0, 0.0], [0.0, 1.0, 0.0]])
    layer.bias.grad = torch.tensor([0.0, 0.01])
    clip_adaptively(layer.parameters(), 0.1)
    torch.testing.assert_close(layer.weight.grad[0], torch.tensor([0.0, 0.5, 0.0]))
    torch.testing.assert_close(layer.weight.grad[1], torch.tensor([0.0, 1e-4, 0.0]), atol=1e-9, rtol=1e-5)
    torch.testing.assert_close(layer.bias.grad, torch.tensor([0.0, 0.01]))


def test_the_exponential_schedule_falls_by_one_ratio_to_a_hundredth() -> None:
    rates = [warmup_exponential(step, total=110, warmup=10) for step in range(111)]
    assert rates[9] == rates[10] == 1.0
    assert rates[110] == pytest.approx(0.01)
    assert rates[40] / rates[30] == pytest.approx(rates[100] / rates[90])


def test_the_adaptive_rate_rises_falls_and_is_halved_where_nothing_improves() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule = AdaptiveLR(optimizer, warmup_steps=4, total_steps=20, patience=2)
    rates = []
    for step in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.watch(1.0 / (1 + min(step, 9)))  # better and better, then nothing new
        schedule.step()
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert schedule.halvings == 5
    assert rates[-1] < rates[5] < 1.0
    with pytest.raises(ValueError, match="give at least 1"):
        AdaptiveLR(optimizer, warmup_steps=0)


def test_a_loss_below_zero_that_stands_still_halves_the_rate_too() -> None:
    adaptive = AdaptiveLR(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0), patience=2)
    for loss in (1.0, -1.0, -2.0, -2.0, -2.001):  # a thousandth is no better
        adaptive.watch(loss)
    assert (adaptive.best, adaptive.halvings) == (-2.0, 1)


def test_a_watched_loss_is_kept_without_what_it_was_computed_from() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    adaptive = AdaptiveLR(torch.optim.SGD([weight], lr=1.0), patience=2)
    adaptive.watch(weight.square().sum())
    assert type(adaptive.best) is float
    assert copy.deepcopy(adaptive.state_dict())["best"] == 3.0


@pytest.mark.parametrize(("schedule", "end"), [("cosine", 0.0), ("exponential", 0.01)])
def test_a_loop_that_runs_past_its_total_steps_stays_at_the_end_of_the_fall(
    schedule: Any, end: float
) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    adaptive = AdaptiveLR(optimizer, warmup_steps=2, total_steps=6, schedule=schedule)
    rates = []
    for _ in range(14):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        adaptive.step()
    assert rates[6:] == pytest.approx([end] * 8)


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ({"schedule": "exponential"}, "give total_steps"),
        ({"schedule": "linear", "total_steps": 9}, "give one of cosine, exponential and at least 1"),
        ({"patience": 0}, "give one of cosine, exponential and at least 1"),
    ],
)
def test_what_no_rate_would_follow_is_refused(given: dict[str, Any], remedy: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(ValueError, match=remedy):
        AdaptiveLR(optimizer, warmup_steps=2, **given)
