"""Train one language model on whatever accelerators can be had, from one configuration."""

__version__ = "0.1.0"
