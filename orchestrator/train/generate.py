"""Text from a checkpoint, on one device."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from orchestrator.checkpoint.peers import Alone
from orchestrator.checkpoint.reader import read_into
from orchestrator.checkpoint.storage import AnyPath
from orchestrator.checkpoint.verify import Checkpoint
from orchestrator.data.tokenize import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, Tokenizer, load_tokenizer
from orchestrator.hardware.base import Target
from orchestrator.models.decoder import Decoder
from orchestrator.models.generate import generate_tokens
from orchestrator.sharding.shard import Shard
from orchestrator.train.stored_model import model_of


def generate(
    path: AnyPath, target: Target, prompt: str, count: int, temperature: float, top_k: int | None, seed: int
) -> Iterator[str]:
    """Continue `prompt` with the model of the checkpoint at `path`; yields pieces of text.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    checkpoint = Checkpoint(path)
    config = model_of(checkpoint)
    tokenizer = _tokenizer(checkpoint)
    model = _load(checkpoint, config, target.device(0))
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    shown, drawn = "", []
    for token in generate_tokens(model, ids, count, temperature, seed, tokenizer.eos_id, top_k):
        drawn.append(token)
        text = tokenizer.decode(drawn)
        # A character may take several tokens: hold back what is not whole yet.
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(drawn)[len(shown) :]


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Of the files that the manifest lists, which were checked, not of what else may lie beside them."""
    with tempfile.TemporaryDirectory() as folder:
        for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE):
            if name in checkpoint.manifest.files:
                (Path(folder) / name).write_bytes(checkpoint.read(name))
        return load_tokenizer(folder)


def _load(checkpoint: Checkpoint, config: object, device: torch.device) -> Decoder:
    with torch.device("meta"):
        model = Decoder(config)  # type: ignore[arg-type]
    model.to_empty(device=device)
    model.tie_weights()
    shards = [
        Shard(f"model.{name}", tuple(p.shape), tuple(slice(0, size) for size in p.shape), p.data)
        for name, p in model.named_parameters()
    ]
    read_into(checkpoint, shards, ignore=["optimizer."], cast=True, check=Alone())
    return model.eval()
