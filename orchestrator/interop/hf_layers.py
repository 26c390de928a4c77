"""What a `config.json` says layer by layer: windows, and layers without rotary positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from orchestrator.config.schema import ModelConfig
from orchestrator.interop.hf_keys import Keys, unsupported

FULL, SLIDING = "full_attention", "sliding_attention"


def pattern(values: Sequence[Any]) -> tuple[Any, ...]:
    """Return the shortest pattern that gives these values when it is repeated.

    Args:
        values: one for each layer.
    """
    lengths = range(1, len(values) + 1)
    short = next((n for n in lengths if all(value == values[i % n] for i, value in enumerate(values))), len(values))
    return tuple(values[:short])


def every(interval: Any, key: str) -> Callable[[int], str]:
    """Return the kinds of layers of which every n-th sees everything.

    Args:
        interval: n.
        key: that gave it.

    Raises:
        CheckpointError: it is no such number.
    """
    if not isinstance(interval, int) or isinstance(interval, bool) or interval < 1:
        raise unsupported(key, interval, "a whole number of 1 or more")
    return lambda layer: FULL if (layer + 1) % interval == 0 else SLIDING


def read_kinds(keys: Keys, layers: Any, otherwise: Callable[[int], str]) -> list[str]:
    """Read the kind of each layer.

    Args:
        keys: of the `config.json`.
        layers: number of layers.
        otherwise: the kind of a layer where `layer_types` does not say.

    Raises:
        CheckpointError: kinds that are not known, or not one for each layer.
    """
    if not isinstance(layers, int) or not 0 < layers <= 1 << 14:
        return []  # said where the fields are checked
    given = keys.get("layer_types")
    kinds = [otherwise(layer) for layer in range(layers)] if given is None else given
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise unsupported("layer_types", kinds, f"a list of {layers}, one for each layer")
    if odd := [kind for kind in kinds if kind not in (FULL, SLIDING)]:
        raise unsupported("layer_types", odd[0], f"{FULL}, {SLIDING}")
    return kinds


def windows_of(kinds: Sequence[str], window: Any) -> dict[str, Any]:
    """Return the fields of a `ModelConfig` for layers of these kinds.

    Args:
        kinds: of the layers.
        window: of those that slide.

    Raises:
        CheckpointError: some slide, and there is no window.
    """
    if SLIDING in kinds and window is None:
        raise unsupported("layer_types", SLIDING, f"{FULL}, with sliding_window={window}")
    found = pattern([window if kind == SLIDING else None for kind in kinds])
    return {"windows": found if len(found) > 1 else (), "sliding_window": found[0] if len(found) == 1 else None}


def write_kinds(config: ModelConfig) -> dict[str, Any]:
    """Return `layer_types` and `sliding_window` of a model.

    Args:
        config: of the model, all of whose windows are of one size.
    """
    windows = [config.window_of(layer) for layer in range(config.layers)]
    return {
        "layer_types": [FULL if window is None else SLIDING for window in windows],
        "sliding_window": max((window for window in windows if window is not None), default=None),
    }


def sizes_of_windows(config: ModelConfig) -> set[int]:
    """Return the sizes of windows that a model has.

    Args:
        config: of the model.
    """
    windows = (config.window_of(layer) for layer in range(config.layers))
    return {window for window in windows if window is not None}


def several_windows(config: ModelConfig) -> list[str]:
    """Return what differs from a class whose windows are of one size; empty where nothing does.

    Args:
        config: of the model.
    """
    return ["windows of several sizes, there of one"] if len(sizes_of_windows(config)) > 1 else []


def scaled_windows(config: ModelConfig) -> list[str]:
    """Return what differs from a class that scales RoPE in layers without a window alone; empty where nothing does.

    Args:
        config: of the model.
    """
    scaled = config.rope_local_theta is None and config.rope_scaling.kind != "none"
    return ["rope_scaling in layers with a window, there none"] if sizes_of_windows(config) and scaled else []


def layerwise(config: ModelConfig) -> dict[str, Any]:
    """Return what the keys mean whose values are patterns, so that two spellings of it are equal.

    Args:
        config: of the model.
    """
    layers = range(config.layers)
    local = config.rope_local_theta
    windows = tuple(map(config.window_of, layers))
    ropes = tuple((config.rope_of(layer), local if config.rope_of(layer) == "local" else None) for layer in layers)
    heads = tuple(map(config.heads_of, layers))
    return {
        **dict.fromkeys(("windows", "sliding_window"), windows),
        **dict.fromkeys(("rope_layers", "rope_local_theta"), ropes),
        **dict.fromkeys(("layer_heads", "layer_kv_heads"), heads),
    }
