from typing import get_args

import numpy as np
import pytest

from darkmatter import changes
from darkmatter.changes import Change

PICTURES = np.random.default_rng(0).integers(60, 200, (6, 3, 32, 32)).astype(np.uint8)
NUMBERS = np.arange(6)
CORRUPTIONS = get_args(changes.Corruption)


@pytest.mark.parametrize("name", [*CORRUPTIONS, "paste"])
def test_what_is_drawn_is_a_function_of_seed_and_sample(name: str) -> None:
    change = Change(name)
    whole = change.apply(PICTURES, NUMBERS, seed=0)
    assert whole.shape == PICTURES.shape
    assert whole.dtype == np.uint8
    assert (whole != PICTURES).any()
    backwards = change.apply(PICTURES[::-1].copy(), NUMBERS[::-1].copy(), seed=0)[::-1]
    assert (backwards == whole).all()
    if name in ("noise", "occlusion", "paste"):
        assert (change.apply(PICTURES, NUMBERS, seed=1) != whole).any()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_severity_changes_more_than_the_one_before(name: str) -> None:
    distances = [
        np.square(Change(name, severity).apply(PICTURES, NUMBERS, seed=0).astype(float) - PICTURES).mean()
        for severity in range(1, 6)
    ]
    assert distances == sorted(distances)
    assert distances[0] > 0


def test_the_object_lies_where_it_is_said_to_lie_and_the_ground_is_even() -> None:
    bright = np.full_like(PICTURES, 255)
    bright[:, :, [0, 0, -1, -1], [0, -1, 0, -1]] = 0  # the ground is that of the corners
    pasted = Change("paste").apply(bright, NUMBERS, seed=3)
    places = changes.pasted_at(NUMBERS, seed=3) * 32
    masks = changes.pasted_mask(NUMBERS, 32, seed=3)
    for picture, place, mask in zip(pasted, places, masks, strict=True):
        rows, columns = np.nonzero(picture[0] > 100)
        assert [rows.mean() + 0.5, columns.mean() + 0.5] == pytest.approx(place, abs=1)
        assert (picture[:, ~np.pad(mask, 1)[1:-1, 1:-1]] < 100).mean() > 0.97
        assert (picture[0][mask] > 100).mean() > 0.85
