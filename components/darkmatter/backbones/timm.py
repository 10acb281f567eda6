"""Any backbone of the timm library, by its name there: resnet50, vit_small_patch16_224, convnext_tiny ..."""

import difflib
import inspect
from typing import Any

from torch import nn

from darkmatter.params import Config as _Config
from darkmatter.params import ParamsError


class Config(_Config):
    model: str = "resnet18"
    """timm's name; `python -c "import timm; print(timm.list_models())"` lists them. Always trained from scratch."""


def build(config: Config, *, channels: int, image_size: int) -> nn.Module:
    import timm

    if not timm.is_model(config.model):
        close = difflib.get_close_matches(config.model, timm.list_models(), n=5)
        hint = f" Near it: {', '.join(close)}." if close else ""
        raise ParamsError(f"backbone.timm.model: timm {timm.__version__} has no model {config.model!r}.{hint}")
    arguments: dict[str, Any] = {"num_classes": 0, "in_chans": channels}
    # Transformers build their position embedding for one size; convolutional networks refuse the argument.
    if "img_size" in inspect.signature(timm.model_entrypoint(config.model)).parameters or config.model.startswith(
        "vit"
    ):
        arguments["img_size"] = image_size
    if config.model.startswith("vit"):
        arguments["dynamic_img_size"] = True  # small views have fewer patches
    return timm.create_model(config.model, pretrained=False, **arguments)
