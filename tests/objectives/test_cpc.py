import math

import pytest
import torch
from test_denoising import VIEWS as VIEWS
from toys import objective, samples, views

from darkmatter.backbones import Backbone, small_conv
from darkmatter.objectives import cpc
from darkmatter.params import ParamsError

SMALL = {"patches": 3, "ignore": 0, "steps": 2, "features": 4, "context_width": 5, "context_depth": 2}
DIGITS = {"patches": 6, "ignore": 1, "steps": 2, "features": 32, "context_width": 32, "context_depth": 2}


def collapse(method: cpc.CPC, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the other patches in the denominator, by a squared distance, every target becomes the same."""

    def pull(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (predictions - targets[:, -predictions.shape[1] :]).square().sum(3).mean()

    monkeypatch.setattr(cpc, "info_nce", pull)


Grid = list[list[list[float]]]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def latents(method: cpc.CPC, images: torch.Tensor) -> torch.Tensor:
    """Patches of 4 pixels at every second one of 8, each through the backbone by itself."""
    rows = [[method.backbone(images[:, :, top : top + 4, left : left + 4]) for left in (0, 2, 4)] for top in (0, 2, 4)]
    return torch.stack([torch.stack(row, 2) for row in rows], 2)  # (B, D, rows, columns)


def predicted_and_targets(method: cpc.CPC, x: torch.Tensor) -> tuple[list[list[Grid]], list[Grid]]:
    z = latents(method, x)
    context = method.context(z)
    predictions = [(0.1 * layer(context)).permute(0, 2, 3, 1).tolist() for layer in method.predictions]
    return predictions, method.target(z).permute(0, 2, 3, 1).tolist()


def test_loss_is_info_nce_over_all_patches_of_the_batch() -> None:
    """Henaff et al. 2019, appendix A.2: for each step the mean over places of the cross-entropy, then the sum."""
    method = objective("cpc").eval()  # batch norm in training mode sees all patches of the batch at once
    (x, _) = views(4)
    predictions, targets = predicted_and_targets(method, x)
    everything = [(b, r, c) for b in range(4) for r in range(3) for c in range(3)]
    steps = []
    for ahead, prediction in zip((1, 2), predictions, strict=True):
        losses = []
        for b, r, c in everything:
            if r + ahead > 2:
                continue
            scores = [dot(prediction[b][r][c], targets[i][j][k]) for i, j, k in everything]
            own = scores[everything.index((b, r + ahead, c))]
            losses.append(math.log(sum(map(math.exp, scores))) - own)
        steps.append(sum(losses) / len(losses))
    terms = method((x,), samples(4))
    found = [terms[name].item() for name in ("info_nce_1", "info_nce_2", "loss")]
    assert found == pytest.approx([*steps, sum(steps)], abs=1e-9)


def test_rows_that_are_ignored_are_not_asked_for() -> None:
    method = objective("cpc", ignore=1, steps=1)
    terms = method((views(4)[0],), samples(4))
    assert terms.keys() == {"loss", "info_nce_2"}


def test_energy_is_the_surprise_at_the_patches_of_y_among_themselves() -> None:
    method = objective("cpc").eval()
    x, y = views(5)
    predictions, _ = predicted_and_targets(method, x)
    _, targets = predicted_and_targets(method, y)
    for b, energy in enumerate(method.energy(x, y).tolist()):
        patches, steps = [targets[b][r][c] for r in range(3) for c in range(3)], []
        for ahead, prediction in zip((1, 2), predictions, strict=True):
            losses = []
            for r in range(3 - ahead):
                for c in range(3):
                    scores = [dot(prediction[b][r][c], patch) for patch in patches]
                    losses.append(math.log(sum(map(math.exp, scores))) - scores[3 * (r + ahead) + c])
            steps.append(sum(losses) / len(losses))
        assert energy == pytest.approx(sum(steps) / 2, abs=1e-9)


def test_a_context_knows_nothing_of_the_rows_below_it() -> None:
    method = objective("cpc").eval()
    z = torch.randn(2, 12, 6, 5, dtype=torch.float64)
    before = method.context(z)
    z[:, :, 3:] = torch.randn(2, 12, 3, 5, dtype=torch.float64)
    after = method.context(z)
    assert torch.equal(after[:, :, :3], before[:, :, :3])
    assert not torch.isclose(after[:, :, 3:], before[:, :, 3:]).all()
    z[:, :, 0] += 1
    assert not torch.isclose(method.context(z)[:, :, 1:3], after[:, :, 1:3]).all()  # two blocks reach two rows down


def test_rows_that_are_not_there_cannot_be_predicted() -> None:
    network = small_conv.build(small_conv.Config(width=4), channels=1, image_size=28)
    backbone = Backbone(network, mean=[0.5], std=[0.5], image_size=28)
    with pytest.raises(ParamsError, match=r"6 patches a side.*cannot be predicted 6 rows ahead"):
        cpc.build(cpc.Config(patches=6, ignore=3, steps=3), backbone, 10)
