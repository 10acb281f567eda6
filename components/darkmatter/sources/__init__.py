"""Where samples come from. One file a source, chosen by the scheme of `source.uri`: `folder:/data/photos`.

A source module defines `open_source(location: str) -> Source`, where `location` is what follows the colon.
"""

import abc
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from darkmatter import plugin
from darkmatter.params import Config, ParamsError
from darkmatter.remote import Unreadable as Unreadable


class SourceConfig(Config):
    """The section `source` of params.yaml."""

    uri: str
    """`scheme:location`; the schemes are the files of this folder."""

    labels: bool
    """Keep the labels that the source has. They serve evaluation only and never reach pretraining."""


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One thing the source holds, not yet read."""

    name: str
    """What people look for it by; no two items of a source have the same."""
    version: str = ""
    """Changes when the content does. Empty where the source cannot tell: then an equal name is an equal content."""
    label: str | None = None
    split: Literal["train", "val", "test"] | None = None
    """Where the source decides it."""
    place: str = ""
    """What `read` needs beside the name; the source's own notation."""


class Source(abc.ABC):
    """Items, readable from any process (the object is pickled to the workers)."""

    @abc.abstractmethod
    def items(self) -> Iterator[Item]:
        """Everything the source holds, whether it can be used or not, in any order, one after the other.

        Raises:
            Unreadable: the source as a whole cannot be listed.
        """

    @abc.abstractmethod
    def read(self, items: Sequence[Item], *, limit: int) -> Iterator[bytes | Unreadable]:
        """The bytes of each, in their order, or why they cannot be had; at most `limit` bytes each.

        Items whose names are neighbours are cheap to read together.
        """

    def state(self) -> str:
        """A cheap text that changes when the content does; of the items nothing is read that listing them does not read."""
        return digest(f"{item.name}\0{item.version}\0{item.label}\0{item.split}" for item in self.items())


def digest(lines: Iterable[str]) -> str:
    """Of the lines as a heap, in whatever order they come."""
    total = sum(int.from_bytes(hashlib.sha256(line.encode(errors="surrogateescape")).digest()) for line in lines)
    return f"{total % 2**256:064x}"


def open_source(config: SourceConfig) -> Source:
    """Raises ParamsError when the URI names no source, or a place that is not there."""
    scheme, colon, location = config.uri.partition(":")
    if not colon:
        raise ParamsError(f"source.uri: {config.uri!r} has no scheme; write scheme:location, as in folder:/data/photos")
    return plugin.load("sources", scheme, where="source.uri").open_source(location)
