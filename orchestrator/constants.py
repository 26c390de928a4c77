"""Constants that several packages share."""

from __future__ import annotations

IGNORE_INDEX = -100
"""Target of a position that has none: it counts neither in the loss nor in its mean (torch's `ignore_index`)."""
