import math

import pytest
import torch
from toys import objective, samples, views

from darkmatter.objectives import denoising

SMALL = {"decoder_width": 3}
DIGITS = {"decoder_width": 8}
VIEWS = {"max_shift": 0.05, "bend": 0.0, "max_degrees": 5.0, "max_shear": 0.05, "min_area": 0.9}


def collapse(method: denoising.Denoising, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is destroyed: nothing is left to reconstruct from, and the mean image is the best guess."""
    monkeypatch.setattr(denoising, "destroy", lambda images, share: torch.zeros_like(images))


def cross_entropy(logits: list[float], pixels: list[float]) -> float:
    """Vincent et al. 2008, equation 2; lisa-lab/DeepLearningTutorials, code/dA.py: summed over the pixels."""
    probabilities = [1 / (1 + math.exp(-value)) for value in logits]
    return -sum(x * math.log(p) + (1 - x) * math.log(1 - p) for x, p in zip(pixels, probabilities, strict=True))


def test_loss_is_equation_2_of_the_whole_image_from_the_damaged_one() -> None:
    method = objective("denoising")
    (y, _) = views(6)
    torch.manual_seed(5)
    terms = method((y,), samples(6))
    torch.manual_seed(5)
    order = torch.rand(6, 64).argsort(1)
    damaged = y.clone()
    damaged[(order < 16).view(6, 1, 8, 8)] = 0  # a quarter of 64 pixels
    logits = method.decoder(method.backbone(damaged))
    expected = sum(map(cross_entropy, logits.flatten(1).tolist(), y.flatten(1).tolist())) / 6
    assert terms["loss"].item() == pytest.approx(expected, abs=1e-9)
    assert terms["cross_entropy"].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.4])
def test_the_asked_share_of_pixels_is_destroyed_in_all_channels(share: float) -> None:
    images = 0.1 + torch.rand(5, 3, 10, 10)
    damaged = denoising.destroy(images, share)
    gone = damaged == 0
    assert (gone.flatten(2).sum(2) == round(100 * share)).all()
    assert (gone[:, 0] == gone[:, 1]).all() and (gone[:, 0] == gone[:, 2]).all()
    assert torch.equal(damaged[~gone], images[~gone])
    assert share == 0 or not torch.equal(gone[0], gone[1])


def test_energy_is_the_excess_cross_entropy_of_y_given_x() -> None:
    method = objective("denoising").eval()
    x, y = views(5)
    logits = method.decoder(method.backbone(x)).flatten(1).tolist()
    pixels = y.flatten(1).tolist()
    entropy = [-sum(v * math.log(v) + (1 - v) * math.log(1 - v) for v in image) for image in pixels]
    expected = [cross_entropy(a, b) - least for a, b, least in zip(logits, pixels, entropy, strict=True)]
    assert method.energy(x, y).tolist() == pytest.approx(expected, abs=1e-9)
