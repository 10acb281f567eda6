import math
from pathlib import Path
from typing import Any

import pytest
import test_contract
import test_ranks
import torch
import torch.distributed as dist
import torch.multiprocessing
from toys import objective, samples, views

from conftest import free_port
from darkmatter.objectives import moco

SMALL = {"projector": [16, 8], "queue": 20, "predictor": 7}  # not a multiple of the batch: the queue wraps
DIGITS = {"projector": [256, 64], "queue": 512, "temperature": 0.1, "momentum": 0.99}
VERSION_3 = {**SMALL, "version": 3, "temperature": 1.0}


def collapse(method: moco.MoCo2, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without momentum the keys in the queue are strangers to the query: 2019, section 4.1, "fail"."""
    method.momentum = 0.0


def unit(vector: list[float]) -> list[float]:
    norm = math.sqrt(sum(value * value for value in vector))
    return [value / norm for value in vector]


def info_nce(query: list[float], keys: list[list[float]], own: int, temperature: float) -> float:
    """He et al. 2019, equation 1, as in facebookresearch/moco, moco/builder.py, in plain Python."""
    scores = [math.exp(sum(a * b for a, b in zip(query, key, strict=True)) / temperature) for key in keys]
    return -math.log(scores[own] / sum(scores))


def another_teacher(method: moco.MoCo2 | moco.MoCo3) -> None:
    for parameter in method.teacher.parameters():
        parameter.mul_(1.1).add_(0.01)


def queries(method: moco.MoCo2 | moco.MoCo3, x: torch.Tensor) -> list[list[float]]:
    return [unit(row) for row in method.predictor(method.projector(method.backbone(x))).tolist()]


def keys(method: moco.MoCo2 | moco.MoCo3, y: torch.Tensor) -> list[list[float]]:
    return [unit(row) for row in method.teacher(y).tolist()]


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_loss_of_version_2_sets_the_own_key_against_the_queue(temperature: float) -> None:
    method = objective("moco", temperature=temperature)
    another_teacher(method)
    x, y = views(6)
    queue = method.queue.rows.tolist()
    rows = zip(queries(method, x), keys(method, y), strict=True)
    expected = sum(info_nce(query, [key, *queue], 0, temperature) for query, key in rows) / 6
    terms = method((x, y), samples(6))
    assert [terms["loss"].item(), terms["contrast"].item()] == pytest.approx([expected, expected], abs=1e-9)


def test_the_head_of_version_2_has_two_layers_and_no_batch_norm() -> None:
    """Chen et al. 2020, section 3; moco/builder.py with mlp=True."""
    first, between, last = objective("moco").projector
    assert [type(first), type(between), type(last)] == [torch.nn.Linear, torch.nn.ReLU, torch.nn.Linear]
    assert [(one.in_features, one.out_features) for one in (first, last)] == [(12, 16), (16, 8)]
    assert first.bias is not None
    assert last.bias is not None


def test_the_queue_takes_the_keys_of_each_step_and_loses_its_oldest() -> None:
    method = objective("moco")
    rows = method.queue.rows.tolist()
    expected = [*rows]
    for step in range(4):  # 4 times 8 keys in 20 places
        x, y = views(8, seed=step)
        new = keys(method, y)
        method((x, y), samples(8))
        for index, key in enumerate(new):
            expected[(step * 8 + index) % 20] = key
        before = method.queue.rows.clone()
        method.after_step(0.1)
        assert not torch.equal(method.queue.rows, before)
        torch.testing.assert_close(method.queue.rows, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_step_without_a_loss_leaves_the_queue_alone() -> None:
    method = objective("moco")
    method(views(8), samples(8))
    method.after_step(0.1)
    before = method.queue.rows.clone()
    method.after_step(0.2)
    assert torch.equal(method.queue.rows, before)


def test_loss_of_version_3_sets_the_own_key_against_the_batch_both_ways_round() -> None:
    """Chen et al. 2021, algorithm 1; facebookresearch/moco-v3, moco/builder.py multiplies by 2 T."""
    method = objective("moco", **{**VERSION_3, "temperature": 0.4})
    another_teacher(method)
    x, y = views(6)

    def one_way(first: torch.Tensor, second: torch.Tensor) -> float:
        all_keys = keys(method, second)
        losses = [info_nce(query, all_keys, own, 0.4) for own, query in enumerate(queries(method, first))]
        return 2 * 0.4 * sum(losses) / 6

    there, back = one_way(x, y), one_way(y, x)
    terms = method((x, y), samples(6))
    found = [terms[name].item() for name in ("there", "back", "loss")]
    assert found == pytest.approx([there, back, there + back], abs=1e-9)


def test_the_heads_of_version_3_end_in_a_batch_norm_without_scale() -> None:
    method = objective("moco", **VERSION_3)
    for head in (method.projector, method.predictor):
        assert isinstance(head[-1], torch.nn.BatchNorm1d)
        assert not head[-1].affine
    assert method.predictor[0].out_features == 7


@pytest.mark.parametrize("options", [SMALL, VERSION_3])
def test_energy_is_the_negative_cosine_from_query_to_key_over_the_temperature(options: dict[str, Any]) -> None:
    method = objective("moco", **{**options, "temperature": 0.3}).eval()
    another_teacher(method)
    x, y = views(5)
    pairs = zip(queries(method, x), keys(method, y), strict=True)
    expected = [-sum(a * b for a, b in zip(q, k, strict=True)) / 0.3 for q, k in pairs]
    assert method.energy(x, y).tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "momentum"), [(SMALL, 0.8), (VERSION_3, 1 - 0.2 * (math.cos(math.pi * 0.25) + 1) / 2)]
)
def test_the_teacher_is_the_average_of_the_student_with_a_momentum_that_rises_in_version_3(
    options: dict[str, Any], momentum: float
) -> None:
    method = objective("moco", **{**options, "momentum": 0.8})
    before = [p.clone() for p in method.teacher.parameters()]
    for parameter in (*method.backbone.parameters(), *method.projector.parameters()):
        torch.nn.init.normal_(parameter)
    student = [p.clone() for p in (*method.backbone.parameters(), *method.projector.parameters())]
    method.after_step(0.25)
    for new, old, theirs in zip(method.teacher.parameters(), before, student, strict=True):
        torch.testing.assert_close(new, momentum * old + (1 - momentum) * theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "property_",
    [
        test_contract.test_energy_is_a_number_a_pair_and_no_pair_affects_another,
        test_contract.test_energy_depends_on_both_images,
        test_contract.test_loss_names_its_terms_and_reaches_every_parameter_but_the_teacher,
        test_contract.test_bfloat16_autocast_gives_finite_float32_losses_and_gradients,
    ],
)
def test_version_3_keeps_the_contract(property_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SMALL", VERSION_3)
    property_("moco")


def rank_main(rank: int, port: int, folder: str) -> None:
    globals()["SMALL"] = VERSION_3
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(test_ranks.train("moco", 1), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_ranks_of_version_3_agree_with_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SMALL", VERSION_3)
    torch.multiprocessing.spawn(rank_main, (free_port(), str(tmp_path)), nprocs=2)
    alone = test_ranks.train("moco", 1)
    assert "gradient of predictor.0.weight" in alone
    for rank in range(2):
        together = torch.load(tmp_path / f"{rank}.pt")
        assert together.keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(together[key], value, rtol=1e-9, atol=1e-9, msg=f"{key} on rank {rank}")
