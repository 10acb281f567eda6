"""Pretraining: one plain loop, and what it needs to be killed at any moment and go on."""

from typing import Literal

from pydantic import Field

from darkmatter.params import Config


class PretrainConfig(Config):
    """The section `pretrain` of params.yaml."""

    seed: int = Field(ge=0)
    """Of the weights, the order of samples and the views."""
    warm_start: str
    """A trained model to start from: a version of the registry (models:/darkmatter-backbone@champion), or a model folder. Of
    an alias that no version has yet, and when empty, from fresh weights."""
    epochs: int = Field(gt=0)
    """Passes over the training split."""
    batch_size: int = Field(gt=1)
    """Of the global batch, shared by all workers."""
    accumulate: int = Field(gt=0)
    """Parts of a batch that are trained one after the other, for a batch that memory cannot hold. A method that compares the
    samples of a batch compares those of a part."""
    shuffle_shards: int = Field(ge=0)
    """0: the samples of an epoch in one permutation. Else so many shards are mixed at a time, for data that the cache of a
    machine (place.data) cannot hold; results depend on it."""
    optimizer: Literal["adamw", "lars"]
    """lars is for batches of thousands, with learning rates near 1."""
    learning_rate: float = Field(gt=0)
    """The highest; reached after the warm-up, it falls to 0 along a cosine."""
    warmup_epochs: int = Field(ge=0)
    """Over which the learning rate rises from 0."""
    layer_decay: float = Field(gt=0, le=1)
    """Each layer of the backbone has the learning rate of the layer above it times this; 1 for the same everywhere."""
    weight_decay: float = Field(ge=0)
    """On weights only, not on biases and norms."""
    weight_decay_end: float = Field(ge=0)
    """Where it gets to along a cosine."""
    clip_norm: float = Field(ge=0)
    """The gradient of a step is shrunk to this norm; 0 for no limit."""
    log_every: int = Field(gt=0)
    """Steps between two rows of the history; every checkpoint has a row as well."""
    save_every: int = Field(gt=0)
    """Steps between two checkpoints; a kill costs at most this much, and what one save takes."""
    health_every: int = Field(gt=0)
    """Steps between two looks at the energy margin on held-out data."""
    min_energy_margin: float = Field(ge=0, lt=1)
    """Training stops as collapsed when the margin is below it and does not rise, at three looks in a row after the first
    third. 0 never stops."""
