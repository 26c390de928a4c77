"""Valid ranges of the sampling settings, shared by the command line and the Python API."""

from __future__ import annotations

import math

from orchestrator.errors import ConfigError


def check_drawing(
    *,
    tokens: int,
    samples: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
    seed: int,
    rows: int = 1,
) -> list[ConfigError]:
    """Return what is wrong with the settings, all at once; `inference.sampling.Sampling` says what they mean.

    Args:
        tokens: to write at most.
        samples: texts to write.
        temperature: as `Sampling` has it, like the following.
        top_k: None: no limit.
        top_p: None: no limit.
        min_p: None: no limit.
        repetition_penalty: 1: none.
        seed: of the first sample; each of the others has the next one.
        rows: texts that are written at one time.
    """
    ranges: list[tuple[str, object, bool, str]] = [
        ("tokens", tokens, tokens >= 1, "1 or more"),
        ("samples", samples, samples >= 1, "1 or more"),
        ("rows", rows, rows >= 1, "1 or more"),
        ("temperature", temperature, 0 <= temperature < math.inf, "0 or more, and finite"),
        ("top_k", top_k, top_k is None or top_k >= 1, "1 or more, or none"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0, up to 1, or none"),
        ("min_p", min_p, min_p is None or 0 <= min_p <= 1, "0 to 1, or none"),
        ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < math.inf, "above 0, and finite"),
        ("seed", seed, 0 <= seed <= 2**63 - 1 - max(0, samples), "0 or more, below 2^63"),
    ]
    return [
        ConfigError(f"'{key}' is out of range", got=f"{key}={value}", allowed=allowed)
        for key, value, right, allowed in ranges
        if not right
    ]
