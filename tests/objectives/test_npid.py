import math
from typing import Any

import pytest
import test_contract
import torch
from toys import NUM_SAMPLES, objective, samples, views

from darkmatter.objectives import npid

SMALL = {"features": 8, "negatives": 5}
DIGITS = {"features": 64, "negatives": 0, "temperature": 0.1}
VIEWS = {"max_shift": 0.1, "bend": 0.05, "max_degrees": 8.0, "max_shear": 0.15, "min_area": 0.8}


def collapse(method: npid.NPID, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the other samples only the pull to the bank is left, whose rows are all alike and stay so."""

    def pull(v: torch.Tensor, rows: torch.Tensor, samples: torch.Tensor, temperature: float) -> torch.Tensor:
        return -(v * rows[samples]).sum(1).mean()

    monkeypatch.setattr(npid, "exact_softmax", pull)
    monkeypatch.setattr(method.memory.bank, "update", lambda *_: None)
    method.memory.bank.rows.copy_(method.memory.bank.rows[:1].expand_as(method.memory.bank.rows))


def unit(vector: list[float]) -> list[float]:
    norm = math.sqrt(sum(value * value for value in vector))
    return [value / norm for value in vector]


def dot(u: list[float], v: list[float]) -> float:
    return sum(a * b for a, b in zip(u, v, strict=True))


def features(method: npid.NPID, x: torch.Tensor) -> list[list[float]]:
    return [unit(row) for row in method.head(method.backbone(x)).tolist()]


def drawn(batch: int, count: int, seed: int) -> list[list[int]]:
    """Even noise over all samples, the own one among them, as the authors' AliasMethod with equal probabilities."""
    torch.manual_seed(seed)
    return torch.randint(NUM_SAMPLES, (batch, count)).tolist()


def constant_by_equation_8(
    v: list[list[float]], bank: list[list[float]], own: list[int], noise: list[list[int]], temperature: float
) -> float:
    """lemniscate.pytorch, lib/NCEAverage.py: out.mean() * outputSize, out holding the own score and the noise."""
    scores = [math.exp(dot(v[b], bank[i]) / temperature) for b in range(len(v)) for i in [own[b], *noise[b]]]
    return NUM_SAMPLES * sum(scores) / len(scores)


def loss_by_equation_7(
    v: list[list[float]],
    bank: list[list[float]],
    own: list[int],
    noise: list[list[int]],
    constant: float,
    temperature: float,
) -> float:
    """Wu et al. 2018, equations 4, 6 and 7, as in lib/NCECriterion.py but for its epsilon."""

    def h(i: int, b: int) -> float:
        p = math.exp(dot(v[b], bank[i]) / temperature) / constant
        return p / (p + len(noise[b]) / NUM_SAMPLES)

    data = -sum(math.log(h(own[b], b)) for b in range(len(v)))
    return (data - sum(math.log(1 - h(i, b)) for b in range(len(v)) for i in noise[b])) / len(v)


def proximal_by_equation_9(v: list[list[float]], bank: list[list[float]], own: list[int]) -> float:
    return sum((a - b) ** 2 for row, i in zip(v, own, strict=True) for a, b in zip(row, bank[i], strict=True)) / len(v)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_loss_is_equation_10_with_the_constant_of_the_first_batch(temperature: float) -> None:
    method = objective("npid", temperature=temperature, proximal=0.3)
    constant = 0.0
    for seed in (3, 4):
        (x,), own, noise = views(6, seed=seed)[:1], samples(6, seed=seed), drawn(6, 5, seed)
        v, bank = features(method, x), method.memory.bank.rows.tolist()
        constant = constant or constant_by_equation_8(v, bank, own.tolist(), noise, temperature)
        nce = loss_by_equation_7(v, bank, own.tolist(), noise, constant, temperature)
        proximal = proximal_by_equation_9(v, bank, own.tolist())
        torch.manual_seed(seed)
        terms = method((x,), own)
        found = [terms[name].item() for name in ("discrimination", "proximal", "loss")]
        assert found == pytest.approx([nce, proximal, nce + 0.3 * proximal], abs=1e-9)
        method.after_step(0.5)
        assert method.memory.constant.item() == pytest.approx(constant, rel=1e-12)


def test_the_defaults_are_those_of_the_authors_code() -> None:
    """main.py: --low-dim 128 --nce-k 4096 --nce-t 0.07 --nce-m 0.5; no proximal term."""
    assert list(npid.Config().model_dump().values()) == [128, 0.07, 4096, 0.5, 0.0]


def test_without_noise_the_loss_is_the_exact_softmax_over_all_samples() -> None:
    """Equation 2; lib/LinearAverage.py and a cross-entropy."""
    method = objective("npid", negatives=0, temperature=0.2)
    (x,), own = views(6)[:1], samples(6)
    v, bank = features(method, x), method.memory.bank.rows.tolist()
    expected = 0.0
    for row, i in zip(v, own.tolist(), strict=True):
        scores = [math.exp(dot(row, other) / 0.2) for other in bank]
        expected -= math.log(scores[i] / sum(scores)) / 6
    terms = method((x,), own)
    assert [terms["loss"].item(), terms["discrimination"].item()] == pytest.approx([expected, expected], abs=1e-9)


@pytest.mark.parametrize("options", [{}, {"negatives": 0}, {"momentum": 0.9}])
def test_the_bank_averages_the_rows_of_the_samples_seen_and_no_others(options: dict[str, Any]) -> None:
    method = objective("npid", **options)
    momentum = options.get("momentum", 0.5)
    (x,), own = views(6)[:1], samples(6)
    v, expected = features(method, x), method.memory.bank.rows.tolist()
    for row, i in zip(v, own.tolist(), strict=True):
        expected[i] = unit([momentum * old + (1 - momentum) * new for old, new in zip(expected[i], row, strict=True)])
    before = method.memory.bank.rows.clone()
    method((x,), own)
    assert torch.equal(method.memory.bank.rows, before)
    method.after_step(0.5)
    torch.testing.assert_close(method.memory.bank.rows, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_energy_is_the_negative_cosine_over_the_temperature() -> None:
    method = objective("npid", temperature=0.3).eval()
    x, y = views(5)
    pairs = zip(features(method, x), features(method, y), strict=True)
    assert method.energy(x, y).tolist() == pytest.approx([-dot(u, v) / 0.3 for u, v in pairs], abs=1e-9)


@pytest.mark.parametrize(
    "property_",
    [
        test_contract.test_loss_names_its_terms_and_reaches_every_parameter_but_the_teacher,
        test_contract.test_bfloat16_autocast_gives_finite_float32_losses_and_gradients,
    ],
)
def test_the_exact_softmax_keeps_the_contract(property_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SMALL", {**SMALL, "negatives": 0})
    property_("npid")
