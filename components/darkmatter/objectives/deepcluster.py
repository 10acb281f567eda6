"""DeepCluster-v2: M. Caron, P. Bojanowski, A. Joulin, M. Douze, "Deep clustering for unsupervised learning of visual
features" (2018), https://arxiv.org/abs/1807.05520, in the version of M. Caron et al. (2020), https://arxiv.org/abs/2006.09882,
appendix D; authors' code: facebookresearch/swav, `main_deepclusterv2.py`.

Energy (inference):  F(x, y) = mean over clusterings of min over clusters k of -log p_k(x) - log p_k(y), both views being in
the same cluster; p is the softmax of the cosines of g(f(x)) and the centroids, over a temperature
Loss (training), equation 1 of 2018:  -log p_k(x) of every view x, k being the cluster of its sample in the last epoch
Against collapse: clusters come from k-means over the features of all samples, from an epoch before, and not from the loss.
The assignment is the latent; k-means minimises over it outside the loss.

Memories of 2 x `num_samples` x features floats, on every rank and in every checkpoint, keep the projections of the two whole
views; clusterings take turns at them. The authors fill theirs before they train; here the first epoch does, with a
loss of zero. A sample that an epoch leaves out keeps its feature of an earlier one, where the authors leave it out too.

Family: clustering. Choose it when the data has about equally large groups and fits into a memory of features.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from darkmatter import collectives
from darkmatter.backbones import Backbone
from darkmatter.objectives import Images, Mechanism, Objective, Samples, Terms, Views, total
from darkmatter.params import Config as _Config
from darkmatter.params import ParamsError
from darkmatter.parts import heads, multi_crop


class Config(_Config):
    temperature: float = Field(default=0.1, gt=0)
    """Of the softmax over clusters; the authors' code."""
    prototypes: list[int] = Field(default=[3000, 3000, 3000], min_length=1)
    """Clusters of each clustering; the authors' code. At most half of the training samples."""
    projector: list[int] = Field(default=[2048, 128], min_length=1)
    """Hidden and output features of g; the authors' code."""
    iterations: int = Field(default=10, ge=0)
    """Of k-means; the authors' code."""


def nearest(
    rows: Float[Tensor, "rows features"], centroids: Float[Tensor, "clusters features"]
) -> Int64[Tensor, " rows"]:
    """The centroid with the largest cosine; in parts, since all cosines at once would not fit."""
    return torch.cat([(part @ centroids.T).argmax(1) for part in rows.split(8192)])


@torch.no_grad()
def spherical_k_means(
    rows: Float[Tensor, "samples features"], clusters: int, iterations: int
) -> tuple[Float[Tensor, "clusters features"], Int64[Tensor, " samples"]]:
    """Unit centroids and the cluster of each row; a row of zeros is a sample not seen so far, its cluster is -1.

    Starts from random rows, the same on every rank. Each rank assigns its slice of the rows.
    """
    seen = rows.any(1)
    centroids = rows[seen][torch.randperm(int(seen.sum()))[:clusters].to(rows.device)]
    share = -(-len(rows) // collectives.world_size())
    mine = rows[collectives.rank() * share :][:share]
    for _ in range(iterations):
        sums = torch.zeros_like(centroids).index_add(0, nearest(mine, centroids), mine)  # rows of zeros add nothing
        sums = collectives.mean(sums)
        centroids = torch.where(sums.any(1, keepdim=True), F.normalize(sums, dim=1), centroids)
    assigned = nearest(mine, centroids)
    assigned = collectives.gather(F.pad(assigned, (0, share - len(assigned))))[: len(rows)]
    return centroids, torch.where(seen, assigned, -1)


def prediction(
    scores: Float[Tensor, "rows clusters"], assigned: Int64[Tensor, " rows"], temperature: float
) -> Float[Tensor, ""]:
    """This rank's share of the mean of -log p_k over the rows of all ranks that have a cluster; 0 if none has."""
    summed = F.cross_entropy(scores / temperature, assigned, ignore_index=-1, reduction="sum")
    count = collectives.mean((assigned >= 0).sum().to(scores.dtype))
    return summed / count.clamp(min=1 / collectives.world_size())


class DeepCluster(Objective):
    against_collapse: ClassVar[Mechanism] = "clustering"
    takes_local_views: ClassVar[bool] = True

    def __init__(self, config: Config, backbone: Backbone, num_samples: int) -> None:
        super().__init__(backbone)
        if max(config.prototypes) > num_samples // 2:
            raise ParamsError(
                f"objective.deepcluster.prototypes: {max(config.prototypes)} clusters of {num_samples} training samples; "
                f"at most {num_samples // 2}"
            )
        self.config = config
        self.projector = heads.projector([backbone.num_features, *config.projector], last_bias=True)
        features = config.projector[-1]
        self.memories: Tensor
        self.centroids: Tensor
        self.assignments: Tensor
        self.steps: Tensor
        self.register_buffer("memories", torch.zeros(2, num_samples, features))
        self.register_buffer("centroids", F.normalize(torch.randn(sum(config.prototypes), features), dim=1))
        self.register_buffer("assignments", torch.full((len(config.prototypes), num_samples), -1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._newest: tuple[Samples, Tensor] | None = None

    def _project(self, views: Views) -> Float[Tensor, "views_times_batch features"]:
        """The backbone once for each size, the projector once for all, as the authors do: batch norms see it."""
        features = multi_crop.features(self.backbone, views)
        return F.normalize(heads.full_precision(self.projector(features)), dim=1)

    def _scores(self, z: Float[Tensor, "rows features"]) -> list[Float[Tensor, "rows _"]]:
        """Cosines with the centroids of each clustering."""
        return [heads.full_precision(z @ part.T) for part in self.centroids.split(self.config.prototypes)]

    def energy(self, x: Images, y: Images) -> Float[Tensor, " batch"]:
        pairs = zip(self._scores(self._project([x])), self._scores(self._project([y])), strict=True)
        return torch.stack([heads.same_prototype(u, v, self.config.temperature) for u, v in pairs]).mean(0)

    def loss(self, views: Views, samples: Samples) -> Terms:
        z = self._project(views)
        self._newest = samples, z.detach().view(len(views), len(samples), -1)[: self.num_views]
        assigned = self.assignments[:, samples]  # (clusterings, B)
        predictions = [
            prediction(scores, clusters.repeat(len(views)), self.config.temperature)
            for scores, clusters in zip(self._scores(z), assigned, strict=True)
        ]
        cross_entropy = torch.stack(predictions).mean()
        return total(cross_entropy, cross_entropy=cross_entropy, assigned=(assigned >= 0).to(z.dtype).mean())

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        if self._newest is None:
            return
        samples, z = self._newest
        self._newest = None
        samples, z = collectives.gather(samples), collectives.gather(z.transpose(0, 1).contiguous())
        self.memories[:, samples] = z.transpose(0, 1).to(self.memories.dtype)
        self.steps += 1
        if self.steps % max(1, self.memories.shape[1] // len(samples)) == 0:
            self._cluster()

    def _cluster(self) -> None:
        """At the end of an epoch: new clusters for the next one."""
        for number, centroids in enumerate(self.centroids.split(self.config.prototypes)):
            memory = self.memories[number % self.num_views]
            found, assigned = spherical_k_means(memory, len(centroids), self.config.iterations)
            centroids.copy_(found)
            self.assignments[number] = assigned


def build(config: Config, backbone: Backbone, num_samples: int) -> DeepCluster:
    return DeepCluster(config, backbone, num_samples)
