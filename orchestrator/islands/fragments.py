"""The parts of a model that islands exchange one after the other."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

_LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)\.")


def fragments(shapes: Mapping[str, tuple[int, ...]], count: int) -> tuple[tuple[str, ...], ...]:
    """Divide the tensors of a model into fragments: a function of names and shapes alone.

    Whole layers, dealt out in turn (the strided pattern of Streaming DiLoCo, arXiv 2501.18512, section 2.1); what is in
    no layer goes, the largest first, to the fragment that has least. A model has at most as many fragments as tensors.

    Args:
        shapes: of the tensors, by name, in the order of the model.
        count: of fragments.

    Returns:
        The names of each fragment, in the order of the model.
    """
    count = max(1, min(count, len(shapes)))
    size = [0] * count
    owner: dict[str, int] = {}
    layers = {name: int(found[1]) for name in shapes if (found := _LAYER.search(name))}
    order = {layer: at for at, layer in enumerate(sorted(set(layers.values())))}
    for name, layer in layers.items():
        owner[name] = order[layer] % count
        size[owner[name]] += math.prod(shapes[name])
    others = [name for name in shapes if name not in layers]
    for name in sorted(others, key=lambda name: (-math.prod(shapes[name]), name)):
        owner[name] = min(range(count), key=lambda at: (size[at], at))
        size[owner[name]] += math.prod(shapes[name])
    parts = [tuple(name for name in shapes if owner[name] == at) for at in range(count)]
    return tuple(names for names in parts if names)
