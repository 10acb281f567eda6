import pytest
import torch
from toys import objective, samples, views

from darkmatter.objectives import mae
from darkmatter.parts import masks

SMALL = {"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2}
DIGITS = {"decoder_width": 64, "decoder_depth": 1}
VIEWS = {"max_shift": 0.05, "bend": 0.0, "max_degrees": 5.0, "max_shear": 0.05, "min_area": 0.9}


def collapse(method: mae.MAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder that sees nothing: every patch is hidden from it, and the mean image is the best guess."""
    monkeypatch.setattr(method.backbone, "keep", lambda images, visible: torch.zeros_like(images))


def patch(image: list, index: int, grid: int) -> list[float]:
    """Pixels of one patch of a (1, S, S) image, row by row."""
    side = len(image[0]) // grid
    top, left = index // grid * side, index % grid * side
    return [image[0][top + row][left + column] for row in range(side) for column in range(side)]


def error(predicted: list, image: list, hidden: list[int], *, normalise: bool) -> float:
    """He et al. 2022, section 3, and facebookresearch/mae, models_mae.py, forward_loss: the mean over hidden patches of the
    mean squared error, with targets (patch - mean) / sqrt(unbiased variance + 1e-6)."""
    total = 0.0
    for guess, index in zip(predicted, hidden, strict=True):
        target = patch(image, index, 4)
        if normalise:
            mean = sum(target) / len(target)
            variance = sum((value - mean) ** 2 for value in target) / (len(target) - 1)
            target = [(value - mean) / (variance + 1e-6) ** 0.5 for value in target]
        total += sum((a - b) ** 2 for a, b in zip(guess, target, strict=True)) / len(target)
    return total / len(hidden)


def exact(**options: bool) -> mae.MAE:
    """The statistics of the images are float32 numbers; here they are 0.4 and 0.3."""
    method = objective("mae", **options)
    method.backbone.mean.fill_(0.4)
    method.backbone.std.fill_(0.3)
    return method


@pytest.mark.parametrize("normalise", [True, False])
def test_loss_is_the_error_on_the_hidden_patches_only(normalise: bool) -> None:
    method = exact(normalise_pixels=normalise)
    (x, _) = views(6)
    torch.manual_seed(3)
    terms = method((x,), samples(6))
    torch.manual_seed(3)
    order = torch.rand(6, 16).argsort(1)
    visible, hidden = order[:, :4], order[:, 4:]  # a quarter of 16 patches stays visible
    predicted = method.decoder(method.backbone, x, visible, hidden)[0].tolist()
    image = ((x - 0.4) / 0.3).tolist()
    expected = sum(error(predicted[i], image[i], hidden[i].tolist(), normalise=normalise) for i in range(6)) / 6
    assert terms["loss"].item() == pytest.approx(expected, abs=1e-9)
    assert terms["reconstruction"].item() == pytest.approx(expected, abs=1e-9)


def test_energy_shows_x_and_asks_for_y_under_fixed_masks() -> None:
    method = exact().eval()
    x, y = views(5)
    image, expected = ((y - 0.4) / 0.3).tolist(), [0.0] * 5
    orders = masks.fixed_orders(16, 12, torch.device("cpu"))
    for order in orders.expand(5, -1, -1).unbind(1):
        predicted = method.decoder(method.backbone, x, order[:, :4], order[:, 4:])[0].tolist()
        for index in range(5):
            hidden = order[index, 4:].tolist()
            expected[index] += error(predicted[index], image[index], hidden, normalise=True) / len(orders)
    assert method.energy(x, y).tolist() == pytest.approx(expected, abs=1e-9)


def test_nothing_of_a_hidden_patch_reaches_the_prediction() -> None:
    method = objective("mae").eval()
    x, _ = views(3)
    order = torch.arange(16).expand(3, -1)
    before = method.decoder(method.backbone, x, order[:, :4], order[:, 4:])[0]
    x[:, :, 2:, :] = torch.rand(3, 1, 6, 8, dtype=torch.float64)  # patches 0 to 3 are the uppermost two rows of pixels
    assert torch.equal(method.decoder(method.backbone, x, order[:, :4], order[:, 4:])[0], before)


def test_a_backbone_without_patches_is_refused_with_the_reason() -> None:
    from darkmatter.backbones import Backbone, small_conv
    from darkmatter.params import ParamsError

    network = small_conv.build(small_conv.Config(width=4), channels=1, image_size=4)
    backbone = Backbone(network, mean=[0.5], std=[0.5], image_size=4)
    with pytest.raises(ParamsError, match=r"mae works on patches, at least 4.*this backbone makes 1 x 1"):
        mae.build(mae.Config(), backbone, 10)
