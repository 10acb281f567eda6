import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from darkmatter import health


def test_auroc_is_scikit_learns_with_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randint(0, 20, (150,), generator=generator).double()
    high = torch.randint(5, 25, (90,), generator=generator).double()
    expected = roc_auc_score([0] * 150 + [1] * 90, torch.cat([low, high]).numpy())
    assert health.auroc(low, high) == pytest.approx(expected, abs=1e-12)


def test_auroc_at_its_ends() -> None:
    assert health.auroc(torch.zeros(5), torch.ones(4)) == 1.0
    assert health.auroc(torch.ones(4), torch.zeros(5)) == 0.0
    assert health.auroc(torch.ones(6), torch.ones(3)) == 0.5
    assert health.auroc(torch.tensor([0.0, float("nan")]), torch.ones(3)) == 0.5


def test_rankme_is_equation_1() -> None:
    matrix = np.random.default_rng(0).normal(size=(40, 6)) @ np.diag([5, 3, 1, 0.5, 0.1, 0.01])
    singular = np.linalg.svd(matrix, compute_uv=False)
    share = singular / singular.sum() + 1e-7
    assert health.rankme(torch.from_numpy(matrix)) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rankme_counts_equal_directions(rank: int) -> None:
    basis = torch.linalg.qr(torch.randn(50, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    embeddings = torch.cat([basis, torch.zeros(50, 8 - rank, dtype=torch.float64)], 1)
    assert health.rankme(embeddings) == pytest.approx(rank, rel=1e-4)


def test_looking_leaves_the_mode_and_the_statistics_alone() -> None:
    from darkmatter.backbones import Backbone, small_conv
    from darkmatter.objectives import simclr

    network = small_conv.build(small_conv.Config(width=4), channels=1, image_size=28)
    backbone = Backbone(network, mean=[0.1], std=[0.3], image_size=28)
    method = simclr.build(simclr.Config(projector=[8, 4]), backbone, 6).train()
    before = {key: value.clone() for key, value in method.state_dict().items()}
    images = torch.rand(6, 1, 28, 28)
    health.pair_energies(method, images, images)
    health.embeddings(method, images)
    assert method.training
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


def test_spread_is_nothing_at_one_point_and_one_in_all_directions() -> None:
    draws = torch.Generator().manual_seed(0)
    assert health.spread(torch.ones(50, 8)) == pytest.approx(0, abs=1e-6)
    assert health.spread(torch.randn(4000, 64, generator=draws)) == pytest.approx(1, abs=0.01)
    flat = torch.zeros(4000, 64)
    flat[:, :4] = torch.randn(4000, 4, generator=draws)
    assert health.spread(flat) == pytest.approx(4 * 0.5 / 8, abs=0.01)  # four dimensions of deviation 1/2
    assert health.spread(7 * flat) == pytest.approx(health.spread(flat))


def test_lidar_is_equations_1_to_3() -> None:
    random = np.random.default_rng(0)
    views = random.normal(size=(30, 1, 5)) * [3, 2, 1, 0.5, 0.1] + 0.3 * random.normal(size=(30, 7, 5))
    means = views.mean(1)
    between = sum(np.outer(one - means.mean(0), one - means.mean(0)) for one in means) / 30
    within = sum(np.outer(v - m, v - m) for row, m in zip(views, means, strict=True) for v in row) / 210
    values, vectors = np.linalg.eigh(within + 1e-4 * np.eye(5))
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    share = np.linalg.eigvalsh(root @ between @ root)
    share = share / share.sum() + 1e-7
    assert health.lidar(torch.from_numpy(views)) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-9)


def test_lidar_counts_what_tells_samples_apart_and_not_what_differs_between_views() -> None:
    random = torch.Generator().manual_seed(0)
    apart = torch.zeros(400, 1, 8)
    apart[:, :, :3] = torch.randn(400, 1, 3, generator=random)
    noise = torch.zeros(400, 20, 8)
    noise[:, :, 3:] = torch.randn(400, 20, 5, generator=random)
    assert health.lidar((apart + noise).double()) == pytest.approx(3, rel=0.05)
    assert health.rankme((apart + noise).flatten(0, 1)) > 7


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_req_is_the_exponent_of_the_spectrum(alpha: float) -> None:
    basis = torch.linalg.qr(torch.randn(500, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    basis = torch.linalg.qr(basis - basis.mean(0))[0]
    embeddings = basis * torch.arange(1, 81, dtype=torch.float64) ** (-alpha / 2)
    assert health.alpha_req(embeddings) == pytest.approx(alpha, abs=1e-6)
    assert health.alpha_req(7 * embeddings + 3) == pytest.approx(alpha, abs=1e-6)


def test_alpha_req_is_the_weighted_fit_over_its_ranks() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=80)
    values = np.sort(values)[::-1]
    basis = torch.linalg.qr(torch.randn(500, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    basis = torch.linalg.qr(basis - basis.mean(0))[0]
    ranks = np.arange(5, 51)
    slope = np.polyfit(np.log(ranks), np.log(values[4:50]), 1, w=ranks**-0.5)[0]  # polyfit squares its weights
    assert health.alpha_req(basis * torch.from_numpy(values**0.5)) == pytest.approx(-slope, rel=1e-6)


def test_alpha_req_of_a_point_or_a_line_is_infinite() -> None:
    assert health.alpha_req(torch.ones(20, 8)) == float("inf")
    assert health.alpha_req(torch.arange(20.0)[:, None] * torch.ones(8)) == float("inf")


def test_alignment_and_uniformity_are_their_formulas() -> None:
    random = np.random.default_rng(0)
    first, second = (random.normal(size=(40, 6)) for _ in range(2))
    one, two = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (first, second))
    assert health.alignment(torch.from_numpy(first), torch.from_numpy(second)) == pytest.approx(
        np.square(one - two).sum(1).mean()
    )
    pairs = [np.exp(-2 * np.square(one[i] - one[j]).sum()) for i in range(40) for j in range(i)]
    assert health.uniformity(torch.from_numpy(first)) == pytest.approx(np.log(np.mean(pairs)))
    assert health.uniformity(torch.ones(5, 3)) == pytest.approx(0)
