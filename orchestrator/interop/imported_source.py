"""Weights of other software as the source of a run: imported once, and found again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import MANIFEST
from orchestrator.config.compose import Composed
from orchestrator.data.store_cache import cached, key_of
from orchestrator.errors import CheckpointError, DamagedDataError, UserError
from orchestrator.output import tell
from orchestrator.runs.provenance import software

PREFIX = "hf:"
FOLDER = ".imported"  # below runs_dir
_CONFIG, _ADAPTER_CONFIG, _STEP = "config.json", "adapter_config.json", "step-00000000"


def is_foreign(where: str) -> bool:
    """Whether `where` names a Hugging Face directory: by `hf:`, or as there is one and no checkpoint.

    Args:
        where: as `train.init_from` has it.
    """
    if where.startswith(PREFIX):
        return True
    path = Path(where).expanduser()
    try:
        return (path / _CONFIG).is_file() and not (path / MANIFEST).exists() and any(path.glob("*.safetensors"))
    except (OSError, ValueError):
        return False


def import_once(where: str, runs_dir: str, say: bool = True) -> Path:
    """Return the checkpoint of a Hugging Face directory: imported now, or when it was asked for before.

    It lies below `runs_dir`, by name and by names, sizes and times of the directory's files: of several processes one
    imports and the others wait.

    Args:
        where: `hf:DIRECTORY`, or the directory.
        runs_dir: of runs.
        say: tell what is done.

    Raises:
        CheckpointError: there is no such directory, or it cannot be imported.
    """
    source = Path(where.removeprefix(PREFIX)).expanduser().resolve()
    if (source / _ADAPTER_CONFIG).is_file() and not (source / _CONFIG).is_file():
        raise CheckpointError(
            "the directory holds adapters, and not the weights that they lie beside",
            got=source,
            fix=f"import them: checkpoint import {source} output=DIRECTORY base=CHECKPOINT OF THEIR MODEL",
        )
    if not (source / _CONFIG).is_file():
        raise CheckpointError(
            "there is no Hugging Face directory here",
            got=source,
            allowed=f"a directory with {_CONFIG} and the weights in safetensors",
            fix="download the model, and give its directory: train.init_from=hf:DIRECTORY",
        )
    try:
        files = [
            [path.name, stat.st_size, stat.st_mtime_ns]
            for path in sorted(source.iterdir())
            if path.is_file() and (stat := path.stat())
        ]
    except OSError as error:
        raise CheckpointError(f"the directory cannot be read: {error.strerror or error}", got=source) from None
    name = "".join(char if char.isalnum() or char in "._-" else "_" for char in source.name)[:60] or "model"
    key = f"{name}-{key_of(files=files, version=software()['orchestrator'])[:12]}"

    def load(folder: Path) -> Path:
        try:
            Checkpoint(folder / _STEP)
        except UserError as error:
            raise DamagedDataError(error.what, got=error.got) from None
        return folder / _STEP

    found = cached(Path(runs_dir).expanduser(), FOLDER, key, load, _importing(source, say), say)
    if say:
        tell(f"weights    {source}, imported into {found}")
    return found


def _importing(source: Path, say: bool) -> Callable[[Path], None]:
    """Return what imports `source` into an empty folder."""

    def build(folder: Path) -> None:
        from orchestrator.interop.importing import detect_format, import_weights

        kind = detect_format(source)
        if kind != "hf":
            raise CheckpointError(
                "these weights are pickle, which is read where a user allows it",
                got=source,
                allowed="weights in safetensors",
                fix=f"checkpoint import {source} output=DIRECTORY asks; then train.init_from=DIRECTORY",
            )
        found = import_weights(source, str(folder / _STEP), kind)
        for line in found.report.summary() if say else ():
            tell(f"import     {''.join(char if char.isprintable() else '?' for char in line)}")

    return build


def with_imported(composed: Composed, say: bool = True) -> Composed:
    """Return a command line whose `train.init_from` is a checkpoint, also where it names a Hugging Face directory.

    Args:
        composed: the command line.
        say: tell what is done.

    Raises:
        CheckpointError: as `import_once`.
    """
    config, where = composed.config, composed.config.train.init_from
    if where is None or not is_foreign(where):
        return composed
    found = str(import_once(where, config.runs_dir, say).resolve())
    return replace(composed, config=replace(config, train=replace(config.train, init_from=found)))
