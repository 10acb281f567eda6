import math

import pytest
import torch
from test_denoising import VIEWS as VIEWS
from test_denoising import cross_entropy
from toys import objective, samples, views

from darkmatter.objectives import vae

SMALL = {"latent": 4, "decoder_width": 3}
DIGITS = {"latent": 16, "decoder_width": 8}


def collapse(method: vae.VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """Posterior collapse: a latent that may say nothing."""
    method.beta = 1e4


def test_loss_is_the_bound_of_equation_10() -> None:
    method = objective("vae", beta=2.5)
    (x, _) = views(6)
    torch.manual_seed(5)
    terms = method((x,), samples(6))
    torch.manual_seed(5)
    noise = torch.randn(6, 4, dtype=torch.float64).tolist()
    inferred = method.posterior(method.backbone(x)).tolist()
    kl, latents = 0.0, []
    for row, epsilon in zip(inferred, noise, strict=True):
        mean, log_variance = row[:4], row[4:]
        # Appendix B: -KL = 1/2 sum(1 + log(sigma^2) - mu^2 - sigma^2)
        kl -= sum(1 + lv - m**2 - math.exp(lv) for m, lv in zip(mean, log_variance, strict=True)) / 2 / 6
        latents.append([m + math.exp(lv / 2) * e for m, lv, e in zip(mean, log_variance, epsilon, strict=True)])
    logits = method.decoder(torch.tensor(latents, dtype=torch.float64)).flatten(1).tolist()
    reconstruction = sum(map(cross_entropy, logits, x.flatten(1).tolist())) / 6
    found = [terms[name].item() for name in ("reconstruction", "kl", "loss")]
    assert found == pytest.approx([reconstruction, kl, reconstruction + 2.5 * kl], abs=1e-9)


def test_divergence_of_the_prior_from_itself_is_zero_and_all_others_are_larger() -> None:
    zero = torch.zeros(3, 4, dtype=torch.float64)
    assert vae.kl_divergence(zero, zero).item() == 0
    for mean, log_variance in ((0.5, 0.0), (0.0, 1.0), (0.0, -1.0)):
        assert vae.kl_divergence(zero + mean, zero + log_variance).item() > 0.1


def test_energy_decodes_the_mean_and_has_no_regulariser() -> None:
    x, y = views(5)
    method = objective("vae", beta=1.0).eval()
    logits = method.decoder(method.posterior(method.backbone(x))[:, :4]).flatten(1).tolist()
    pixels = y.flatten(1).tolist()
    entropy = [-sum(v * math.log(v) + (1 - v) * math.log(1 - v) for v in image) for image in pixels]
    expected = [cross_entropy(a, b) - least for a, b, least in zip(logits, pixels, entropy, strict=True)]
    assert method.energy(x, y).tolist() == pytest.approx(expected, abs=1e-9)
    assert torch.equal(objective("vae", beta=50.0).eval().energy(x, y), method.energy(x, y))
