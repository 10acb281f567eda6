import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from darkmatter import evaluations, plugin
from darkmatter.evaluations import Skipped, Subject, energy_margin, few_shot, knn, rankme


def subject(*, spread: float = 1.0, classes: int = 6, each: int = 40, unlabelled: int = 0) -> Subject:
    random = np.random.default_rng(0)
    centres = 3 * random.normal(size=(classes, 16))
    labels = np.repeat(np.arange(classes), each)
    draw = lambda: (centres[labels] + spread * 3 * random.normal(size=(len(labels), 16))).astype(np.float32)  # noqa: E731
    bank, queries = draw(), draw()
    known = labels.copy()
    known[:unlabelled] = -1
    energies = random.normal(size=(2, len(labels))).astype(np.float32)
    return Subject(
        name="toy", bank=bank, bank_labels=known, queries=queries, query_labels=labels,
        compatible=energies[0] - 2, incompatible=energies[1],
    )  # fmt: skip


FEW = few_shot.Config(ways=[3, "all"], shots=[1, 5], episodes=50, queries=10)


# With one sample a class scikit-learn divides by n_samples - n_classes = 0 for a spread that we do not use.
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
def test_episodes_are_scikit_learns_nearest_centroid(monkeypatch: pytest.MonkeyPatch) -> None:
    ours: list[float] = []
    theirs: list[float] = []
    accuracy = few_shot._accuracy

    def both(features: np.ndarray, shots: int) -> float:
        ways = len(features)
        learn, ask = features[:, :shots].reshape(ways * shots, -1), features[:, shots:].reshape(ways * 10, -1)
        model = NearestCentroid().fit(learn, np.repeat(np.arange(ways), shots))
        theirs.append(float((model.predict(ask) == np.repeat(np.arange(ways), 10)).mean()))
        ours.append(accuracy(features, shots))
        return ours[-1]

    monkeypatch.setattr(few_shot, "_accuracy", both)
    names = [score.name for score in few_shot.scores(FEW, subject(), seed=0)]
    assert names == ["3-way 1-shot", "3-way 5-shot", "all-way 1-shot", "all-way 5-shot"]
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert 0.3 < np.mean(ours) < 0.99


def test_episodes_never_classify_what_they_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = subject()
    numbered = np.arange(len(toy.queries), dtype=np.float32)[:, None]
    monkeypatch.setattr(few_shot, "unit", lambda features, centre: numbered)
    seen: list[np.ndarray] = []
    monkeypatch.setattr(few_shot, "_accuracy", lambda features, shots: seen.append(features) or 0.0)
    list(few_shot.scores(FEW, toy, seed=0))
    assert len(seen) == 4 * FEW.episodes
    for features in seen:
        assert len(np.unique(features)) == features.size
        labels = toy.query_labels[features[..., 0].astype(int)]
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


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        score = evaluations.of_draws("", random.normal(0.7, 0.1, 100))
        assert score.ci95 is not None
        hits += abs(score.mean - 0.7) <= score.ci95
    assert 0.93 < hits / 2000 < 0.965


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
        name="pixels", bank=toy.bank, bank_labels=toy.bank_labels, queries=toy.queries, query_labels=toy.query_labels
    )
    assert list(energy_margin.scores(energy_margin.Config(), pixels, seed=0)) == []


@pytest.mark.parametrize("name", plugin.names("evaluations"))
def test_every_evaluation_gives_bounded_finite_scores(name: str) -> None:
    module = plugin.load("evaluations", name, where="test")
    options = {"few_shot": FEW.model_dump(), "knn": {"neighbours": 5, "temperature": 0.1}}.get(name, {})
    found = list(module.scores(module.Config(**options), subject(), seed=0))
    assert found
    for score in found:
        assert np.isfinite(score.mean)
        assert score.ci95 is None or 0 <= score.ci95 < 0.5
