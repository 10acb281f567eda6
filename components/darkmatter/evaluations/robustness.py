"""The same few-shot episodes under corruptions: learned from clean pictures, asked about corrupted ones, by nearest centroid
as in `few_shot`. What a corruption is, `darkmatter/changes.py` says."""

from collections.abc import Iterator, Sequence

from pydantic import Field

from darkmatter.changes import Change, Corruption
from darkmatter.evaluations import Score, Skipped, Subject, _episodes, of_draws, unit
from darkmatter.params import Config as _Config


class Config(_Config):
    corruptions: list[Corruption] = Field(min_length=1)
    """noise, blur, contrast, brightness, occlusion."""
    severity: int = Field(ge=1, le=5)
    """How strong."""
    ways: int = Field(ge=2)
    """As in `few_shot`."""
    shots: int = Field(gt=0)
    """As in `few_shot`."""
    episodes: int = Field(ge=2)
    """As in `few_shot`."""
    queries: int = Field(gt=0)
    """As in `few_shot`."""


def wanted(config: Config) -> Sequence[Change]:
    return [Change(name, config.severity) for name in config.corruptions]


def scores(config: Config, subject: Subject, *, seed: int) -> Iterator[Score | Skipped]:
    centre = subject.bank.mean(0)
    clean = unit(subject.queries, centre)
    drawn = _episodes.draw(subject.query_labels, config.ways, config.shots, config.queries, config.episodes, seed)
    for change in wanted(config):
        name = f"{config.ways}-way {config.shots}-shot {change}"
        if isinstance(drawn, str):
            yield Skipped(name=name, reason=drawn)
            continue
        changed = unit(subject.changed[change], centre)
        yield of_draws(name, _episodes.accuracy(clean, changed, drawn, config.shots, "centroid"), classes=config.ways)
