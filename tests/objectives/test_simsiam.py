import math

import pytest
import torch
from toys import objective, samples, views

from darkmatter.objectives import simsiam

SMALL = {"projector": [8, 6], "predictor": 4}
DIGITS = {"projector": [64, 64], "predictor": 32}


def collapse(method: simsiam.SimSiam, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the stop-gradient, the predictor and the last batch norm: both sides go to the one place where they agree.

    The batch norm delays it: with it the run is far from flat after 120 steps.
    """

    def with_gradient(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return -torch.nn.functional.cosine_similarity(prediction, target, dim=1)

    monkeypatch.setattr(simsiam, "negative_cosine", with_gradient)
    method.predictor, method.projector[-1] = torch.nn.Identity(), torch.nn.Identity()


def cosine(p: list[float], z: list[float]) -> float:
    norm_p, norm_z = (math.sqrt(sum(value * value for value in vector)) for vector in (p, z))
    return sum(a * b for a, b in zip(p, z, strict=True)) / (norm_p * norm_z)


def test_loss_is_equation_4() -> None:
    """Chen and He 2021: D(p1, z2) / 2 + D(p2, z1) / 2, mean over images, D = -cos; main_simsiam.py: the same."""
    method, (x, y) = objective("simsiam"), views(7)
    z = [method.projector(method.backbone(view)) for view in (x, y)]
    p = [method.predictor(one).tolist() for one in z]
    there = -sum(map(cosine, p[0], z[1].tolist())) / 7
    back = -sum(map(cosine, p[1], z[0].tolist())) / 7
    terms = objective("simsiam")((x, y), samples(7))
    found = [terms[name].item() for name in ("there", "back", "loss")]
    assert found == pytest.approx([there, back, (there + back) / 2], abs=1e-9)


def test_the_gradient_is_that_of_predictions_alone_with_targets_as_constants() -> None:
    method, (x, y) = objective("simsiam"), views(7)
    method((x, y), samples(7))["loss"].backward()
    found = {key: p.grad for key, p in method.named_parameters()}
    reference = objective("simsiam")
    z = [reference.projector(reference.backbone(view)) for view in (x, y)]
    constant = [torch.tensor(one.tolist(), dtype=torch.float64) for one in z]
    loss = torch.zeros((), dtype=torch.float64)
    for mine, other in ((0, 1), (1, 0)):
        for p, target in zip(reference.predictor(z[mine]), constant[other], strict=True):
            loss = loss - (p @ target) / (p.square().sum().sqrt() * target.square().sum().sqrt()) / 14
    loss.backward()
    for key, parameter in reference.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad, rtol=1e-9, atol=1e-12)


def test_the_projection_has_mean_0_and_variance_1_over_the_batch() -> None:
    """builder.py: the projector ends with a batch norm without scale and shift; the predictor ends with a bias instead."""
    method = objective("simsiam")
    z = method.projector(method.backbone(views(9)[0]))
    torch.testing.assert_close(z.mean(0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-9)
    assert (z.var(0, unbiased=False) - 1).abs().max() < 0.05  # less than 1 by the epsilon
    assert not list(method.projector[-1].parameters())
    assert method.predictor[-1].bias is not None


def test_energy_is_minus_the_cosine_of_prediction_and_projection() -> None:
    method, (x, y) = objective("simsiam").eval(), views(5)
    z = [method.projector(method.backbone(view)) for view in (x, y)]
    expected = [-cosine(p, target) for p, target in zip(method.predictor(z[0]).tolist(), z[1].tolist(), strict=True)]
    assert method.energy(x, y).tolist() == pytest.approx(expected, abs=1e-9)
