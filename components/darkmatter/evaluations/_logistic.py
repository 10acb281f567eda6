"""Logistic regression, many at a time."""

import dataclasses

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

_STEPS, _GRADIENT = 500, 1e-4  # of the mean cross-entropy, as scikit-learn


@dataclasses.dataclass(frozen=True)
class Linear:
    """A classifier for each problem."""

    weight: Float[Tensor, "problems features classes"]
    bias: Float[Tensor, "problems 1 classes"]

    def predict(self, features: Float[Tensor, "_ samples features"]) -> Int64[Tensor, "problems samples"]:
        return (features @ self.weight + self.bias).argmax(2)


def fit(
    features: Float[Tensor, "problems samples features"],
    labels: Int64[Tensor, "problems samples"],
    classes: int,
    strength: float,
    *,
    start: Linear | None = None,
) -> Linear:
    """The minimum of |W|^2 / 2 + `strength` x the sum of the cross-entropies, by L-BFGS in float64; the bias is free.

    It is the convex problem of scikit-learn's LogisticRegression(C=strength). All problems are one sum: they share nothing
    but the length of a step. With fewer samples than features it is solved in the span of the samples, where W lies.

    Args:
        features: of each problem, of the same number of samples.
        labels: from 0.
        classes: how many.
        strength: of the data against the regulariser; scikit-learn's C.
        start: where to begin, an answer for another strength.
    """
    features = features.double()
    mean = features.mean(1, keepdim=True)
    centred = features - mean  # the bias is free, so this changes nothing but its value
    if features.shape[1] < features.shape[2]:
        products = centred @ centred.mT
        # They sum to zero, so it is singular; so little does not show.
        products.diagonal(dim1=1, dim2=2).add_(1e-9 * products.diagonal(dim1=1, dim2=2).mean() + 1e-30)
        coordinates = torch.linalg.cholesky(products)  # (problems, samples, samples)
        basis = torch.linalg.solve_triangular(coordinates, centred, upper=False).mT  # orthonormal columns
        inside = None if start is None else Linear(basis.mT @ start.weight, start.bias + mean @ start.weight)
        found = fit(coordinates, labels, classes, strength, start=inside)
        weight = basis @ found.weight
        return Linear(weight, found.bias - mean @ weight)
    problems, samples, width = features.shape
    ridge = 1 / (strength * samples)  # beside the mean over samples, so that one tolerance serves all problems
    # In coordinates in which the Hessian is at most 1: half the covariance bounds that of the data (D. Boehning,
    # "Multinomial logistic regression algorithm", 1992). A large C took 50 times as long without (measured on the digits).
    bound = centred.mT @ centred / (2 * samples) + ridge * torch.eye(width, dtype=torch.float64, device=features.device)
    root = torch.linalg.cholesky(bound)
    known = torch.linalg.solve_triangular(root, centred.mT, upper=False).mT
    inverse = torch.linalg.solve_triangular(
        root, torch.eye(width, dtype=torch.float64, device=root.device), upper=False
    )
    penalty = ridge * inverse @ inverse.mT
    targets = F.one_hot(labels, classes).double()
    begin = start or Linear(features.new_zeros(problems, width, classes), features.new_zeros(problems, 1, classes))
    weight, bias = root.mT @ begin.weight, begin.bias + mean @ begin.weight
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_STEPS,
        tolerance_grad=_GRADIENT,
        tolerance_change=1e-12,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def value_and_gradient() -> Tensor:
        distribution = torch.baddbmm(bias, known, weight).log_softmax(2)
        apart = (distribution.exp() - targets) / samples
        pull = penalty @ weight
        weight.grad = torch.baddbmm(pull, known.mT, apart)
        bias.grad = apart.sum(1, keepdim=True)
        return (weight * pull).sum() / 2 - (distribution * targets).sum() / samples

    with torch.no_grad():
        optimizer.step(value_and_gradient)  # type: ignore[arg-type]
        weight = torch.linalg.solve_triangular(root.mT, weight, upper=True)
        return Linear(weight, bias - mean @ weight)
