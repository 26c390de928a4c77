"""What the verb `generate` has done: continuations of prompts, written to standard output as they come."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.data.document_format import SpecialTokens
from orchestrator.data.tokenize import Tokenizer
from orchestrator.inference.generator import Writer
from orchestrator.inference.place import LayoutPlace, Place
from orchestrator.inference.sampling import Sampling
from orchestrator.strategies.relay import Relay
from orchestrator.strategies.served_model import ServedModel


@dataclass(frozen=True)
class GenerateJob:
    """What is to be written; JSON carries it.

    Attributes:
        prompts: texts to continue.
        samples: of each prompt, each with the next seed.
        tokens: of each at most.
        sampling: arguments of `Sampling`.
        stop: texts at which to end.
        seed: of the first sample of each prompt.
        rows: texts of each process that are written at one time.
        special_tokens: what special tokens in the prompts are; None: as the model was trained.
        json: an object for each text.
    """

    prompts: Sequence[str]
    samples: int
    tokens: int
    sampling: Mapping[str, Any]
    stop: Sequence[str]
    seed: int
    rows: int
    special_tokens: SpecialTokens | None = None
    json: bool = False

    @property
    def wanted(self) -> list[tuple[str, int]]:
        """Prompt and seed of each text."""
        return [(prompt, self.seed + number) for prompt in self.prompts for number in range(self.samples)]


def generate(served: ServedModel, arguments: Mapping[str, Any]) -> None:
    """Write texts with a model that is placed: a task of `launch.model_job`, which all ranks call together.

    Args:
        served: the model.
        arguments: of a `GenerateJob`; those of rank 0 count.
    """
    place = LayoutPlace(served.model, served.parallel)

    def write(given: Mapping[str, Any]) -> None:
        job = GenerateJob(**given)
        write_texts(Writer(served.checkpoint, place, job.special_tokens), job, shows=served.parallel.rank == 0)

    relay = Relay(served.parallel, {"write": write})
    relay.lead(lambda: relay.call("write", dict(arguments)))


def write_texts(writer: Writer, job: GenerateJob, shows: bool = True) -> None:
    """Write texts. One that is alone appears piece by piece, of several each when it is whole, in their order.

    Args:
        writer: of the model. All processes of a layout call it together.
        job: what is to be written.
        shows: print them; one process does.
    """
    wanted = job.wanted
    sampling = Sampling(**job.sampling)
    requests = [writer.request(prompt, job.tokens, sampling, seed, job.stop) for prompt, seed in wanted]
    writing = writer.write(requests, job.rows)
    if shows:
        cut = _cut(max((len(one.prompt) for one in requests), default=0), writer.place.model.config.max_seq_len)
        for note in (*notes(writer.place), *_spelled(job.prompts, writer.tokenizer), *cut):
            print(note, file=sys.stderr)
    streams = len(wanted) == 1 and not job.json
    ended, next_shown, begun = set[int](), 0, False
    for index, piece in writing:
        if streams and shows and (piece or not begun):
            # An error comes with the first token: before anything is printed.
            print(piece if begun else wanted[0][0] + piece, end="", flush=True)
            begun = True
        if piece:
            continue
        ended.add(index)
        while next_shown in ended and shows and not streams:
            text = writing.texts[next_shown]
            prompt, seed = wanted[next_shown]
            if job.json:
                facts = {"tokens": len(text.ids), "stopped": text.stopped, "seed": seed}
                print(json.dumps({"prompt": prompt, "text": str(text), **facts}, ensure_ascii=False), flush=True)
            else:
                print(f"--- {next_shown + 1} of {len(wanted)}, seed {seed}\n{prompt}{text}", flush=True)
            next_shown += 1
    if streams and shows:
        print()


def notes(place: Place) -> list[str]:
    """Say what of a place makes writing slow.

    Args:
        place: of the model.
    """
    if place.cached:
        return []
    return [
        "note: keys and values are not kept here (layout.context > 1, or a model of your own): each token is another "
        "pass over the whole text"
    ]


def _cut(longest: int, window: int) -> list[str]:
    """Describe that the longest prompt is more than the model sees."""
    if longest <= window:
        return []
    return [
        f"note: a prompt has {longest:,} tokens, and the model sees {window:,} (max_seq_len): of a longer one it does "
        "not see the beginning"
    ]


def _spelled(prompts: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """Describe a special token that a prompt spells and that is read as plain text; nothing without one."""
    if tokenizer.documents.special_tokens_in_text != "text":
        return []
    spelled = next((token for token in tokenizer.special_tokens if any(token in prompt for prompt in prompts)), None)
    if spelled is None:
        return []
    return [
        f"note: the prompt spells {spelled}, which is plain text to this model; "
        "special_tokens_in_text=token makes it the token"
    ]
