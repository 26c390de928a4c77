"""Texts that a small model writes greedily and by chance, on any strategy and in one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.config.schema import RunConfig
from orchestrator.distributed.world import World
from orchestrator.inference.decoding import Decoding, TextRequest
from orchestrator.inference.place import LayoutPlace, Place
from orchestrator.inference.sampling import Sampling

VOCABULARY = 96
# More prompts than rows, of unequal lengths; the last but one goes past the window of 48.
PROMPTS = [[3, 14, 15, 92, 65, 35, 89], [5], list(range(40, 60)), [7, 8, 9], list(range(90, 50, -1)), [1, 2]]
WINDOW = 48


@dataclass
class Written:
    """What a rank has.

    Attributes:
        texts: of all requests.
        cached: whether keys and values were kept.
        compiled: programs of a first and of a second time; None where nothing is compiled.
    """

    texts: list[list[int]]
    cached: bool
    compiled: tuple[int, int] | None


def requests() -> list[TextRequest]:
    """Half of them greedy; one of them ends at once."""
    found = [
        TextRequest(prompt, 14 - number, Sampling(0.9, top_k=20) if number % 2 else Sampling(), number)
        for number, prompt in enumerate(PROMPTS)
    ]
    return [*found, TextRequest([4, 4], 1)]


def texts(place: Place, rows: int) -> list[list[int]]:
    """Write all of them.

    Args:
        place: of the model.
        rows: texts of a process at one time.
    """
    found: list[list[int]] = [[] for _ in requests()]
    for index, token in Decoding(place, requests(), rows):
        if token is not None:
            found[index].append(token)
    return found


def write(world: World, data: dict[str, Any], rows: int) -> Written:
    """Write them on this rank of a run of the configuration `data`."""
    from orchestrator.config.convert import from_dict
    from orchestrator.training.job import make_strategy
    from orchestrator.training.placed_model import build_placed
    from tests.lab.runs import resolved_run

    resolved = resolved_run(from_dict(RunConfig, data), world, vocab_size=VOCABULARY)
    parallel = make_strategy(resolved, resolved.target(), world)
    parallel.join()
    model = build_placed(resolved.config, parallel)
    parallel.initialize(model, 3)
    place = LayoutPlace(model, parallel)
    before = parallel.compilations()
    found = texts(place, rows)
    between, compiled = parallel.compilations(), None
    if before is not None and between is not None:
        assert found == texts(place, rows)
        compiled = between - before, (parallel.compilations() or 0) - between
    parallel.leave()
    return Written(found, place.cached, compiled)


def alone(world: World, data: dict[str, Any]) -> list[list[int]]:
    """Write them one after the other in one process, with a plain model."""
    from orchestrator.config.convert import from_dict
    from orchestrator.models.decoder import Decoder
    from orchestrator.models.init import draw_slice
    from orchestrator.training.check import resolve_model

    model = Decoder(resolve_model(from_dict(RunConfig, data).model, VOCABULARY))
    for name, init in model.initializers().items():
        parameter = model.get_parameter(name)
        whole = tuple(slice(0, size) for size in parameter.shape)
        parameter.data.copy_(draw_slice(init, name, 3, tuple(parameter.shape), whole))
    return texts(Place(model.eval()), 1)
