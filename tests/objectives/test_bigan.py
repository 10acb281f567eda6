import math

import pytest
import torch
from toys import objective, samples, views

from darkmatter.objectives import bigan

SMALL = {"latent": 4, "generator_width": 3, "discriminator_width": 3}
DIGITS = {"latent": 16, "generator_width": 8, "discriminator_width": 16}
VIEWS = {"max_shift": 0.04, "bend": 0.0, "max_degrees": 4.0, "max_shear": 0.04, "min_area": 0.93, "min_contrast": 0.8}


def collapse(method: bigan.BiGAN, monkeypatch: pytest.MonkeyPatch) -> None:
    """A latent without capacity: the prior has one value, and no batch norm gives the encoder another scale."""
    method.encoder[-1] = torch.nn.Identity()
    monkeypatch.setattr(bigan.collectives, "draw", lambda sample, batch: torch.full_like(sample(batch), 0.5))


def log_sigmoid(value: float) -> float:
    return -math.log1p(math.exp(-value))


def parts(method: bigan.BiGAN, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """encoder(x), z and generator(z) of the step seeded with 7."""
    torch.manual_seed(7)
    z = torch.rand(len(x), 4, dtype=torch.float64) * 2 - 1
    encoded = method.encoder(method.backbone(x)) / math.sqrt(3)
    return encoded, z, 1 / (1 + torch.exp(-method.generator(z)))


def test_loss_is_equation_3_and_the_same_with_exchanged_labels() -> None:
    method = objective("bigan")
    (x, _) = views(6)
    encoded, z, generated = parts(method, x)
    real, fake = method.discriminator(x, encoded).tolist(), method.discriminator(generated, z).tolist()
    # V = E log D(x, E(x)) + E log(1 - D(G(z), z)); 1 - sigmoid(v) = sigmoid(-v)
    payoff = sum(map(log_sigmoid, real)) / 6 + sum(log_sigmoid(-v) for v in fake) / 6
    inverse = sum(log_sigmoid(-v) for v in real) / 6 + sum(map(log_sigmoid, fake)) / 6
    torch.manual_seed(7)
    terms = method((x,), samples(6))
    found = [terms[name].item() for name in ("discrimination", "deception", "loss")]
    assert found == pytest.approx([-payoff, -inverse, -payoff - inverse], abs=1e-9)


def test_each_player_is_moved_by_its_own_term_only() -> None:
    """The discriminator by -V; encoder and generator by the exchanged labels, through a discriminator that stands still."""
    method = objective("bigan")
    (x, _) = views(6)
    torch.manual_seed(7)
    method((x,), samples(6))["loss"].backward()
    found = {name: p.grad for name, p in method.named_parameters()}
    encoded, z, generated = parts(method, x)
    real, fake = method.discriminator(x, encoded), method.discriminator(generated, z)
    payoff = torch.log(torch.sigmoid(real)).mean() + torch.log(1 - torch.sigmoid(fake)).mean()
    inverse = torch.log(1 - torch.sigmoid(real)).mean() + torch.log(torch.sigmoid(fake)).mean()
    for name, parameter in method.named_parameters():
        target = -payoff if name.startswith("discriminator") else -inverse
        (expected,) = torch.autograd.grad(target, parameter, retain_graph=True)
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12, msg=name)


def test_energy_is_the_minimum_over_the_latent_of_what_both_images_cost() -> None:
    method = objective("bigan").eval()
    x, y = views(5)
    first, second = method.encoder(method.backbone(x)) / math.sqrt(3), method.encoder(method.backbone(y)) / math.sqrt(3)
    energy = method.energy(x, y)

    def cost(z: torch.Tensor) -> torch.Tensor:
        return (z - first).square().sum(1) + (z - second).square().sum(1)

    torch.testing.assert_close(energy, cost((first + second) / 2), rtol=1e-9, atol=1e-12)
    for seed in range(20):
        assert (
            cost((first + second) / 2 + 0.1 * torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))) > energy
        ).all()
