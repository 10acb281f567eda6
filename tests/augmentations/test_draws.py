import numpy as np
import torch

from darkmatter.augmentations import Draws


def splitmix64(x: int) -> int:
    """The reference in Python's integers (Steele, Lea & Flood 2014)."""
    mask = 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_numbers_are_those_of_splitmix64() -> None:
    keys = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)])
    draws = Draws(keys)
    for count in (1, 2, 3):
        expected = [
            (splitmix64((key + count * 0x9E3779B97F4A7C15) % 2**64) >> 40) * 2.0**-24
            for key in (int(k) % 2**64 for k in keys)
        ]
        assert draws.uniform().tolist() == expected


def test_a_stream_depends_on_seed_epoch_sample_and_view_and_on_nothing_else() -> None:
    base = {"seed": 1, "epoch": 2, "view": 0}
    samples = torch.arange(50)
    whole = Draws.of(**base, samples=samples).uniform()
    assert torch.equal(Draws.of(**base, samples=samples[17:23]).uniform(), whole[17:23])
    for change in ({"seed": 2}, {"epoch": 3}, {"view": 1}):
        assert not (Draws.of(**{**base, **change}, samples=samples).uniform() == whole).any()


def test_views_that_are_drawn_together_are_those_drawn_alone() -> None:
    samples = torch.arange(5)
    together = Draws.of(seed=1, epoch=2, samples=samples.repeat(3), view=torch.tensor([0, 1, 7]).repeat_interleave(5))
    alone = [Draws.of(seed=1, epoch=2, samples=samples, view=view) for view in (0, 1, 7)]
    for _ in range(2):
        assert torch.equal(together.units(3), torch.cat([one.units(3) for one in alone]))


def test_numbers_are_uniform_and_independent() -> None:
    draws = Draws.of(seed=0, epoch=0, samples=torch.arange(100_000), view=0)
    first, second = draws.uniform(), draws.uniform()
    for values in (first, second):
        counts = np.histogram(values.numpy(), bins=50, range=(0, 1))[0]
        chi_square = float(((counts - 2000) ** 2 / 2000).sum())
        assert chi_square < 95  # 49 degrees of freedom; passes with probability 0.9999
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.015
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.015
    assert first.min() >= 0 and first.max() < 1


def test_bounds_and_chance() -> None:
    draws = Draws(torch.arange(20_000))
    values = draws.uniform(-3, 5)
    assert -3 <= values.min() < -2.9
    assert 4.9 < values.max() < 5
    assert abs(draws.chance(0.3).float().mean() - 0.3) < 0.02
    assert not draws.chance(0.0).any()
    assert draws.chance(1.0).all()
