import math

import pytest
import torch
from test_dino import VIEWS as VIEWS
from toys import NUM_SAMPLES, Toy, objective, samples, views

from darkmatter.backbones import Backbone
from darkmatter.objectives import deepcluster
from darkmatter.params import ParamsError

SMALL = {"projector": [8, 5], "prototypes": [4, 3, 5]}
DIGITS = {"projector": [64, 32], "prototypes": [64, 64], "temperature": 0.2}

Rows = list[list[float]]


def collapse(method: deepcluster.DeepCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without k-means: all samples are in one cluster."""

    def one_cluster(rows: torch.Tensor, clusters: int, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
        return rows[:clusters], torch.zeros(len(rows), dtype=torch.int64)

    monkeypatch.setattr(deepcluster, "spherical_k_means", one_cluster)


def dot(u: list[float], v: list[float]) -> float:
    return sum(a * b for a, b in zip(u, v, strict=True))


def unit(u: list[float]) -> list[float]:
    return [a / math.sqrt(dot(u, u)) for a in u]


def embeddings(method: deepcluster.DeepCluster, images: tuple[torch.Tensor, ...]) -> list[Rows]:
    """Of each view; resnet50.py of facebookresearch/swav: the backbone once for each size, the projector once for all."""
    parts = [torch.cat(images[:2]), *([torch.cat(images[2:])] if images[2:] else [])]
    z = method.projector(torch.cat([method.backbone(part) for part in parts]))
    return [[unit(row) for row in view.tolist()] for view in z.chunk(len(images))]


def log_probabilities(row: list[float], centroids: Rows) -> list[float]:
    scores = [dot(row, centroid) / 0.1 for centroid in centroids]
    norm = math.log(sum(map(math.exp, scores)))
    return [score - norm for score in scores]


def clusterings(method: deepcluster.DeepCluster) -> list[Rows]:
    rows = method.centroids.tolist()
    return [rows[:4], rows[4:7], rows[7:]]


def k_means_by_the_authors(rows: Rows, centroids: Rows, iterations: int) -> tuple[Rows, list[int]]:
    """cluster_memory of facebookresearch/swav, main_deepclusterv2.py, in plain Python."""

    def assign() -> list[int]:
        return [max(range(len(centroids)), key=lambda k: dot(row, centroids[k])) for row in rows]

    for _ in range(iterations):
        assigned = assign()
        for k in range(len(centroids)):
            members = [row for row, cluster in zip(rows, assigned, strict=True) if cluster == k]
            if members:
                centroids[k] = unit([sum(column) / len(members) for column in zip(*members, strict=True)])
    return centroids, assign()


def loss_by_the_authors(z: list[Rows], centroids: list[Rows], assigned: list[list[int]]) -> float:
    """main_deepclusterv2.py: for each clustering the mean over all views of the samples that have a cluster."""
    total = 0.0
    for clusters, targets in zip(centroids, assigned, strict=True):
        terms = [
            -log_probabilities(row, clusters)[target]
            for view in z
            for row, target in zip(view, targets, strict=True)
            if target != -1
        ]
        total += sum(terms) / len(terms) / len(centroids)
    return total


@pytest.mark.parametrize("number", [2, 4])
def test_loss_is_the_cross_entropy_of_every_view_and_the_clusters_of_its_sample(number: int) -> None:
    method = objective("deepcluster")
    numbers = samples(6)
    generator = torch.Generator().manual_seed(0)
    for row, clusters in zip(method.assignments, (4, 3, 5), strict=True):
        row.copy_(torch.randint(-1, clusters, row.shape, generator=generator))
    assigned = method.assignments[:, numbers].tolist()
    assert any(-1 in targets for targets in assigned)
    images = views(6, like=method)[:number]
    expected = loss_by_the_authors(embeddings(method, images), clusterings(method), assigned)
    terms = method(images, numbers)
    share = sum(target != -1 for targets in assigned for target in targets) / 18
    found = [terms[name].item() for name in ("loss", "cross_entropy", "assigned")]
    assert found == pytest.approx([expected, expected, share], abs=1e-9)


def test_an_epoch_ends_with_k_means_over_the_memory_of_the_whole_views_in_turn() -> None:
    """24 samples in batches of 8: an epoch is three steps; until then no sample has a cluster and the loss is zero."""
    method = objective("deepcluster")
    numbers = samples(NUM_SAMPLES, seed=5)
    memories: list[dict[int, list[float]]] = [{}, {}]
    for epoch in range(2):
        for step in range(3):
            before = method.centroids.clone(), method.assignments.clone()
            batch, images = numbers[8 * step : 8 * step + 8], views(8, seed=10 * epoch + step, like=method)
            z = embeddings(method, images)
            loss = method(images, batch)["loss"].item()
            if epoch == 0:
                assert loss == 0
            else:
                assigned = method.assignments[:, batch].tolist()
                assert loss == pytest.approx(loss_by_the_authors(z, clusterings(method), assigned), abs=1e-9)
            for memory, view in zip(memories, z, strict=False):
                memory.update(zip(batch.tolist(), view, strict=True))
            torch.manual_seed(step)
            method.after_step(0.1)
            if step < 2:
                assert torch.equal(method.centroids, before[0]) and torch.equal(method.assignments, before[1])
            for memory, found in zip(memories, method.memories, strict=True):
                for sample, row in enumerate(found.tolist()):
                    assert row == pytest.approx(memory.get(sample, [0.0] * 5), abs=1e-9)
        torch.manual_seed(2)
        for number, clusters in enumerate((4, 3, 5)):
            memory = [memories[number % 2][sample] for sample in range(NUM_SAMPLES)]
            start = [memory[row] for row in torch.randperm(NUM_SAMPLES)[:clusters].tolist()]
            centroids, assigned = k_means_by_the_authors(memory, start, 10)
            assert method.assignments[number].tolist() == assigned
            torch.testing.assert_close(
                torch.tensor(clusterings(method)[number]), torch.tensor(centroids), rtol=0, atol=1e-9
            )


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_k_means_leaves_out_samples_that_were_not_seen_and_keeps_clusters_that_lost_all_members(
    iterations: int,
) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.nn.functional.normalize(torch.randn(20, 3, dtype=torch.float64, generator=generator), dim=1)
    rows[::4] = 0
    rows[1] = rows[2] = rows[3] = rows[5]  # centroids that are equal: the second gets no member
    seen = [row for row in rows.tolist() if any(row)]
    lost = False
    for seed in range(10):
        torch.manual_seed(seed)
        start = [list(seen[row]) for row in torch.randperm(15)[:6].tolist()]
        centroids, assigned = k_means_by_the_authors(seen, start, iterations)
        lost |= len(set(assigned)) < 6
        torch.manual_seed(seed)
        found, clusters = deepcluster.spherical_k_means(rows, 6, iterations)
        torch.testing.assert_close(found, torch.tensor(centroids, dtype=torch.float64), rtol=0, atol=1e-9)
        assert clusters[::4].tolist() == [-1] * 5
        assert [cluster for cluster in clusters.tolist() if cluster != -1] == assigned
    assert lost


def test_a_step_without_a_loss_changes_nothing() -> None:
    method = objective("deepcluster")
    method(views(8, like=method), samples(8))
    method.after_step(0.1)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    method.after_step(0.2)
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


def test_energy_is_the_least_over_clusters_that_both_views_share_for_each_clustering() -> None:
    method = objective("deepcluster").eval()
    x, y = views(5)
    expected = [
        sum(
            min(-a - b for a, b in zip(log_probabilities(u, rows), log_probabilities(v, rows), strict=True))
            for rows in clusterings(method)
        )
        / 3
        for u, v in zip(embeddings(method, (x,))[0], embeddings(method, (y,))[0], strict=True)
    ]
    assert method.energy(x, y).tolist() == pytest.approx(expected, abs=1e-9)


def test_more_clusters_than_samples_can_fill_are_refused() -> None:
    backbone = Backbone(Toy(), mean=[0.4], std=[0.3], image_size=8)
    with pytest.raises(ParamsError, match=r"13 clusters of 24 training samples; at most 12"):
        deepcluster.build(deepcluster.Config(projector=[8, 5], prototypes=[4, 13]), backbone, NUM_SAMPLES)
