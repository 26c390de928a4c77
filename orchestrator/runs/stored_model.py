"""Find the checkpoint that a user means, and the model that it holds. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from orchestrator.checkpoint.adapters import adapter_record, open_base, whole_tensors
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import MANIFEST
from orchestrator.checkpoint.run_checkpoints import committed, newest_valid
from orchestrator.checkpoint.storage import AnyPath, locate
from orchestrator.config.compose import read_config
from orchestrator.config.convert import from_dict
from orchestrator.config.schema import ModelConfig, RunConfig, TokenizerConfig
from orchestrator.config.validate import check_stored
from orchestrator.data.model_files import SOURCE_CONFIG_FILE, TOKENIZER_FILE, carried
from orchestrator.data.tokenize import Tokenizer, from_files
from orchestrator.data.tokenizer_files import parse_json
from orchestrator.errors import CheckpointError, ConfigErrors
from orchestrator.models.shapes import adapter_shapes, parameter_shapes
from orchestrator.runs import resume, run_directory
from orchestrator.runs.origin import refuse_foreign
from orchestrator.runs.own_parts import own_shapes

EMBEDDING = "model.embed.weight"
LATEST = "latest"
MEANS = "latest, a run directory, a directory of checkpoints, or a checkpoint (step-...)"


def find_checkpoint(where: str, runs_dir: str, report: Callable[[str], object], damaged: bool = False) -> AnyPath:
    """Return the checkpoint that `where` means: itself, or the newest valid one of a run or of a directory.

    Args:
        where: a path or URL, or `latest`.
        runs_dir: where `latest` looks.
        report: told of each one that is passed over.
        damaged: take the newest one, valid or not.

    Raises:
        CheckpointError: there is none.
    """
    path = locate(where) if where != LATEST else resume.find(LATEST, runs_dir, False, report).directory.parent
    try:
        if (path / MANIFEST).is_file():
            return path
        parent = checkpoints_of(path)
        found = next(iter(committed(parent)), None) if damaged else newest_valid(parent, False, report)
    except OSError as error:
        raise CheckpointError(f"the place cannot be read: {error.strerror or error}", got=where) from None
    if found is None:
        refuse_foreign(path)
        raise CheckpointError(f"no checkpoint found in {where}", got=where, allowed=MEANS)
    return found


def checkpoints_of(path: AnyPath) -> AnyPath:
    """Return the directory of the checkpoints of a run, or `path` itself where it is no run directory.

    Raises:
        ConfigErrors: the run's configuration is of another version.
    """
    if isinstance(path, Path) and (path / run_directory.CONFIG).is_file():
        return run_directory.checkpoints_dir(path, read_config(path / run_directory.CONFIG))
    return path


def model_of(checkpoint: Checkpoint) -> ModelConfig:
    """Return the model whose weights a checkpoint holds, with the size of its vocabulary.

    Args:
        checkpoint: the checkpoint.

    Raises:
        CheckpointError: it holds none, or one of a user's own: what reads checkpoints by themselves knows `Decoder`.
        ConfigErrors: its configuration is of another version.
    """
    if EMBEDDING not in checkpoint.manifest.tensors and adapter_record(checkpoint) is None:
        raise CheckpointError("the checkpoint holds no model of this product", got=checkpoint.directory)
    model = stored_config(checkpoint).model
    if model._target_ is not None:
        raise CheckpointError(
            "the checkpoint holds a model of its user's own, which this knows nothing of",
            got=f"model._target_={model._target_} in {checkpoint.directory}",
            fix=f"train on from it: train resume={checkpoint.directory} model._target_={model._target_}, or a new run: "
            f"train.init_from={checkpoint.directory} with model=... and model._target_=...",
        )
    return holds_model(checkpoint, model)


def stored_config(checkpoint: Checkpoint) -> RunConfig:
    """Return the configuration of the run that wrote a checkpoint, which may be untrusted.

    Args:
        checkpoint: the checkpoint.

    Raises:
        CheckpointError: it is damaged.
        ConfigErrors: it is of another version, or has values that no run can have.
    """
    config = from_dict(RunConfig, checkpoint.config())
    if problems := check_stored(config):
        raise ConfigErrors(problems)
    return config


def holds_model(checkpoint: Checkpoint, model: ModelConfig, base_at: str | None = None) -> ModelConfig:
    """Check that a checkpoint holds every parameter of `model`, by the manifest alone: nothing is built.

    Args:
        checkpoint: the checkpoint.
        model: checked by `config.validate`.
        base_at: where else than it says the weights beneath its adapters may be.

    Returns:
        The model, with the size of the vocabulary that the checkpoint has.

    Raises:
        CheckpointError: the checkpoint holds another model.
    """
    base = open_base(checkpoint, named=base_at, look=False)
    tensors = whole_tensors(checkpoint, base)
    embedding = tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2 or not all(embedding.shape):
        raise CheckpointError("the checkpoint holds no model of this product", got=checkpoint.directory)
    model = replace(model, vocab_size=embedding.shape[0])
    count = 0
    for name, shape in parameter_shapes(model) if model._target_ is None else own_shapes(model).items():
        stored, count = tensors.get(f"model.{name}"), count + 1
        if stored is None or stored.shape != shape:
            raise CheckpointError(
                "the checkpoint does not hold the model that the configuration describes",
                got=f"{f'shape {stored.shape}' if stored else 'nothing'} for model.{name} in {checkpoint.directory}",
                allowed=f"shape {shape}",
                fix="leave model= and model.KEY= to the checkpoint",
            )
    if base is not None:
        _holds_adapters(checkpoint, model)
    others = sum(name.startswith("model.") for name in tensors) - count
    if others:
        raise CheckpointError(
            "the checkpoint does not hold the model that the configuration describes",
            got=f"{others} tensors beside the model's in {checkpoint.directory}",
        )
    return model


def _holds_adapters(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Check that a checkpoint holds the adapters that its configuration describes.

    Raises:
        CheckpointError: it does not.
    """
    lora, stored = stored_config(checkpoint).train.lora, checkpoint.manifest.tensors
    if lora.rank is None or model._target_ is not None:
        return  # a user's own model says itself which matrices it has
    wanted = {f"model.{name}": shape for name, shape in adapter_shapes(model, lora)}
    found = {name: one.shape for name, one in stored.items() if name.startswith("model.")}
    if other := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise CheckpointError(
            "the checkpoint does not hold the adapters that its configuration describes",
            got=f"{found.get(other[0], 'nothing')} for {other[0]} in {checkpoint.directory}",
            allowed=f"{wanted.get(other[0], 'nothing')}",
        )


def files_of(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return the files that travel with the model of a checkpoint, of those that its manifest lists, by name.

    Args:
        checkpoint: the checkpoint.

    Raises:
        CheckpointError: one is larger than such a file may be, or damaged.
    """
    return carried(checkpoint.manifest.files, checkpoint.read)


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer | None:
    """Return the tokenizer that travels with a checkpoint, with the documents that the model was trained on.

    Those of an imported model are what its tokenizer says. Before it was recorded, only the end-of-text token was put.

    Args:
        checkpoint: the checkpoint.

    Raises:
        DataError: it is damaged.
    """
    files, state = files_of(checkpoint), checkpoint.state()
    if TOKENIZER_FILE not in files:
        return None
    record = state.get("documents")
    if record is not None and not isinstance(record, dict):
        raise CheckpointError("the state of the checkpoint is damaged", got=f"documents: {str(record)[:100]}")
    tokenizer = from_files(files, TokenizerConfig() if "imported" in state else None, record)
    if SOURCE_CONFIG_FILE in checkpoint.manifest.files:
        found = parse_json(checkpoint.read(SOURCE_CONFIG_FILE), SOURCE_CONFIG_FILE).get("model_type")
        tokenizer.model_type = found if isinstance(found, str) else None
    return tokenizer
