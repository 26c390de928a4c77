"""Constants that several packages share."""

from __future__ import annotations

IGNORE_INDEX = -100
"""Target of a position that has none: it counts neither in the loss nor in its mean (torch's `ignore_index`)."""

CODE_BLOCK = 64
"""Elements of the last dim that share the scale of an 8-bit optimizer state."""

LORA_A, LORA_B = "lora_a", "lora_b"
"""Names of the two matrices of an adapter, in the layer that it lies beside."""

ALL_LINEAR = "all-linear"
"""Stands in `train.lora.target_modules` for every matrix that an adapter can lie beside."""

SCALE = "_scale"
"""Ends the key of those scales, behind the key of the state."""
