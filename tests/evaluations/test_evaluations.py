import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from darkmatter import changes, evaluations, plugin
from darkmatter.changes import Change
from darkmatter.evaluations import (
    Skipped,
    Subject,
    _episodes,
    _logistic,
    energy_margin,
    few_shot,
    knn,
    least_squares,
    linear_probe,
    localisation,
    rankme,
    retrieval,
    robustness,
)


def subject(*, spread: float = 1.0, classes: int = 6, each: int = 40, unlabelled: int = 0) -> Subject:
    random = np.random.default_rng(0)
    centres = 3 * random.normal(size=(classes, 16))
    labels = np.repeat(np.arange(classes), each)
    draw = lambda: (centres[labels] + spread * 3 * random.normal(size=(len(labels), 16))).astype(np.float32)  # noqa: E731
    bank, queries = draw(), draw()
    known = labels.copy()
    known[:unlabelled] = -1
    energies = random.normal(size=(2, len(labels))).astype(np.float32)
    validation, views = draw(), np.stack([draw(), draw(), draw()], 1)
    grid = changes.pasted_mask(np.arange(len(labels)), 7, seed=0).astype(np.float32)
    return Subject(
        name="toy", bank=bank, bank_labels=known, queries=queries, query_labels=labels,
        compatible=energies[0] - 2, incompatible=energies[1], validation=validation, validation_labels=labels,
        views=views, similarity=grid, changed=dict.fromkeys((*CORRUPTED, localisation.PASTE), queries),
    )  # fmt: skip


CORRUPTED = (Change("noise", 3), Change("blur", 3))
FEW = few_shot.Config(ways=[3, "all"], shots=[1, 5], episodes=50, queries=10)
OPTIONS: dict[str, dict[str, Any]] = {
    "few_shot": FEW.model_dump(),
    "knn": {"neighbours": 5, "temperature": 0.1},
    "linear_probe": {"shares": [0.1, 1.0], "per_class": [3], "draws": 2, "strengths": 6},
    "least_squares": {"shots": [1, 5], "draws": 3, "l2": 1024.0},
    "retrieval": {"nearest": [1, 5]},
    "robustness": {
        "corruptions": ["noise", "blur"], "severity": 3, "ways": 3, "shots": 5, "episodes": 50, "queries": 10,
    },
}  # fmt: skip


def picks(toy: Subject, *, shots: int = 5, ways: int | str = "all") -> np.ndarray:
    drawn = _episodes.draw(toy.query_labels, ways, shots, 10, 20, 0)
    assert isinstance(drawn, np.ndarray)
    return drawn


# With one sample a class scikit-learn divides by n_samples - n_classes = 0 for a spread that we do not use.
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
@pytest.mark.parametrize("shots", [1, 5])
@pytest.mark.parametrize(
    ("classifier", "reference"), [("centroid", NearestCentroid()), ("logistic", LogisticRegression(C=1.0, tol=1e-8))]
)
def test_episodes_are_scikit_learns(classifier: str, reference: Any, shots: int) -> None:
    toy = subject()
    features = evaluations.unit(toy.queries, toy.bank.mean(0))
    drawn = picks(toy, shots=shots)
    expected = []
    for episode in drawn:
        learn, ask = (
            features[part].reshape(-1, features.shape[1]) for part in (episode[:, :shots], episode[:, shots:])
        )
        reference.fit(learn, np.repeat(np.arange(len(episode)), shots))
        expected.append((reference.predict(ask) == np.repeat(np.arange(len(episode)), 10)).mean())
    found = _episodes.accuracy(features, features, drawn, shots, classifier)
    # Both minimise one convex function; a query on the border may fall to either side.
    assert found == pytest.approx(expected, abs=1e-12 if classifier == "centroid" else 1 / 60 + 1e-9)
    assert found.mean() == pytest.approx(np.mean(expected), abs=0.002)
    assert 0.3 < found.mean() < 0.99


def test_each_classifier_has_its_own_protocols() -> None:
    both = FEW.model_copy(update={"classifiers": ["centroid", "logistic"], "ways": [3], "shots": [5]})
    plain, logistic = few_shot.scores(both, subject(), seed=0)
    assert (plain.name, logistic.name) == ("3-way 5-shot", "3-way 5-shot logistic")
    assert np.corrcoef(plain.draws, logistic.draws)[0, 1] > 0.5  # the same episodes


def test_episodes_never_classify_what_they_learned_from() -> None:
    toy = subject()
    for ways in (3, "all"):
        for episode in picks(toy, ways=ways):
            assert len(np.unique(episode)) == episode.size
            labels = toy.query_labels[episode]
            assert (labels == labels[:, :1]).all()
            assert len(np.unique(labels[:, 0])) == len(labels)


def test_all_subjects_meet_the_same_episodes_and_another_seed_gives_others() -> None:
    first, second = subject(), subject(spread=0.2)
    again = [score.draws for score in few_shot.scores(FEW, first, seed=0)]
    for one, two in zip(few_shot.scores(FEW, first, seed=0), again, strict=True):
        assert (one.draws == two).all()
    other = next(few_shot.scores(FEW, first, seed=1))
    assert (other.draws != again[0]).any()
    assert next(few_shot.scores(FEW, second, seed=0)).mean > next(few_shot.scores(FEW, first, seed=0)).mean


def test_classes_that_are_too_small_are_not_drawn() -> None:
    tight = few_shot.Config(ways=[5], shots=[20], episodes=5, queries=15)
    assert len(list(few_shot.scores(tight, subject(each=40), seed=0))) == 1
    (skipped,) = few_shot.scores(tight, subject(each=34), seed=0)
    assert skipped == Skipped(name="5-way 20-shot", reason="0 classes have 35 labelled test samples")


@pytest.mark.parametrize(("samples", "features"), [(200, 16), (30, 64)])
@pytest.mark.parametrize("strength", [1e-3, 1.0, 1e3])
def test_logistic_regression_is_scikit_learns(samples: int, features: int, strength: float) -> None:
    random = np.random.default_rng(0)
    labels = np.arange(samples) % 5
    known = 3 + random.normal(size=(5, features))[labels] + 2 * random.normal(size=(samples, features))
    reference = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000).fit(known, labels)
    twice = torch.from_numpy(known).expand(2, -1, -1), torch.from_numpy(labels).expand(2, -1)
    linear = _logistic.fit(*twice, 5, strength)
    again = _logistic.fit(*twice, 5, strength, start=_logistic.fit(*twice, 5, strength / 10))
    expected = reference.predict_proba(known)
    for found in (linear, again):
        probabilities = (torch.from_numpy(known) @ found.weight + found.bias).softmax(2)
        assert probabilities[0].numpy() == pytest.approx(expected, abs=5e-3)
        assert torch.equal(found.predict(twice[0]).float().std(0), torch.zeros(samples))


def test_a_probe_chooses_its_strength_on_the_validation_split_and_scores_the_test_split_once() -> None:
    toy = subject()
    config = linear_probe.Config(shares=[1.0], per_class=[], draws=2, strengths=6)
    (score,) = linear_probe.scores(config, toy, seed=0)
    best = max(
        linear_probe.strengths_of(6),
        key=lambda c: (
            LogisticRegression(C=c, max_iter=5000)
            .fit(toy.bank, toy.bank_labels)
            .score(toy.validation, toy.validation_labels),
            -c,
        ),
    )
    both = np.concatenate([toy.bank, toy.validation]), np.concatenate([toy.bank_labels, toy.validation_labels])
    reference = LogisticRegression(C=best, max_iter=5000).fit(*both)
    assert score.name == "1 of labels"
    assert score.mean == pytest.approx(reference.score(toy.queries, toy.query_labels), abs=0.01)
    # Answers of the test split decide nothing: with others only the score is another one.
    wrong = dataclasses.replace(toy, query_labels=np.roll(toy.query_labels, 40))
    (other,) = linear_probe.scores(config, wrong, seed=0)
    assert other.mean < 0.3


def test_what_a_probe_is_judged_by_and_learns_from(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = subject()
    astray = dataclasses.replace(toy, validation_labels=np.roll(toy.validation_labels, 40))
    for _, _, found in linear_probe._path(astray, np.arange(240)[None], 4):
        assert found.max() < 0.3  # by the validation split, whose answers are wrong here
    seen: list[torch.Tensor] = []
    fit = _logistic.fit
    monkeypatch.setattr(
        _logistic, "fit", lambda features, *rest, **more: seen.append(features) or fit(features, *rest, **more)
    )
    list(linear_probe.scores(linear_probe.Config(shares=[1.0], draws=2, strengths=3), toy, seed=0))
    *tried, last = seen
    assert all((features[0].numpy() == toy.bank).all() for features in tried)
    assert (last[0].numpy() == np.concatenate([toy.bank, toy.validation])).all()


def test_more_labels_are_better_and_draws_are_the_same_for_all() -> None:
    config = linear_probe.Config(shares=[0.025, 0.5], per_class=[2], draws=3, strengths=4)
    few, many, two = linear_probe.scores(config, subject(), seed=0)
    assert [few.name, many.name, two.name] == ["0.025 of labels", "0.5 of labels", "2 a class"]
    assert few.mean < two.mean < many.mean
    assert len(few.draws) == 3
    assert len(set(few.draws)) > 1
    again = next(linear_probe.scores(config, subject(), seed=0))
    assert (again.draws == few.draws).all()


def test_a_probe_without_labels_on_the_validation_split_says_so() -> None:
    toy = subject()
    blind = dataclasses.replace(toy, validation_labels=np.full_like(toy.validation_labels, -1))
    (skipped,) = linear_probe.scores(linear_probe.Config(per_class=[2], draws=2, strengths=3), blind, seed=0)
    assert "validation split" in skipped.reason


@pytest.mark.parametrize("each", [2, 40])  # fewer samples than features, and more
def test_least_squares_is_ridge_regression_to_plus_and_minus_one(each: int) -> None:
    toy = subject()
    chosen = evaluations.some_of_each(toy.bank_labels, each, np.random.default_rng(0))
    known, labels = toy.bank[chosen].astype(np.float64), toy.bank_labels[chosen]
    mean, deviation = known.mean(0), known.std(0) + 1e-5
    rows = lambda x: np.column_stack([(x - mean) / deviation, np.full(len(x), 100.0)])  # noqa: E731
    reference = Ridge(alpha=1024.0, fit_intercept=False).fit(rows(known), 2.0 * (labels[:, None] == np.arange(6)) - 1)
    found = least_squares.predict(toy.bank[chosen], labels, toy.queries, 1024.0)
    assert (found == reference.predict(rows(toy.queries.astype(np.float64))).argmax(1)).all()


def test_the_bias_of_least_squares_is_hardly_regularised() -> None:
    """With one class much larger than the others a bias that is held back would not reach its share."""
    toy = subject(spread=3)
    chosen = np.concatenate([np.arange(40), *(np.arange(40 * label, 40 * label + 3) for label in range(1, 6))])
    known, labels = toy.bank[chosen].astype(np.float64), toy.bank_labels[chosen]
    scaled = (known - known.mean(0)) / (known.std(0) + 1e-5)
    asked = (toy.queries - known.mean(0)) / (known.std(0) + 1e-5)
    reference = Ridge(alpha=1024.0).fit(scaled, 2.0 * (labels[:, None] == np.arange(6)) - 1)  # its bias is free
    found = least_squares.predict(toy.bank[chosen], labels, toy.queries, 1024.0)
    assert (found == reference.predict(asked).argmax(1)).mean() > 0.98


def test_retrieval_is_scikit_learns_average_precision() -> None:
    toy = subject()
    mean, first, fifth = retrieval.scores(retrieval.Config(nearest=[1, 5]), toy, seed=0)
    centre = toy.bank.mean(0)
    similarity = evaluations.unit(toy.queries, centre) @ evaluations.unit(toy.bank, centre).T
    expected = [
        average_precision_score(toy.bank_labels == label, row)
        for label, row in zip(toy.query_labels, similarity, strict=True)
    ]
    assert mean.draws == pytest.approx(expected, abs=1e-3)  # ties
    assert first.mean == pytest.approx((toy.bank_labels[similarity.argmax(1)] == toy.query_labels).mean())
    assert first.mean < fifth.mean <= 1


def test_robustness_asks_the_few_shot_episodes_about_changed_pictures() -> None:
    toy = subject()
    config = robustness.Config(**OPTIONS["robustness"])
    plain = next(few_shot.scores(FEW.model_copy(update={"ways": [3], "shots": [5]}), toy, seed=0))
    noise, blur = robustness.scores(config, toy, seed=0)
    assert noise.name == "3-way 5-shot noise 3"
    assert (noise.draws == plain.draws).all()  # here the changed pictures are the same
    lost = dataclasses.replace(toy, changed={**toy.changed, CORRUPTED[1]: toy.queries[::-1].copy()})
    noise, blur = robustness.scores(config, lost, seed=0)
    assert (noise.draws == plain.draws).all()
    assert blur.mean < plain.mean - 0.1


def test_a_representation_that_knows_where_has_the_place_and_the_object() -> None:
    toy = subject()
    numbers = np.arange(len(toy.queries))
    places = changes.pasted_at(numbers, seed=0)
    knows = np.column_stack([toy.queries[:, 2:], 5 * places]).astype(np.float32)
    score = functools.partial(localisation.scores, localisation.Config(), seed=0)
    position, segmentation = score(dataclasses.replace(toy, changed={localisation.PASTE: knows}))
    assert position.mean > 0.9
    assert segmentation.mean == 1.0  # the toy's similarity is the mask
    position, segmentation = score(
        dataclasses.replace(toy, similarity=np.random.default_rng(0).random((len(numbers), 7, 7)).astype(np.float32))
    )
    assert position.mean < 0.1
    assert segmentation.mean == pytest.approx(0.5, abs=0.05)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        score = evaluations.of_draws("", random.normal(0.7, 0.1, 100))
        assert score.ci95 is not None
        hits += abs(score.mean - 0.7) <= score.ci95
    assert 0.93 < hits / 2000 < 0.965


def test_interval_of_few_draws_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    hits = [abs(draws.mean()) <= evaluations.half_width(draws) for draws in random.normal(size=(4000, 4))]
    assert 0.935 < np.mean(hits) < 0.965


def test_knn_is_scikit_learns() -> None:
    toy = subject()
    config = knn.Config(neighbours=7, temperature=0.5)
    (score,) = knn.scores(config, toy, seed=0)
    centre = toy.bank.mean(0)
    bank, queries = evaluations.unit(toy.bank, centre), evaluations.unit(toy.queries, centre)
    weigh = lambda distances: np.exp((1 - np.square(distances) / 2) / 0.5)  # noqa: E731 (cosine of unit vectors)
    reference = KNeighborsClassifier(7, weights=weigh).fit(bank, toy.bank_labels)
    assert score.mean == pytest.approx((reference.predict(queries) == toy.query_labels).mean(), abs=0.006)
    assert score.name == "top-1 k=7"


def test_knn_without_labels_says_nothing_and_ignores_unlabelled_neighbours() -> None:
    config = knn.Config(neighbours=7, temperature=0.5)
    assert list(knn.scores(config, subject(unlabelled=240), seed=0)) == [
        Skipped(name="top-1 k=7", reason="there are no labels")
    ]
    (score,) = knn.scores(config, subject(unlabelled=39), seed=0)
    assert score.mean > 0.3


def test_energy_margin_has_the_interval_of_hanley_and_mcneil() -> None:
    toy = subject(each=20)
    (score,) = energy_margin.scores(energy_margin.Config(), toy, seed=0)
    assert toy.compatible is not None
    assert toy.incompatible is not None
    random = np.random.default_rng(0)
    boot = []
    for _ in range(400):
        a, b = (random.choice(values, len(values)) for values in (toy.compatible, toy.incompatible))
        boot.append((a[:, None] < b[None]).mean())
    assert score.mean == pytest.approx(np.mean(boot), abs=0.01)
    assert score.ci95 == pytest.approx(1.96 * np.std(boot), rel=0.35)


def test_energy_margin_and_rankme_need_no_labels() -> None:
    toy = subject(unlabelled=240)
    (score,) = rankme.scores(rankme.Config(), toy, seed=0)
    assert 1 < score.mean <= 16
    pixels = Subject(
        name="pixels",
        bank=toy.bank,
        bank_labels=toy.bank_labels,
        queries=toy.queries,
        query_labels=toy.query_labels,
        validation=toy.validation,
        validation_labels=toy.validation_labels,
    )
    assert list(energy_margin.scores(energy_margin.Config(), pixels, seed=0)) == []


@pytest.mark.parametrize("name", plugin.names("evaluations"))
def test_every_evaluation_gives_bounded_finite_scores(name: str) -> None:
    module = plugin.load("evaluations", name, where="test")
    found = list(module.scores(module.Config(**OPTIONS.get(name, {})), subject(), seed=0))
    assert found
    for score in found:
        assert np.isfinite(score.mean)
        assert score.ci95 is None or 0 <= score.ci95 < 0.5
