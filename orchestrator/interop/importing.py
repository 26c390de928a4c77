"""Weights of other software as a checkpoint to train on from: Hugging Face directories, and formats that are pickle."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from orchestrator.checkpoint.format import MANIFEST
from orchestrator.checkpoint.writer import DTYPE_NAMES, Begun, Contents, write
from orchestrator.config.compose import compose
from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import ModelConfig, RunConfig, TrainConfig
from orchestrator.config.validate import validate
from orchestrator.data.model_files import GENERATION_FILE, TOKENIZER_FILE, collect
from orchestrator.data.tokenize import from_files, load_tokenizer
from orchestrator.distributed.exchange import SingleProcess
from orchestrator.errors import CheckpointError, DataError, UserError
from orchestrator.interop.foreign_weights import FoundWeights, about, find_weights
from orchestrator.interop.hf_config import Description, family_of, from_hf_config
from orchestrator.interop.hf_files import PICKLED, PICKLED_INDEX, HFTensors, read_json
from orchestrator.interop.hf_layers import layerwise
from orchestrator.interop.hf_moe import computed
from orchestrator.interop.hf_weights import Family
from orchestrator.interop.import_report import ImportReport
from orchestrator.interop.logit_check import LogitCheck, check_logits
from orchestrator.interop.mxfp4 import Mxfp4Tensors, is_mxfp4
from orchestrator.interop.outputs import written_aside
from orchestrator.models.layers import resolved_head_dim
from orchestrator.runs.origin import REPORT, SOURCE_CONFIG
from orchestrator.runs.provenance import software
from orchestrator.sharding.shard import Shard

Format = Literal["hf", "dcp", "ckpt"]
CheckLogits = Literal["auto", "true", "false"]
CONFIG_FILE = "config.json"
# Of a model's description, what changes nothing that it computes.
_OF_TRAINING = {"name", "init_std", "init_depth", "init_cutoff", "embedding_init_std", "head_init_std", "dropout"}
_LENGTHS = {"rope": {"max_seq_len"}, "learned": set[str]()}


@dataclass(frozen=True)
class Described:
    """The description of an imported model.

    Attributes:
        model: the model.
        family: where transformers has one.
        config: the `config.json` that says so, and where it lies.
        config_file: path of the `config.json`; None: none.
        fates: what became of its keys.
        notes: what a user should know.
    """

    model: ModelConfig
    family: Family | None
    config: Mapping[str, Any] | None = None
    config_file: Path | None = None
    fates: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Imported:
    """The result of an import.

    Attributes:
        format: of the source.
        model: the model.
        parameters: elements of the weights.
        dtypes: of the weights.
        left_out: tensors of the source that are no weights of the model.
        tokenizer: whether one came along.
        report: what became of each tensor and of each key of `config.json`.
        no_tokenizer: why there is none, where that is known.
    """

    format: Format
    model: ModelConfig
    parameters: int
    dtypes: tuple[str, ...]
    left_out: int
    tokenizer: bool
    report: ImportReport
    no_tokenizer: str = ""


def detect_format(source: Path) -> Format:
    """Which format lies at `source`.

    Raises:
        CheckpointError: none that is known.
    """
    if source.is_file():
        if source.suffix in (".safetensors", ".gguf"):
            raise CheckpointError(
                f"this is one file of a model ({source.suffix})",
                got=source,
                allowed="a directory with config.json and the weights in safetensors",
                fix=f"give its directory: {source.parent}" if source.suffix == ".safetensors" else None,
            )
        return "ckpt"
    if (source / MANIFEST).exists():
        raise CheckpointError(
            "this is a checkpoint of this product already",
            got=source,
            fix=f"train on from it: python -m orchestrator train train.init_from={source}",
        )
    if (source / ".metadata").exists():
        return "dcp"
    if source.is_dir():
        pickled = any((source / name).exists() for name in (PICKLED, PICKLED_INDEX))
        return "ckpt" if pickled and not any(source.glob("*.safetensors*")) else "hf"
    raise CheckpointError(
        "there is nothing to import here",
        got=source,
        allowed="a Hugging Face directory, a torch.distributed.checkpoint directory, or a file of torch.save (.ckpt)",
    )


def import_weights(
    source: Path,
    output: str,
    format: Format,
    model: str | None = None,
    config: str | None = None,
    tokenizer: str | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
    ignore_keys: tuple[str, ...] = (),
    logits: CheckLogits = "auto",
) -> Imported:
    """Make a checkpoint of step 0 with the weights alone, each as it is stored in the source.

    They are mapped from their files and written one by one; those of a DCP directory are all in memory meanwhile.

    Args:
        source: of the format that `detect_format` says. The caller has asked the user, where that is pickle.
        output: the checkpoint's directory, new.
        format: of the source, as `detect_format` returns it.
        model: an option of the `model` group that describes the weights.
        config: or a `config.json` that does, or its directory.
        tokenizer: a `tokenizer.json` or its directory; by default what lies beside the weights.
        progress: told bytes written and bytes in all.
        ignore_keys: of `config.json`, which the user says to change nothing that is computed.
        logits: whether they are compared with those of transformers; `auto`: where it is installed and memory allows.

    Raises:
        UserError: what is missing, damaged, or of a model that this product cannot compute.
    """
    described = describe(source, model, config, ignore_keys)
    given = _open(source, format, described.config is not None and is_mxfp4(described.config))
    found = find_weights(given, described.model, described.family)
    files, why = travelling_files(tokenizer, source if source.is_dir() else source.parent, found.model)
    checked = _check_logits(source, format, described, found, logits)
    report = _report(source, format, described, given, found, checked)
    files[REPORT] = report.to_json()
    if described.config_file is not None:
        files[SOURCE_CONFIG] = described.config_file.read_bytes()
    pieces = [piece for name in found.tensors for piece in found.tensors.pieces(name)]
    dtypes = tuple(sorted({DTYPE_NAMES[piece.dtype] for piece in pieces}))
    _write(output, found, report, files, dtypes, progress)
    parameters = sum(piece.numel() for piece in pieces)
    has_tokenizer, left_out = TOKENIZER_FILE in files, len(given) - len(found.taken)
    return Imported(format, found.model, parameters, dtypes, left_out, has_tokenizer, report, why)


def _write(
    output: str,
    found: FoundWeights,
    report: ImportReport,
    files: Mapping[str, bytes],
    dtypes: tuple[str, ...],
    progress: Callable[[int, int], object],
) -> None:
    shards = list(_shards(found))
    origin = {"format": report.format, "source": report.source, "family": report.family, "dtypes": list(dtypes)}
    state = {
        "step": 0,
        "imported": origin,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "software": software(),
    }
    contents = Contents(state, {"name": found.model.name, "model": to_dict(found.model)}, files)
    total = sum(shard.data.numel() * shard.data.element_size() for shard in shards)
    with written_aside(output) as folder, _watched(folder / "rank-00000.safetensors", total, progress):
        write(Begun(folder, "import"), 0, shards, SingleProcess(), contents)


def _shards(found: FoundWeights) -> Iterator[Shard]:
    """Experts that are stored one by one are written so, too: nothing is put together in memory."""
    for name in found.tensors:
        pieces = found.tensors.pieces(name)
        shape = (sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:]) if len(pieces) > 1 else pieces[0].shape
        for number, piece in enumerate(pieces):
            first = [slice(number, number + 1)] if len(pieces) > 1 else []
            rest = [slice(0, size) for size in piece.shape[len(first) :]]
            yield Shard(f"model.{name}", tuple(shape), (*first, *rest), piece)


def _open(source: Path, format: Format, mxfp4: bool = False) -> Mapping[str, torch.Tensor]:
    if format == "hf":
        stored = HFTensors(source)
        return Mxfp4Tensors(stored) if mxfp4 else stored
    from orchestrator.interop.pickle_reader import DcpTensors, read_state_dict

    return DcpTensors(source) if format == "dcp" else read_state_dict(source)


def describe(
    source: Path, model: str | None = None, config: str | None = None, ignore_keys: tuple[str, ...] = ()
) -> Described:
    """Return the model that the weights at `source` are of. No weight file is opened.

    Args:
        source: of the weights.
        model: an option of the `model` group that describes them.
        config: or a `config.json` that does, or its directory.
        ignore_keys: of `config.json`, which the user says to change nothing that is computed.

    Raises:
        UserError: nothing describes it, it cannot be computed here, or a preset and `config.json` say different things.
    """
    beside = source if source.is_dir() else source.parent
    file = Path(config).expanduser() if config else beside / CONFIG_FILE
    file = file / CONFIG_FILE if file.is_dir() else file
    if model is not None:
        return _of_preset(model, file, frozenset(ignore_keys))
    if not file.is_file() and not file.is_symlink():
        raise CheckpointError(
            "nothing says which model these weights are of",
            got=f"no {file}",
            fix="give model=PRESET (an option of the model group, as in train), or config=PATH of a config.json",
        )
    return _of_config(file, frozenset(ignore_keys))


def _of_config(file: Path, ignored: frozenset[str]) -> Described:
    content = read_json(file)
    found = from_hf_config(content, ignored)
    try:
        described = from_dict(ModelConfig, {"name": _name(file.parent), **found.fields})
    except UserError as error:
        raise CheckpointError(f"{file} does not describe a model: {error}") from None
    # The smallest batch: only the model is in question.
    problems = validate(RunConfig(model=described, train=TrainConfig(seq_len=2, global_batch_tokens=2)))
    if problems:
        raise CheckpointError(f"{file} does not describe a model: {problems[0]}")
    return Described(described, found.family, content, file.resolve(), found.fates, _notes(found, content, file))


def _notes(found: Description, content: Mapping[str, Any], file: Path) -> tuple[str, ...]:
    notes = list(found.notes)
    if file.is_symlink():
        notes.append(f"{file.name} is a link to {file.resolve()}")
    if content.get("auto_map"):
        notes.append("config.json names code of its own (auto_map), which is not run: the class of transformers counts")
    return tuple(notes)


def _of_preset(model: str, file: Path, ignored: frozenset[str]) -> Described:
    """Describe the model by a preset, checked against the `config.json` beside the weights, where there is one."""
    described = compose([f"model={model}"]).config.model
    family: Family | None = None
    with suppress(CheckpointError):
        family = family_of(described)
    if not file.is_file():
        scaling = described.rope_scaling
        scaled = f"{scaling.kind} x{scaling.factor:g}" if scaling.kind != "none" else "not scaled"
        note = f"model={model} has rope_theta={described.rope_theta:g}, {scaled}: weights cannot show if so"
        return Described(described, family, notes=(note,) if described.positions == "rope" else ())
    beside = _of_config(file, ignored)
    first, second = (_computed(one) for one in (described, beside.model))
    differences = [
        f"{key}={ours}, there {second[key]}" for key, ours in first.items() if ours not in ("auto", second[key])
    ]
    if differences:
        raise CheckpointError(
            f"model={model} is not the model that config.json describes",
            got="; ".join(differences)[:500],
            fix=f"leave out model=, so that {file} counts; or move that file away if it is wrong",
        )
    return replace(beside, model=replace(beside.model, name=described.name))


def _computed(model: ModelConfig) -> dict[str, Any]:
    """Return what decides what a model computes: not how it is trained, nor how long a text it may get."""
    fields = {**vars(model), "head_dim": resolved_head_dim(model), "moe": computed(model), **layerwise(model)}
    return {key: value for key, value in fields.items() if key not in _OF_TRAINING | _LENGTHS[model.positions]}


def _name(folder: Path) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", folder.resolve().name) or "imported"


def _check_logits(
    source: Path, format: Format, described: Described, found: FoundWeights, wanted: CheckLogits
) -> LogitCheck:
    if wanted == "false":
        return LogitCheck(None, "not checked: check_logits=false")
    if format != "hf" or described.config_file is None:
        reason = "the weights are pickle" if format != "hf" else "there is no config.json"
        if wanted == "true":
            raise CheckpointError(f"check_logits=true, and transformers cannot load this: {reason}", got=source)
        return LogitCheck(None, f"not checked: {reason}, and transformers was not asked to load it")
    return check_logits(source, described.config_file, found.tensors, found.model, wanted == "true")


def _report(
    source: Path,
    format: Format,
    described: Described,
    given: Mapping[str, torch.Tensor],
    found: FoundWeights,
    checked: LogitCheck,
) -> ImportReport:
    tensors = {name: (*about(given, name), found.fates[name]) for name in given}
    skipped: Mapping[str, str] = getattr(given, "skipped", {})
    tensors |= {name: ("", (), fate) for name, fate in skipped.items() if name not in tensors}
    config, fates = described.config or {}, dict(described.fates or {})
    if found.model.tied_embeddings != described.model.tied_embeddings and "tie_word_embeddings" in fates:
        fates["tie_word_embeddings"] = "model.tied_embeddings=False: the file has a head of its own"
    return ImportReport(
        str(source),
        format,
        described.family,
        tuple(getattr(given, "layouts", ())),
        tensors,
        found.taken,
        {key: (config[key], fate) for key, fate in fates.items()},
        (*described.notes, *getattr(given, "notes", ()), *found.notes),
        checked.text,
        checked.difference,
    )


def travelling_files(tokenizer: str | None, beside: Path, model: ModelConfig) -> tuple[dict[str, bytes], str]:
    """Return the files that travel along, their tokenizer checked against the model; and why there is none.

    Args:
        tokenizer: a `tokenizer.json` or its directory; None: what lies in `beside`.
        beside: directory of the weights.
        model: that they are of.

    Raises:
        CheckpointError: the tokenizer cannot be read, or has more tokens than the model.
    """
    try:
        files, why = collect(beside), ""
        if tokenizer is not None:
            generation = {name: content for name, content in files.items() if name == GENERATION_FILE}
            files = {**load_tokenizer(tokenizer).files, **generation}
        elif TOKENIZER_FILE not in files:
            try:
                files |= load_tokenizer(beside).files
            except DataError as error:
                why = f"{error.got}; {error.fix}" if error.fix else str(error.got)
    except OSError as error:
        raise CheckpointError(f"the tokenizer cannot be read: {error.strerror}", got=beside) from None
    size = from_files(files).vocab_size if TOKENIZER_FILE in files else 0
    if model.vocab_size != "auto" and size > model.vocab_size:
        raise CheckpointError(
            "the tokenizer has more tokens than the model",
            got=f"{size} in {tokenizer or beside}",
            allowed=f"at most {model.vocab_size}",
            fix="give the model's own tokenizer: tokenizer=PATH",
        )
    return files, why


@contextmanager
def _watched(file: Path, total: int, progress: Callable[[int, int], object]) -> Iterator[None]:
    """Report how a file grows while the block writes it."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            with suppress(OSError):  # not there yet, or not any more
                progress(file.stat().st_size, total)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    progress(total, total)
