"""Darkmatter: self-supervised pretraining, from a heap of unlabelled data to a registered backbone."""

__version__ = "0.1.0"
