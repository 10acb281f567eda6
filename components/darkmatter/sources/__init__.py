"""Where samples come from. One file a source, chosen by the scheme of `source.uri`: `folder:/data/photos`.

A source module defines `open_source(location: str) -> Source`, where `location` is what follows the colon.
"""

import abc
import dataclasses

from darkmatter import plugin
from darkmatter.params import Config, ParamsError


class SourceConfig(Config):
    """The section `source` of params.yaml."""

    uri: str
    """`scheme:location`; the schemes are the files of this folder."""

    labels: bool
    """Keep the labels that the source has. They serve evaluation only and never reach pretraining."""


@dataclasses.dataclass(frozen=True, order=True)
class Item:
    """One thing the source holds, not yet read."""

    name: str
    label: str | None = None


class Source(abc.ABC):
    """Items in a fixed order, readable one by one from any process (the object is pickled to the workers)."""

    @abc.abstractmethod
    def items(self) -> list[Item]:
        """Everything the source holds, whether it can be used or not, in an order that depends on names alone."""

    @abc.abstractmethod
    def read(self, item: Item) -> bytes:
        """The item's bytes. Raises OSError when they cannot be read."""

    @abc.abstractmethod
    def state(self) -> str:
        """A cheap text that changes when the content does; no bytes are read that `items` does not read."""


def open_source(config: SourceConfig) -> Source:
    """Raises ParamsError when the URI names no source, or a place that is not there."""
    scheme, colon, location = config.uri.partition(":")
    if not colon:
        raise ParamsError(f"source.uri: {config.uri!r} has no scheme; write scheme:location, as in folder:/data/photos")
    return plugin.load("sources", scheme, where="source.uri").open_source(location)
