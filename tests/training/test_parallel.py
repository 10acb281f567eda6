import pytest
import torch
from toys import objective, samples, views

from darkmatter.backbones import Backbone, timm
from darkmatter.objectives import simclr
from darkmatter.training import parallel

CPU = torch.device("cpu")


def transformer() -> torch.nn.Module:
    network = timm.build(timm.Config(model="vit_tiny_patch16_224"), channels=1, image_size=32)
    backbone = Backbone(network, mean=[0.4], std=[0.3], image_size=32)
    return simclr.build(simclr.Config(projector=[16, 8]), backbone, 64)


def step(**layout: bool) -> tuple[float, list[torch.Tensor], int]:
    """Loss, gradients, and the bytes that the backward pass was left."""
    torch.manual_seed(0)
    method = transformer()
    model = parallel.lay_out(method, CPU, **layout)
    pair = tuple(torch.rand(2, 8, 1, 32, 32))
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        terms = parallel.backward(model, pair, torch.arange(8), CPU, parts=1)
    gradients = [parameter.grad for parameter in method.parameters() if parameter.requires_grad]
    return float(terms["loss"]), gradients, sum(kept.values())


# Looked at by torch.compile itself, where a gradient could be.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("layout", [{"compile": True}, {"activation_checkpointing": True}])
def test_how_blocks_are_run_changes_no_number(layout: dict[str, bool]) -> None:
    loss, gradients, kept = step()
    other_loss, other_gradients, other_kept = step(**layout)
    exact = {} if "activation_checkpointing" in layout else {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(other_loss, loss, **(exact and {"rtol": 1e-5, "atol": 1e-6}))
    torch.testing.assert_close(other_gradients, gradients, **(exact or {"rtol": 0.0, "atol": 0.0}))
    assert other_kept < kept


def test_a_batch_in_parts_has_the_gradient_of_the_whole_where_samples_are_on_their_own() -> None:
    results = []
    for parts in (1, 3):
        method = objective("denoising", destroyed=0.0).eval()  # no batch norm and no draw couples the samples
        terms = parallel.backward(method, views(6, like=method), samples(6), CPU, parts=parts)
        results.append((terms["loss"], [p.grad for p in method.parameters() if p.requires_grad]))
    torch.testing.assert_close(results[0], results[1])


def test_the_blocks_of_a_backbone_are_those_in_training() -> None:
    assert len(parallel.blocks(transformer())) == 12
    dino = objective("dino")  # its teacher is not trained
    assert [type(block).__name__ for block in parallel.blocks(dino)] == ["Conv2d", "BatchNorm2d", "Conv2d"]
