import math

import pytest
import torch
from test_denoising import VIEWS as VIEWS
from toys import NUM_SAMPLES, Toy, objective, samples, step, views

from darkmatter.backbones import Backbone
from darkmatter.objectives import pirl
from darkmatter.params import ParamsError

SMALL = {"grid": 2, "features": 8, "negatives": 5}
DIGITS = {"grid": 2, "features": 64, "jigsaw": 0.25, "temperature": 0.3, "negatives": 256, "momentum": 0.97}


def collapse(method: pirl.PIRL, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bank that follows at once: nothing holds the features, and the noise drives them all round together."""
    method.config = method.config.model_copy(update={"momentum": 0.0})


def unit(vector: list[float]) -> list[float]:
    norm = math.sqrt(sum(value * value for value in vector))
    return [value / norm for value in vector]


def dot(u: list[float], v: list[float]) -> float:
    return sum(a * b for a, b in zip(u, v, strict=True))


def image_features(method: pirl.PIRL, x: torch.Tensor) -> list[list[float]]:
    """f: the backbone and a linear layer; vissl, pirl_jigsaw_4node_resnet50.yaml, head 1."""
    return [unit(row) for row in method.image_head(method.backbone(x)).tolist()]


def jigsaw_features(method: pirl.PIRL, x: torch.Tensor, orders: list[list[int]]) -> list[list[float]]:
    """g of shuffled pixels: each patch through the backbone and a linear layer, joined, a linear layer; head 0."""
    grid = round(len(orders[0]) ** 0.5)
    side = x.shape[-1] // grid
    shuffled = []
    for image, order in zip(x, orders, strict=True):
        for place in order:
            top, left = place // grid * side, place % grid * side
            shuffled.append(image[:, top : top + side, left : left + side])
    patches = method.patch_head(method.backbone(torch.stack(shuffled)))
    return [unit(row) for row in method.jigsaw_head(patches.reshape(len(x), -1)).tolist()]


def scores(
    v: list[list[float]], bank: list[list[float]], own: list[int], noise: list[list[int]], temperature: float
) -> list[list[float]]:
    """The exponentials of vissl's NCEAverage: the own one first."""
    rows = zip(v, own, noise, strict=True)
    return [[math.exp(dot(one, bank[i]) / temperature) for i in [mine, *others]] for one, mine, others in rows]


def nce(exponentials: list[list[float]], constant: float) -> float:
    """vissl, losses/nce_loss.py, NCECriterion but for its epsilon."""
    loss = 0.0
    for own, *noise in exponentials:
        h = [e / constant / (e / constant + len(noise) / NUM_SAMPLES) for e in (own, *noise)]
        loss -= math.log(h[0]) + sum(math.log(1 - one) for one in h[1:])
    return loss / len(exponentials)


@pytest.mark.parametrize("options", [{}, {"grid": 3, "temperature": 0.5, "jigsaw": 0.3}])
def test_loss_is_equation_5_with_the_constant_of_the_first_batch(options: dict[str, float]) -> None:
    method = objective("pirl", **options)
    temperature, weight, patches = options.get("temperature", 0.07), options.get("jigsaw", 0.5), method.config.grid**2
    constant = 0.0
    for seed in (3, 4):
        (x,), own = views(6, seed=seed)[:1], samples(6, seed=seed)
        torch.manual_seed(seed)
        orders = torch.rand(6, patches).argsort(1).tolist()
        noise = torch.randint(NUM_SAMPLES, (6, 5)).tolist()
        bank = method.memory.bank.rows.tolist()
        of_jigsaw = scores(jigsaw_features(method, x, orders), bank, own.tolist(), noise, temperature)
        of_image = scores(image_features(method, x), bank, own.tolist(), noise, temperature)
        constant = constant or NUM_SAMPLES * sum(map(sum, of_jigsaw)) / 36
        jigsaw, image = nce(of_jigsaw, constant), nce(of_image, constant)
        torch.manual_seed(seed)
        terms = method((x,), own)
        found = [terms[name].item() for name in ("jigsaw", "image", "loss")]
        assert found == pytest.approx([jigsaw, image, weight * jigsaw + (1 - weight) * image], abs=1e-9)
        method.after_step(0.5)
        assert method.memory.constant.item() == pytest.approx(constant, rel=1e-12)


def test_the_defaults_are_the_papers() -> None:
    """Section 3.2 and vissl, pirl_jigsaw_4node_resnet50.yaml."""
    expected = {"grid": 3, "features": 128, "jigsaw": 0.5, "temperature": 0.07, "negatives": 32000, "momentum": 0.5}
    assert pirl.Config().model_dump() == expected


def test_each_image_and_each_step_has_its_own_order_of_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    method, orders = objective("pirl"), []
    original = method._jigsaw
    monkeypatch.setattr(method, "_jigsaw", lambda x, order: (orders.append(order), original(x, order))[1])
    for seed in range(3):
        step(method, 8, seed=seed)
    drawn = torch.stack(orders)  # (steps, batch, patches)
    assert torch.equal(drawn.sort(2).values, torch.arange(4).expand(3, 8, 4))
    assert not torch.equal(drawn[0], drawn[1])
    assert len({tuple(order) for order in drawn[0].tolist()}) > 3


def test_pixels_that_the_grid_does_not_divide_are_cut_off() -> None:
    images = torch.arange(2 * 8 * 8.0).view(2, 1, 8, 8)
    patches = pirl.cut(images, 3)
    assert patches.shape == (18, 1, 2, 2)
    assert patches[5, 0].tolist() == [[20, 21], [28, 29]]  # rows 2 and 3, columns 4 and 5 of the first image
    assert patches[9, 0].tolist() == [[64, 65], [72, 73]]


def test_the_bank_averages_the_image_features_of_the_samples_seen_and_no_others() -> None:
    method = objective("pirl", momentum=0.8)
    (x,), own = views(6)[:1], samples(6)
    expected = method.memory.bank.rows.tolist()
    for row, i in zip(image_features(method, x), own.tolist(), strict=True):
        expected[i] = unit([0.8 * old + 0.2 * new for old, new in zip(expected[i], row, strict=True)])
    before = method.memory.bank.rows.clone()
    method((x,), own)
    assert torch.equal(method.memory.bank.rows, before)
    method.after_step(0.5)
    torch.testing.assert_close(method.memory.bank.rows, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_energy_sets_the_image_against_the_jigsaw_and_the_image_of_the_other() -> None:
    method = objective("pirl", temperature=0.3, jigsaw=0.7).eval()
    x, y = views(5)
    f_x, f_y = image_features(method, x), image_features(method, y)
    g_y = jigsaw_features(method, y, [[0, 1, 2, 3]] * 5)
    expected = [-(0.7 * dot(u, g) + 0.3 * dot(u, v)) / 0.3 for u, g, v in zip(f_x, g_y, f_y, strict=True)]
    assert method.energy(x, y).tolist() == pytest.approx(expected, abs=1e-9)


def test_patches_smaller_than_a_pixel_are_refused() -> None:
    backbone = Backbone(Toy(), mean=[0.4], std=[0.3], image_size=8)
    with pytest.raises(ParamsError, match=r"objective.pirl.grid: 9 x 9 patches of 8 pixels"):
        pirl.build(pirl.Config(grid=9), backbone, NUM_SAMPLES)
