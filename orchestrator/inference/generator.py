"""Texts of a checkpoint's model: its tokenizer, what ends its texts, and its weights on one device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.merged_weights import read_weights
from orchestrator.data.document_format import DocumentFormat, SpecialTokens
from orchestrator.data.model_files import GENERATION_FILE
from orchestrator.data.tokenize import Tokenizer
from orchestrator.data.tokenizer_files import parse_json, stop_ids
from orchestrator.distributed.exchange import SingleProcess
from orchestrator.errors import CheckpointError
from orchestrator.inference.decoding import ROWS, TextRequest
from orchestrator.inference.passes import Passes
from orchestrator.inference.place import Place
from orchestrator.inference.sampling import Sampling
from orchestrator.inference.texts import Writing
from orchestrator.models.decoder import Decoder
from orchestrator.runs.origin import SOURCE_CONFIG
from orchestrator.runs.stored_model import files_of, model_of, tokenizer_of
from orchestrator.sharding.shard import Shard


class Writer:
    """A checkpoint's model and tokenizer, ready to continue texts.

    Args:
        checkpoint: the checkpoint.
        place: of its model; a device: the model is loaded onto it.
        special_tokens: what special tokens in a prompt are; None: as the model was trained.

    Attributes:
        place: of the model.
        tokenizer: with the documents that the model was trained on: a prompt is the beginning of one.
        stop_ids: the tokens that end a text: the tokenizer's, and those of generation_config.json or config.json.

    Raises:
        CheckpointError: it has no tokenizer, or no model, or is damaged.
    """

    def __init__(
        self, checkpoint: Checkpoint, place: Place | torch.device, special_tokens: SpecialTokens | None = None
    ):
        self.tokenizer = _tokenizer(checkpoint, special_tokens)
        files, documents = files_of(checkpoint), self.tokenizer.documents
        # As in transformers: config.json speaks where there is no generation_config.json.
        name = GENERATION_FILE if GENERATION_FILE in files else SOURCE_CONFIG
        content = files.get(name) or (checkpoint.read(name) if name in checkpoint.manifest.files else b"{}")
        ends = stop_ids(parse_json(content, name))
        first = () if documents.eos else documents.bos_ids[:1]  # then the beginning of the next document is the end
        self.stop_ids = frozenset({self.tokenizer.eos_id, *ends, *first})
        self.place = place if isinstance(place, Place) else Place(load_decoder(checkpoint, place))

    def request(
        self, prompt: str | Sequence[int], count: int, sampling: Sampling, seed: int, stop: Sequence[str] = ()
    ) -> TextRequest:
        """Ask for the continuation of a prompt.

        Args:
            prompt: the text to continue, or its tokens.
            count: tokens to draw at most.
            sampling: how each token is drawn.
            seed: of the draws.
            stop: texts at which to end; they are not part of the continuation.
        """
        ids = self.tokenizer.prompt_ids(prompt) if isinstance(prompt, str) else prompt
        return TextRequest(ids, count, sampling, seed, self.stop_ids, stop)

    def write(self, requests: Sequence[TextRequest], rows: int = ROWS, passes: Passes | None = None) -> Writing:
        """Continue prompts. All processes of a layout do so together.

        Args:
            requests: of `request`.
            rows: texts of each process that are written at one time.
            passes: as for `Decoding`.
        """
        return Writing(self.place, self.tokenizer, requests, rows, passes)


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
