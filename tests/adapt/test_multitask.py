"""If these fail, a teacher learns no categories, or loses retrieval to them in a way that nobody chose."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")
pytest.importorskip("peft", reason="the host half is not installed")

import msgspec  # noqa: E402

from edgeglm.adapt import alignment as room  # noqa: E402
from edgeglm.adapt.alignment import Alignment  # noqa: E402
from edgeglm.adapt.meta import reptile, tasks_of  # noqa: E402
from edgeglm.adapt.multitask import kinds_of  # noqa: E402
from edgeglm.core.errors import UserError  # noqa: E402
from edgeglm.core.progress import QuietProgress  # noqa: E402
from edgeglm.core.teacher_config import DomainConfig, MultitaskConfig  # noqa: E402
from edgeglm.data.pairs import PairSet  # noqa: E402
from edgeglm.train.balance import (  # noqa: E402
    ConflictFreeBalance,
    GradNormBalance,
    UncertaintyBalance,
)
from edgeglm.train.concepts import Concepts  # noqa: E402
from edgeglm.train.loop import DivergedError  # noqa: E402
from tests.adapt.styles import CONCEPTS, CONFIG, Words, found_names, styled  # noqa: E402
from tests.adapt.teachers import teacher_of  # noqa: E402
from tests.synthetic import write_synthetic_pairs  # noqa: E402

BALANCES = ("fixed", "uncertainty", "gradnorm", "pcgrad")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MIN_STEPS", 80)
    monkeypatch.setattr(room, "MIN_PSEUDO_STEPS", 30)


def kinds(tmp_path: Path) -> tuple[PairSet, Any]:
    """Three categories by number, six subcategories; every fourth concept says none."""
    pairs, features = styled(tmp_path)

    def told(number: int) -> dict[str, str]:
        return {} if number % 4 == 3 else {"category": f"c{number % 3}", "subcategory": f"s{number % 6}"}

    rows = tuple(msgspec.structs.replace(row, **told(int(row.concept.split()[1]))) for row in pairs.rows)
    return dataclasses.replace(pairs, rows=rows), features


def aligned(pairs: PairSet, features: Any, wanted: MultitaskConfig, **more: Any) -> Alignment:
    concepts = Concepts.of(pairs)
    meta = tasks_of(pairs, concepts, wanted.reptile_over) if wanted.reptile_rounds else ()
    config = msgspec.structs.replace(CONFIG, multitask=wanted, **more)
    told = kinds_of(wanted, pairs, concepts)
    return teacher_of(features, concepts, Words(), config, kinds=told, meta_tasks=meta)


@pytest.mark.parametrize(
    ("balance", "sharing"), [*((one, "hard") for one in BALANCES), ("fixed", "soft"), ("uncertainty", "soft")]
)
def test_categories_are_learned_beside_retrieval(balance: Any, sharing: Any, tmp_path: Path) -> None:
    if balance == "pcgrad":
        pytest.importorskip("torchjd", reason="the host half is not installed as the lock says")
    pairs, features = kinds(tmp_path)
    wanted = MultitaskConfig(category_weight=1.0, subcategory_weight=0.5, balance=balance, sharing=sharing)
    made = aligned(pairs, features, wanted)
    assert made.multitask is not None
    labelled = pairs.by_role("labelled").tolist()
    scores = made.multitask.scores(features[0], pairs, labelled)
    assert scores["category"]["images"] == len(labelled) * 3 // 4
    assert scores["category"]["accuracy"] > 0.6
    assert scores["category"]["macro_f1"] > 0.6
    assert scores["subcategory"]["accuracy"] > 0.5
    plain = aligned(pairs, features, MultitaskConfig())
    assert plain.multitask is None
    labels = dataclasses.replace(
        pairs, rows=tuple(msgspec.structs.replace(r, role="unlabelled" if r.domain == "one" else "held")
                          for r in pairs.rows),
    )  # fmt: skip
    # GradNorm gives retrieval, whose gradient is by far the steepest here, little weight: it is asked to.
    least = 0.2 if balance == "gradnorm" else 0.8
    assert found_names(made, labels) > least * found_names(plain, labels) > 0.15


def test_soft_sharing_keeps_two_heads_and_pulls_them_together(tmp_path: Path) -> None:
    pairs, features = kinds(tmp_path)
    apart = []
    for pull in (0.0, 1.0):
        made = aligned(
            pairs, features, MultitaskConfig(category_weight=1.0, sharing="soft", soft_weight=pull)
        )
        assert made.multitask is not None
        assert made.multitask.own_head is not None
        apart.append(float(made.multitask._apart(made.multitask.own_head).detach()))
    assert 0 < apart[1] < 0.5 * apart[0]


def test_the_second_head_starts_where_a_first_state_has_led(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, features = kinds(tmp_path)
    wanted = MultitaskConfig(category_weight=1.0, sharing="soft", reptile_rounds=4, reptile_over="categories")
    seen: list[tuple[float, int]] = []

    def fitted(alignment: Alignment, phase: str, epochs: int, **_: Any) -> None:
        assert alignment.multitask is not None
        assert alignment.multitask.own_head is not None
        apart = alignment.multitask._apart(alignment.multitask.own_head)
        seen.append((float(apart.detach()), len(alignment.curves)))

    monkeypatch.setattr(Alignment, "_fit_heads", fitted)
    aligned(pairs, features, wanted, lora_epochs=0)
    assert seen == [(0.0, 1)], "a head that was left behind pulls the first one back"


def test_what_unlabelled_and_held_images_are_is_never_read(tmp_path: Path) -> None:
    pairs, features = kinds(tmp_path)
    wanted = MultitaskConfig(category_weight=1.0)
    others = tuple(
        row if row.role == "labelled" else msgspec.structs.replace(row, category="c0") for row in pairs.rows
    )
    one, other = (aligned(p, features, wanted) for p in (pairs, dataclasses.replace(pairs, rows=others)))
    assert np.array_equal(one.image_embeddings(), other.image_embeddings())


def test_pseudo_labelled_images_tell_no_category(tmp_path: Path) -> None:
    from edgeglm.adapt.domains import Domains

    pairs, features = kinds(tmp_path)
    concepts = Concepts.of(pairs)
    wanted = MultitaskConfig(category_weight=1.0)
    config = msgspec.structs.replace(CONFIG, multitask=wanted, domain=DomainConfig(pseudo_label_rounds=1))
    domains, told = Domains.of(pairs, concepts), kinds_of(wanted, pairs, concepts)
    made = teacher_of(features, concepts, Words(), config, domains=domains, kinds=told)
    assert made.pseudo_labels[0] > 0


def test_uncertainty_lowers_the_weight_of_a_loss_that_stays_large() -> None:
    balance = UncertaintyBalance(2)
    optimizer = torch.optim.SGD(balance.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        torch.autograd.backward(balance.combined([torch.tensor(0.1), torch.tensor(4.0)]))
        optimizer.step()
    weights = torch.exp(-balance.log_variance_T.detach())
    assert weights[0] > 5 > 1 > weights[1]
    assert float(weights[1]) == pytest.approx(1 / 4, rel=0.1), "the least of exp(-s) L + s is at s = log L"


def test_gradnorm_makes_a_steep_loss_as_steep_as_the_others() -> None:
    shared = torch.nn.Parameter(torch.ones(3))
    balance = GradNormBalance(2, [shared], alpha=0.0)
    for _ in range(300):
        losses = [10.0 * shared.sum() + 5.0, shared.sum() + 5.0]
        balance.combined(losses)
    assert float(balance.weight_T.sum()) == pytest.approx(2.0)
    steep, flat = (10 * balance.weight_T[0], balance.weight_T[1])
    assert float(steep) == pytest.approx(float(flat), rel=0.4)
    state = balance.state_dict()
    other = GradNormBalance(2, [shared], alpha=0.0)
    other.load_state_dict(state)
    assert torch.equal(other.weight_T, balance.weight_T)


def test_a_batch_without_a_case_of_a_loss_leaves_the_others_their_weights() -> None:
    shared = torch.nn.Parameter(torch.ones(2))
    balance = GradNormBalance(2, [shared], alpha=1.5)
    for step in range(60):
        other = (shared + 1).square().sum() * float(step % 3 > 0)
        balance.combined([(shared - 3).square().sum(), other])
    torch.testing.assert_close(balance.weight_T, torch.ones(2), atol=0.03, rtol=0)
    assert balance.first_T is not None
    assert balance.first_T.tolist() == [8.0, 8.0]


def test_conflicting_gradients_are_projected_at_what_is_shared_and_nowhere_else() -> None:
    pytest.importorskip("torchjd", reason="the host half is not installed as the lock says")
    shared = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    own = torch.nn.Parameter(torch.tensor([2.0, 3.0]))
    balance = ConflictFreeBalance(2, [shared])
    first, second = (gate(shared) for gate in balance.gates())
    losses = [first @ torch.tensor([1.0, 0.0]), (second * own) @ torch.tensor([-0.5, 0.5])]
    torch.autograd.backward(balance.combined(losses))
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.5])
    wanted = (one - (one @ other) / (other @ other) * other) + (other - (one @ other) / (one @ one) * one)
    assert shared.grad is not None
    assert own.grad is not None
    torch.testing.assert_close(shared.grad, wanted)
    torch.testing.assert_close(own.grad, torch.tensor([-0.5, 0.5]))


@pytest.mark.parametrize("balance", ["gradnorm", "pcgrad"])
def test_nothing_shared_leaves_nothing_to_balance(balance: Any, tmp_path: Path) -> None:
    pairs, features = kinds(tmp_path)
    with pytest.raises(UserError, match=r'soft sharing has none; set teacher\.multitask\.sharing = "hard"'):
        aligned(pairs, features, MultitaskConfig(category_weight=1.0, sharing="soft", balance=balance))


def test_pairs_that_say_no_category_are_refused(tmp_path: Path) -> None:
    pairs, features = styled(tmp_path)
    with pytest.raises(UserError, match=r"are of 0 category, .*set data\.categories = true"):
        aligned(pairs, features, MultitaskConfig(category_weight=1.0))
    with pytest.raises(UserError, match=r"finds 0 with 8 labelled images"):
        aligned(pairs, features, MultitaskConfig(reptile_rounds=2, reptile_over="categories"))


def test_a_first_state_of_reptile_is_learned_from_in_fewer_steps() -> None:
    """Tasks are sines of any phase, as in the paper: ten steps from the found state beat ten from chance."""

    def batches(task: Any, rng: np.random.Generator) -> Any:
        for _ in range(10):
            x = torch.from_numpy(rng.uniform(-5, 5, 20)).float()[:, None]
            yield x, torch.sin(x + float(task))

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    start = [parameter.detach().clone() for parameter in model.parameters()]

    def loss_of(batch: Any) -> Any:
        return ((model(batch[0]) - batch[1]) ** 2).mean()

    def after_a_few_steps(state: Any) -> float:
        losses = []
        for phase in (0.5, 1.5, 2.5):
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), state, strict=True):
                    parameter.copy_(value)
            optimizer = torch.optim.Adam(model.parameters(), lr=0.02, betas=(0.0, 0.999))
            for batch in batches(phase, np.random.default_rng(3)):
                optimizer.zero_grad()
                torch.autograd.backward(loss_of(batch))
                optimizer.step()
            losses.append(float(loss_of(next(batches(phase, np.random.default_rng(9)))).detach()))
        return sum(losses)

    tasks = tuple(torch.tensor(0.25 * i) for i in range(12))
    curve = reptile(
        list(model.parameters()), tasks, batches, loss_of,
        rounds=240, reach=0.5, learning_rate=0.02, seed=0, progress=QuietProgress(),
    )  # fmt: skip
    found = [parameter.detach().clone() for parameter in model.parameters()]
    assert len(curve) == 240
    assert after_a_few_steps(found) < 0.8 * after_a_few_steps(start)


def test_a_first_state_that_diverges_names_its_batch_and_round() -> None:
    weight, losses = torch.nn.Parameter(torch.ones(1)), iter([1.0, 1.0, 1.0, float("nan")])
    with pytest.raises(DivergedError, match=r"batch 1 is nan in round 1; lower teacher\.learning_rate"):
        reptile(
            [weight], [torch.zeros(1)] * 2, lambda *_: range(2), lambda _: weight.sum() * next(losses),
            rounds=2, reach=0.5, learning_rate=0.1, seed=0, progress=QuietProgress(),
        )  # fmt: skip


def test_styles_and_categories_are_tasks_and_the_heads_start_from_them(tmp_path: Path) -> None:
    pairs, features = kinds(tmp_path)
    concepts = Concepts.of(pairs)
    styles, categories = (tasks_of(pairs, concepts, over) for over in ("styles", "categories"))
    assert [len(task) for task in styles] == [CONCEPTS, CONCEPTS]
    assert len(categories) == 3
    wanted = MultitaskConfig(reptile_rounds=6)
    made = aligned(pairs, features, wanted)
    assert len(made.curves["first state"]) == 6
    plain = aligned(pairs, features, MultitaskConfig())
    assert made.curves["warm-up"][0] < plain.curves["warm-up"][0]


@pytest.mark.parametrize(
    ("over", "remedy"),
    [("categories", 'give more images of each category, or set it to "styles"$'),
     ("styles", r"set it to \"categories\", .* or the key category in your lines$")],
)  # fmt: skip
def test_a_first_state_without_two_tasks_names_what_is_not_set_yet(
    over: str, remedy: str, tmp_path: Path
) -> None:
    pairs = PairSet.open(write_synthetic_pairs(tmp_path / "pairs", size=16))
    with pytest.raises(UserError, match=f"{over}' finds [01] with 8 .* and needs two; {remedy}"):
        tasks_of(pairs, Concepts.of(pairs), over)


@pytest.mark.parametrize("wanted", [{"balance": "pcgrad"}, {"sharing": "soft"}])
def test_a_balance_of_nothing_is_refused_and_not_passed_over(wanted: Any, tmp_path: Path) -> None:
    pairs, _ = kinds(tmp_path)
    with pytest.raises(UserError, match=r"no task beside the retrieval; set category_weight or"):
        kinds_of(MultitaskConfig(**wanted), pairs, Concepts.of(pairs))
