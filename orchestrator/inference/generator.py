"""Generate text from a checkpoint on one device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.merged_weights import read_weights
from orchestrator.checkpoint.storage import AnyPath
from orchestrator.data.document_format import DocumentFormat, SpecialTokens
from orchestrator.data.model_files import GENERATION_FILE
from orchestrator.data.tokenize import Tokenizer
from orchestrator.data.tokenizer_files import parse_json, stop_ids
from orchestrator.distributed.exchange import SingleProcess
from orchestrator.errors import CheckpointError
from orchestrator.hardware.target import Target
from orchestrator.inference.decoding import generate_tokens
from orchestrator.inference.sampling import Sampling
from orchestrator.models.decoder import Decoder
from orchestrator.runs.origin import SOURCE_CONFIG
from orchestrator.runs.stored_model import files_of, model_of, tokenizer_of
from orchestrator.sharding.shard import Shard

__all__ = ["Continuation", "Sampling", "Writer"]
Stopped = Literal["end", "stop", "tokens"]


class Writer:
    """A checkpoint's model and tokenizer, ready to continue texts.

    Args:
        path: of the checkpoint.
        target: the hardware.
        special_tokens: what special tokens in a prompt are; None: as the model was trained.
        model: that of the checkpoint, where it is loaded already.

    Attributes:
        tokenizer: with the documents that the model was trained on: a prompt is the beginning of one.
        stop_ids: the tokens that end a text: the tokenizer's, and those of generation_config.json or config.json.

    Raises:
        CheckpointError: it has no tokenizer, or no model, or is damaged.
    """

    def __init__(
        self, path: AnyPath, target: Target, special_tokens: SpecialTokens | None = None, model: Decoder | None = None
    ):
        checkpoint = Checkpoint(path)
        self.tokenizer = _tokenizer(checkpoint, special_tokens)
        files, documents = files_of(checkpoint), self.tokenizer.documents
        # As in transformers: config.json speaks where there is no generation_config.json.
        name = GENERATION_FILE if GENERATION_FILE in files else SOURCE_CONFIG
        content = files.get(name) or (checkpoint.read(name) if name in checkpoint.manifest.files else b"{}")
        ends = stop_ids(parse_json(content, name))
        first = () if documents.eos else documents.bos_ids[:1]  # then the beginning of the next document is the end
        self.stop_ids = frozenset({self.tokenizer.eos_id, *ends, *first})
        self._model = model or load_decoder(checkpoint, target.device(0))

    def write(self, prompt: str, count: int, sampling: Sampling, seed: int, stop: Sequence[str] = ()) -> Continuation:
        """Continue a prompt.

        Args:
            prompt: the text to continue.
            count: tokens to draw at most.
            sampling: how each token is drawn.
            seed: of the draws.
            stop: texts at which to end; they are not part of the continuation.
        """
        ids = self.tokenizer.prompt_ids(prompt)
        drawn = generate_tokens(self._model, ids, count, sampling, seed, self.stop_ids)
        return Continuation(self.tokenizer, ids, drawn, count, stop)


class Continuation:
    """The text that follows on a prompt: iterate over its pieces.

    Args:
        tokenizer: of the model.
        prompt: token ids.
        drawn: yields the token ids that follow.
        count: tokens to draw at most.
        stop: texts at which to end.

    Attributes:
        ids: the tokens that were drawn so far.
        stopped: by what it ended: the model's own end of text, a stop text, or the number of tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], drawn: Iterator[int], count: int, stop: Sequence[str]
    ):
        self._tokenizer, self._before, self._drawn, self._count = tokenizer, list(prompt), drawn, count
        self._stop = [text for text in stop if text]
        self.ids: list[int] = []
        self.stopped: Stopped = "tokens"

    def __iter__(self) -> Iterator[str]:
        held = ""
        for piece in self._pieces():
            held += piece
            cut = min((at for text in self._stop if (at := held.find(text)) >= 0), default=-1)
            if cut >= 0:
                self.stopped = "stop"
                yield held[:cut]
                return
            safe = len(held) - self._may_begin_a_stop(held)
            yield held[:safe]
            held = held[safe:]
        yield held

    def _pieces(self) -> Iterator[str]:
        pending: list[int] = []
        for token in self._drawn:
            self.ids.append(token)
            pending.append(token)
            text = self._tokenizer.decode_after(self._before, pending)
            # A character may take several tokens: hold back what is not whole yet.
            if not text.endswith("\ufffd"):
                yield text
                self._before, pending = self._before + pending, []
        self.stopped = "tokens" if len(self.ids) == self._count else "end"
        yield self._tokenizer.decode_after(self._before, pending)

    def _may_begin_a_stop(self, text: str) -> int:
        """How many characters at the end of `text` may be the beginning of a stop text."""
        longest = max(map(len, self._stop), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0


def _tokenizer(checkpoint: Checkpoint, special_tokens: SpecialTokens | None) -> Tokenizer:
    tokenizer = tokenizer_of(checkpoint)
    if tokenizer is None:
        raise CheckpointError(
            "the checkpoint carries no tokenizer, so it cannot be given text",
            got=checkpoint.directory,
            fix="import it again with the model's: checkpoint import ... tokenizer=PATH of a tokenizer.json",
        )
    documents = tokenizer.documents
    spelt = special_tokens or documents.special_tokens_in_text
    return tokenizer.with_documents(DocumentFormat(documents.bos_ids, documents.eos, spelt))


def load_decoder(checkpoint: Checkpoint, device: torch.device) -> Decoder:
    """Load a checkpoint's model onto one device, in fp32 and ready for inference.

    Args:
        checkpoint: the checkpoint.
        device: where the model goes.

    Raises:
        CheckpointError: it holds no model, or is damaged.
    """
    with torch.device("meta"):
        model = Decoder(model_of(checkpoint))
    model.to_empty(device=device)
    model.tie_weights()
    shards = [
        Shard(f"model.{name}", tuple(p.shape), tuple(slice(0, size) for size in p.shape), p.data)
        for name, p in model.named_parameters()
    ]
    read_weights(checkpoint, shards, check=SingleProcess())
    return model.eval()
