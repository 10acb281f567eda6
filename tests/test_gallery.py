import numpy as np
import pytest

from darkmatter import gallery

RANDOM = np.random.default_rng(0)


def test_neighbours_are_the_nearest_by_cosine() -> None:
    bank = RANDOM.normal(size=(50, 8)).astype(np.float32)
    found = gallery.neighbours(bank[:5] * 3 - 2 * bank.mean(0), bank, 4)
    assert (found[:, 0] == np.arange(5)).all()  # the same direction from the centre, farther away
    centred = bank - bank.mean(0)
    cosine = centred @ centred[0] / np.linalg.norm(centred, axis=1)
    assert found[0].tolist() == np.argsort(-cosine)[:4].tolist()


def test_a_map_keeps_groups_together_and_says_the_same_twice() -> None:
    groups = np.repeat(np.arange(3), 30)
    embeddings = (10 * RANDOM.normal(size=(3, 16))[groups] + RANDOM.normal(size=(90, 16))).astype(np.float32)
    places = gallery.places(embeddings)
    assert places.min() == 0
    assert places.max() == 1
    assert (places == gallery.places(embeddings)).all()
    distances = np.linalg.norm(places[:, None] - places[None], axis=2) + 9 * np.eye(90)
    assert (groups[distances.argmin(1)] == groups).all()


@pytest.mark.parametrize("count", [1, 2, 9, 12])
def test_a_map_of_few_samples(count: int) -> None:
    assert np.isfinite(gallery.places(RANDOM.normal(size=(count, 4)).astype(np.float32))).all()


def test_patches_that_are_alike_have_like_colours() -> None:
    kinds = RANDOM.integers(0, 3, size=(4, 25))
    tokens = (RANDOM.normal(size=(3, 12))[kinds] + 0.01 * RANDOM.normal(size=(4, 25, 12))).astype(np.float32)
    colours = gallery.colours(tokens).reshape(100, 3)
    assert colours.min() >= 0
    assert colours.max() <= 1
    for kind in range(3):
        same = colours[kinds.ravel() == kind][:, :2]
        other = colours[kinds.ravel() != kind][:, :2]
        assert same.std(0).max() < 0.1
        assert np.linalg.norm(other - same.mean(0), axis=1).min() > 0.3
