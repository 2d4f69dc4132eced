"""Among many records, those that are most like a question are found without
reading all gradients, and each listed score is that of its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dagster_project.core.errors import InputError
from dagster_project.lineage.attribution import search as search_module
from dagster_project.lineage.attribution import second_moment, sketch, store
from dagster_project.lineage.attribution.ranking import Ranking, robust_z
from dagster_project.lineage.attribution.search import Found, Search, search
from dagster_project.lineage.attribution.second_moment import PrincipalDirections, SecondMoment
from dagster_project.lineage.attribution.store import GradientStore

RECORDS, WIDTH = 1500, 3000
NO_WORDS = np.zeros(RECORDS)


def rows(numbers: Sequence[int]) -> np.ndarray:
    """Gradients that share some directions, some more than others."""
    shared = np.random.default_rng(0).normal(size=(5, WIDTH))
    own = np.stack([np.random.default_rng(int(i)).normal(size=WIDTH) for i in numbers])
    parts = np.stack([np.random.default_rng([int(i), 1]).normal(size=5) for i in numbers])
    return (own + 0.5 * parts @ shared).astype(np.float32)


def gradient_of(numbers: Sequence[int]) -> Any:
    import torch

    return torch.from_numpy(rows(numbers))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> GradientStore:
    """A store that is larger than what is held in memory."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in ((store, "IN_MEMORY", 100), (store, "PROBES", 300), (second_moment, "SAMPLE", 200)):
            patch.setattr(module, name, value)
        one = GradientStore.at(tmp_path_factory.mktemp("large"), {}, RECORDS)
        one.build(gradient_of, "x")
        assert one.is_complete()
        return one


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in (
        (store, "IN_MEMORY", 100),
        (second_moment, "SAMPLE", 200),
        (search_module, "MOST", 40),
        (store, "PROBES", 300),
    ):
        monkeypatch.setattr(module, name, value)


def question(*numbers: int, noise: float = 1.0) -> np.ndarray:
    """One that is like some records."""
    asked: np.ndarray = rows(numbers).sum(0) + noise * np.random.default_rng([*numbers, 2]).normal(size=WIDTH).astype(
        np.float32
    )
    return asked


def found_of(
    one: GradientStore,
    asked: np.ndarray,
    bound: np.ndarray | None = None,
    prompt: np.ndarray = NO_WORDS,
    shown: int = 5,
) -> Found:
    return search([Search(one.read(), asked)], prompt, np.zeros(len(prompt)), bound, shown)


def exact(one: GradientStore, asked: np.ndarray) -> np.ndarray:
    """Scores by the definition, from all gradients in memory."""
    units = one.read().units[:]
    return second_moment.scores(SecondMoment.of(units), units, asked[None])[0]


def test_sketches_keep_inner_products_without_bias() -> None:
    dice = np.random.default_rng(3)
    left, right = (dice.normal(size=(400, 5000)).astype(np.float32) for _ in range(2))
    right += 0.5 * left
    true = (left * right).sum(1)
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    away = ((sketch.sketches(left) * sketch.sketches(right)).sum(1) - true) / lengths
    assert abs(away.mean()) < 4 * away.std() / 20
    assert away.std() == pytest.approx(sketch.NUMBERS**-0.5, rel=0.25)


def test_sketches_in_bytes_lose_little_and_zeros_stay_zeros() -> None:
    rows = sketch.sketches(np.random.default_rng(3).normal(size=(50, 5000)).astype(np.float32))
    rows[7] = 0.0
    short, scales = sketch.in_bytes(rows)
    assert short.dtype == np.int8 and not short[7].any() and scales[7] == 0.0
    away = np.linalg.norm(short * scales[:, None] - rows, axis=1) / np.maximum(np.linalg.norm(rows, axis=1), 1e-9)
    assert away.max() < 0.02


@pytest.mark.parametrize("width", [7, 1024, 2000])
def test_a_sketch_is_the_sum_of_the_signed_numbers_of_each_bucket(width: int) -> None:
    basis = sketch.sketches(np.eye(width, dtype=np.float32))
    assert (np.abs(basis).sum(1) == 1).all(), "each number is added once, with a sign"
    row = np.random.default_rng(0).normal(size=(1, width)).astype(np.float32)
    assert np.allclose(sketch.sketches(row), row @ basis, atol=1e-5)
    assert (sketch.sketches(row) == sketch.sketches(row)).all()


def test_many_gradients_are_read_as_if_they_were_in_memory(large: GradientStore) -> None:
    units = large.read().units
    assert not isinstance(units, np.ndarray) and (len(units), units.shape) == (RECORDS, (RECORDS, WIDTH))
    whole = units[:]
    expected = rows(range(RECORDS)).astype(np.float64)
    assert np.allclose(whole, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=2e-4)
    for part in (slice(30, 70), slice(1490, 1600), np.array([1499, 0, 31, 32, 31]), [5, 700], slice(0, 0)):
        assert np.array_equal(units[part], whole[part])
    assert np.array_equal(units[33], whole[33])
    with pytest.raises(IndexError):
        units[RECORDS]


@pytest.mark.parametrize("planted", [(17,), (1499,), (400, 1200, 801)], ids=["one", "in the last file", "three"])
def test_the_records_behind_a_question_come_first_with_the_scores_of_their_gradients(
    large: GradientStore, planted: tuple[int, ...]
) -> None:
    asked = question(*planted)
    found, whole = found_of(large, asked), exact(large, asked)
    assert set(np.argsort(-found.scores)[: len(planted)]) == set(planted) == set(np.argsort(-whole)[: len(planted)])
    assert found.read[np.argsort(-found.scores)[:5]].all()
    assert found.read.sum() < 700 < RECORDS, "few gradients are read"
    assert np.allclose(found.scores[found.read], whole[found.read], atol=2e-3)


def test_estimates_spread_as_the_scores_do_and_the_stated_error_is_theirs(large: GradientStore) -> None:
    asked = question(17)
    found, whole = found_of(large, asked), exact(large, asked)
    away = (found.scores - whole)[~found.read]
    assert found.error == pytest.approx(float(away.std()), rel=0.2) and abs(away.mean()) < found.error / 4
    assert robust_z(found.scores)[17] == pytest.approx(float(robust_z(whole)[17]), rel=0.2)


def test_a_question_that_is_like_no_record_gets_no_high_score_by_chance(large: GradientStore) -> None:
    asked = np.random.default_rng(8).normal(size=WIDTH).astype(np.float32)
    found, whole = found_of(large, asked), exact(large, asked)
    assert found.certain.max() <= whole.max() + 1e-3
    assert (found.certain[~found.read] == -1).all()


def test_records_without_a_gradient_do_not_hide_the_others(tmp_path: Path) -> None:
    """More than half of the scores are 0 then, and so is the spread of the probes."""
    import torch

    one = GradientStore.at(tmp_path, {}, 640)
    one.build(lambda numbers: gradient_of(numbers) * (torch.tensor(numbers) % 4 == 1)[:, None], "x")
    asked = question(17)
    found, whole = found_of(one, asked, prompt=NO_WORDS[:640]), exact(one, asked)
    assert found.scores.argmax() == whole.argmax() == 17 and np.allclose(
        found.scores[found.read], whole[found.read], atol=2e-3
    )
    for shown in (1, 50, 400, 640):
        found = found_of(one, asked, prompt=NO_WORDS[:640], shown=shown)
        listed = Ranking.of(found.scores, NO_WORDS[:640], NO_WORDS[:640]).order()[:shown]
        assert found.read[listed].all(), "also where many records have equal scores"


def test_records_that_are_listed_for_their_words_have_the_scores_of_their_gradients(large: GradientStore) -> None:
    prompt = np.zeros(RECORDS)
    prompt[333] = 9.0
    found = found_of(large, question(17), prompt=prompt)
    assert found.read[333]


def test_records_far_above_other_questions_are_read(large: GradientStore) -> None:
    bound = np.full(RECORDS, 0.5, np.float32)
    bound[901] = -0.5
    assert found_of(large, question(17), bound).read[901]


def test_the_scores_of_points_of_a_training_are_averaged(large: GradientStore) -> None:
    stored = large.read()
    asked = [question(17), question(21)]
    found = search([Search(stored, one) for one in asked], NO_WORDS, NO_WORDS, None, 5)
    mean = np.mean([exact(large, one) for one in asked], axis=0)
    assert set(np.argsort(-found.scores)[:2]) == {17, 21} and np.allclose(
        found.scores[found.read], mean[found.read], atol=2e-3
    )


@pytest.mark.parametrize("kept", [200, 60, 8])
def test_principal_directions_take_out_what_the_second_moment_does(
    large: GradientStore, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the largest share of a direction that is not among them."""
    monkeypatch.setattr(second_moment, "PRINCIPAL", kept)
    units, asked = large.read().units[:], np.stack([question(i) for i in (17, 21, 33)])
    moment = SecondMoment.of(units)
    whole, found = (one.directions(units, asked) for one in (moment, PrincipalDirections.of(units)))
    values = np.linalg.eigvalsh(moment.inner.astype(np.float64))[::-1]
    dropped = values[kept] / (values[kept] + moment.damping) if kept < 200 else 0.0
    away = np.linalg.norm(found - whole, axis=1)
    assert (away < dropped + 0.01).all() and (dropped < 0.05 or (away > 0.01).all())


def test_few_records_are_all_compared(tmp_path: Path) -> None:
    one = GradientStore.at(tmp_path, {}, 90)
    one.build(gradient_of, "x")
    assert not (one.folder / "sketches.safetensors").exists()
    found = search([Search(one.read(), question(17))], NO_WORDS[:90], NO_WORDS[:90], None, 5)
    assert found.error is None and found.read.all() and np.array_equal(found.scores, exact(one, question(17)))


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "change", [Path.unlink, damage, lambda path: path.write_bytes(b"")], ids=["missing", "damaged", "empty"]
)
def test_a_gradient_that_is_missing_or_damaged_is_refused_when_it_is_read(
    tmp_path: Path, change: Callable[[Path], Any]
) -> None:
    one = GradientStore.at(tmp_path, {}, 320)
    one.build(gradient_of, "x")
    change(one.folder / "gradients-00003.safetensors")
    with pytest.raises(InputError, match=r"incomplete or damaged: gradients-00003\.safetensors"):
        one.read().units[:]
    assert one.missing() == [3] and not one.is_complete()
    assert one.build(gradient_of, "x") == 32 and one.is_complete()


@pytest.mark.parametrize("change", [Path.unlink, damage], ids=["missing", "damaged"])
def test_sketches_that_are_missing_or_damaged_are_refused_and_computed_again(
    tmp_path: Path, change: Callable[[Path], Any]
) -> None:
    one = GradientStore.at(tmp_path, {}, 320)
    one.build(gradient_of, "x")
    before = (one.folder / "sketches.safetensors").read_bytes()
    change(one.folder / "sketches.safetensors")
    with pytest.raises(InputError, match="incomplete or damaged: 1 of 12 files"):
        one.read()
    assert one.build(gradient_of, "x") == 0 and one.is_complete()
    assert (one.folder / "sketches.safetensors").read_bytes() == before
    with pytest.raises(InputError, match="are missing: 12 of 12 files"):
        GradientStore.at(tmp_path, {"of": "another"}, 320).read()
