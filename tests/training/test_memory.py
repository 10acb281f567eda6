import dataclasses
import math
from typing import Any

import pytest
import torch
from toys import NAMES, NUM_SAMPLES, objective, views

from darkmatter.augmentations import View
from darkmatter.objectives import Objective
from darkmatter.training import memory, parallel

CPU = torch.device("cpu")


def plan(method: Objective) -> list[View]:
    small = [View(number=2 + number, local=True, size=4) for number in range(2 * method.takes_local_views)]
    return [*(View(number=number, local=False, size=8) for number in range(method.num_views)), *small]


def predicted(method: Objective, **options: Any) -> memory.Prediction:
    return memory.Prediction(
        method,
        plan(method),
        optimizer="adamw",
        **{"gpu": False, "activation_checkpointing": False, "holders": 1, **options},
    )


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_of_a_batch_is_predicted_from_a_few_samples(name: str) -> None:
    torch.manual_seed(0)
    method = objective(name).float()
    before = {key: value.clone() for key, value in method.state_dict().items()}
    prediction = predicted(method)
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    torch.manual_seed(0)
    images = [view.float() for view in views(NUM_SAMPLES, like=method)]
    measured = memory.kept(method, images, torch.arange(NUM_SAMPLES))
    # Steps of I-JEPA and iBOT draw masks of other sizes; all else is a polynomial of the batch.
    near = 0.15 if name in ("ijepa", "ibot") else 0.01
    assert prediction.need(NUM_SAMPLES).activations == pytest.approx(measured, rel=near)


def test_weights_gradients_and_moments_are_counted_once_each() -> None:
    method = objective("byol")  # half of it is a teacher, without gradients
    need = predicted(method).need(4)
    trained = sum(8 * p.numel() for p in method.parameters() if p.requires_grad)
    assert need.gradients == trained
    assert need.optimizer == 2 * trained
    assert need.weights == sum(x.numel() * x.element_size() for x in (*method.parameters(), *method.buffers()))
    assert need.views == 4 * 2 * 64 * 4
    assert need.total == sum(dataclasses.astuple(need))
    half = predicted(method, holders=2).need(4)
    buffers = sum(x.numel() * x.element_size() for x in method.buffers())
    assert half.weights - buffers == (need.weights - buffers) // 2
    assert (half.gradients, half.optimizer) == (need.gradients // 2, need.optimizer // 2)


def test_checkpointed_blocks_and_bf16_keep_less() -> None:
    method = objective("simclr").float()
    plain = predicted(method).need(16).activations
    assert predicted(method, activation_checkpointing=True).need(16).activations < plain
    assert predicted(method, gpu=True).need(16).activations < plain
    assert all("forward" not in vars(block) for block in parallel.blocks(method))


def test_advice_names_the_largest_part_that_fits() -> None:
    prediction, shares = predicted(objective("simclr").float()), memory.Shares(batch=256, workers=2, parts=2)
    room = math.ceil(prediction.need(20).total / 0.9)
    text = prediction.advice(room, shares)
    assert "64 samples at a time need about" in text
    assert "16 would fit: set pretrain.accumulate to 8, or pretrain.batch_size to 64," in text
    assert "not even one fits" in prediction.advice(1000, shares)
    assert "something else holds a part" in prediction.advice(2**40, shares)


def test_only_a_lack_of_memory_is_explained() -> None:
    prediction, shares = predicted(objective("simclr").float()), memory.Shares(batch=64, workers=1, parts=1)
    message = r"out of memory: 64 samples at a time need about \d+ MiB"
    with pytest.raises(memory.DoesNotFit, match=message), memory.explained(prediction, shares, CPU):
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), memory.explained(prediction, shares, CPU):
        torch.ones(2, 3) @ torch.ones(2, 3)
