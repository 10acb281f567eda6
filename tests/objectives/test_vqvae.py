import pytest
import torch
from test_denoising import VIEWS as VIEWS
from toys import objective, samples, views

from darkmatter.objectives import vqvae

SMALL = {"codes": 6, "features": 4, "decoder_width": 5}
DIGITS = {"codes": 128, "features": 16, "decoder_width": 64}


def collapse(method: vqvae.VQVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codebook collapse: every patch takes the same code."""
    monkeypatch.setattr(method.book, "nearest", lambda z: torch.zeros(len(z), dtype=torch.int64))


def squared(a: list[float], b: list[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def quantise(z: list[list[float]], book: list[list[float]]) -> list[int]:
    """Van den Oord et al. 2017, equation 1: the nearest code."""
    return [min(range(len(book)), key=lambda k: squared(row, book[k])) for row in z]


def encoded(method: vqvae.VQVAE, images: torch.Tensor) -> list[list[float]]:
    return method.encoder(method.backbone.patches(images)).flatten(0, 1).tolist()


def decoded(method: vqvae.VQVAE, codes: list[int]) -> torch.Tensor:
    latents = torch.tensor([method.book.vectors[k].tolist() for k in codes], dtype=torch.float64)
    return method.decoder(latents.view(-1, 4, 4, 4).permute(0, 3, 1, 2))


def test_loss_is_equation_3_with_the_moving_average_in_place_of_its_second_term() -> None:
    method = objective("vqvae", commitment=0.4)
    (x, _) = views(6)
    z = encoded(method, x)
    book = method.book.vectors.tolist()
    codes = quantise(z, book)
    target = method.backbone.normalise(x)
    reconstruction = squared(decoded(method, codes).flatten().tolist(), target.flatten().tolist()) / target.numel()
    commitment = sum(squared(row, book[k]) for row, k in zip(z, codes, strict=True)) / (len(z) * 4)
    terms = method((x,), samples(6))
    found = [terms[name].item() for name in ("reconstruction", "commitment", "loss")]
    assert found == pytest.approx([reconstruction, commitment, reconstruction + 0.4 * commitment], abs=1e-9)


def test_gradient_of_the_reconstruction_passes_the_codes_as_if_they_were_not_there() -> None:
    """Section 3.2: the decoder's gradient is copied to the encoder."""
    method = objective("vqvae", commitment=0.0)
    (x, _) = views(4)
    z = method.encoder(method.backbone.patches(x)).detach()
    codes = method.book.vectors[quantise(z.flatten(0, 1).tolist(), method.book.vectors.tolist())].view_as(z)
    codes.requires_grad_()
    predicted = method.decoder(codes.transpose(1, 2).unflatten(2, (4, 4)))
    (at_codes,) = torch.autograd.grad((predicted - method.backbone.normalise(x)).square().mean(), codes)
    encoder = method.encoder
    method((x,), samples(4))["loss"].backward()
    tokens = method.backbone.patches(x).detach()
    expected = torch.einsum("bnd,bnt->dt", at_codes, tokens)
    torch.testing.assert_close(encoder.weight.grad, expected, rtol=1e-9, atol=1e-12)


def test_codes_follow_the_encodings_as_in_the_appendix() -> None:
    """Equations 6 to 8, with the Laplace smoothing of sonnet/src/nets/vqvae.py."""
    method = objective("vqvae", decay=0.9, restart_below=0.0)
    (x, _) = views(6)
    book, counts, sums = (buffer.tolist() for buffer in (method.book.vectors, method.book.counts, method.book.sums))
    z = encoded(method, x)
    codes = quantise(z, book)
    method((x,), samples(6))
    method.after_step(0.5)
    for k in range(6):
        mine = [row for row, code in zip(z, codes, strict=True) if code == k]
        counts[k] = 0.9 * counts[k] + 0.1 * len(mine)
        sums[k] = [0.9 * old + 0.1 * sum(row[d] for row in mine) for d, old in enumerate(sums[k])]
    everything = sum(counts)
    for k in range(6):
        smooth = (counts[k] + 1e-5) / (everything + 6e-5) * everything
        assert method.book.vectors[k].tolist() == pytest.approx([value / smooth for value in sums[k]], abs=1e-9)


def test_a_code_that_nothing_takes_starts_again_at_an_encoding() -> None:
    method = objective("vqvae", restart_below=0.5)
    method.book.vectors[2] = 1e3  # so far away that no patch takes it
    method.book.counts[2] = 0.4
    (x, _) = views(6)
    z = torch.tensor(encoded(method, x))
    method((x,), samples(6))
    method.after_step(0.5)
    distances = (z - method.book.vectors[2]).square().sum(1)
    assert distances.min() < 1e-6
    assert method.book.counts[2] == 1


def test_energy_is_the_error_at_the_nearest_codes_of_x() -> None:
    method = objective("vqvae").eval()
    x, y = views(5)
    predicted = decoded(method, quantise(encoded(method, x), method.book.vectors.tolist()))
    target = method.backbone.normalise(y)
    expected = [
        squared(a.flatten().tolist(), b.flatten().tolist()) / 64 for a, b in zip(predicted, target, strict=True)
    ]
    assert method.energy(x, y).tolist() == pytest.approx(expected, abs=1e-9)
