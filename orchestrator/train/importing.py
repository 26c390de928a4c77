"""Weights of other software as a checkpoint to train on from: Hugging Face directories, and formats that are pickle."""

from __future__ import annotations

import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from orchestrator.checkpoint.format import MANIFEST, read_bounded
from orchestrator.checkpoint.hf_files import map_tensors, read_json
from orchestrator.checkpoint.outputs import written_aside
from orchestrator.checkpoint.peers import Alone
from orchestrator.checkpoint.writer import DTYPE_NAMES, Begun, Contents, write
from orchestrator.config.compose import compose
from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import ModelConfig, RunConfig, TrainConfig
from orchestrator.config.validate import validate
from orchestrator.data.tokenize import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, load_tokenizer
from orchestrator.errors import CheckpointError, UserError
from orchestrator.models.hf import Family, from_hf, hf_tensors, our_shapes
from orchestrator.models.hf_config import family_of, from_hf_config
from orchestrator.sharding.shard import Shard
from orchestrator.train.exporting import CARRIED
from orchestrator.train.software import software

Format = Literal["hf", "dcp", "ckpt"]
CONFIG_FILE = "config.json"
_MAX_CARRIED_BYTES = 1 << 26
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
_EMBEDDINGS = ("embed.weight", "model.embed_tokens.weight", "transformer.wte.weight", "wte.weight")


@dataclass(frozen=True)
class Imported:
    """What was read.

    Attributes:
        left_out: tensors of the source that are no weights of the model.
        tokenizer: whether one came along.
    """

    format: Format
    model: ModelConfig
    parameters: int
    dtypes: tuple[str, ...]
    left_out: int
    tokenizer: bool


def detect_format(source: Path) -> Format:
    """Which format lies at `source`.

    Raises:
        CheckpointError: none that is known.
    """
    if source.is_file():
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
        return "hf"
    raise CheckpointError(
        "there is nothing to import here",
        got=source,
        allowed="a Hugging Face directory, a torch.distributed.checkpoint directory, or a .ckpt file",
    )


def import_weights(
    source: Path,
    output: str,
    format: Format,
    model: str | None = None,
    config: str | None = None,
    tokenizer: str | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Imported:
    """Make a checkpoint of step 0 with the weights alone, each as it is stored in the source.

    They are mapped from their files and written one by one; those of a DCP directory are all in memory meanwhile.

    Args:
        source: of the format that `detect_format` says. The caller has asked the user, where that is pickle.
        output: the checkpoint's directory, new.
        model: an option of the `model` group that describes the weights.
        config: or a `config.json` that does, or its directory.
        tokenizer: a `tokenizer.json` or its directory; by default what lies beside the weights.
        progress: told bytes written and bytes in all.

    Raises:
        UserError: what is missing, damaged, or of a model that this product cannot compute.
    """
    beside = source if source.is_dir() else source.parent
    given = _open(source, format)
    described, family = _describe(beside, model, config)
    weights, used, described = _find_weights(given, described, family)
    files = _tokenizer_files(tokenizer, beside, described)
    shards = [
        Shard(f"model.{name}", tuple(tensor.shape), tuple(slice(0, size) for size in tensor.shape), tensor)
        for name, tensor in weights.items()
    ]
    dtypes = sorted({DTYPE_NAMES[tensor.dtype] for tensor in weights.values()})
    state = {
        "step": 0,
        "imported": {"format": format, "source": str(source), "family": family, "dtypes": dtypes},
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "software": software(),
    }
    contents = Contents(state, {"name": described.name, "model": to_dict(described)}, files)
    total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    with written_aside(output) as folder, _watched(folder / "rank-00000.safetensors", total, progress):
        write(Begun(folder, "import"), 0, shards, Alone(), contents)
    parameters = sum(tensor.numel() for tensor in weights.values())
    return Imported(format, described, parameters, tuple(dtypes), len(given) - used, TOKENIZER_FILE in files)


def _open(source: Path, format: Format) -> Mapping[str, torch.Tensor]:
    if format == "hf":
        return map_tensors(source)
    from orchestrator.checkpoint.foreign_pickle import DcpTensors, read_state_dict

    return DcpTensors(source) if format == "dcp" else read_state_dict(source)


def _describe(beside: Path, model: str | None, config: str | None) -> tuple[ModelConfig, Family | None]:
    """The model, and its family where transformers has one."""
    if model is not None:
        described = compose([f"model={model}"]).config.model
        try:
            return described, family_of(described)
        except CheckpointError:
            return described, None
    file = Path(config).expanduser() if config else beside / CONFIG_FILE
    file = file / CONFIG_FILE if file.is_dir() else file
    if not file.is_file():
        raise CheckpointError(
            "nothing says which model these weights are of",
            got=f"no {file}",
            fix="give model=PRESET (an option of the model group, as in train), or config=PATH of a config.json",
        )
    family, fields = from_hf_config(read_json(file))
    try:
        described = from_dict(ModelConfig, {"name": _name(file.parent), **fields})
    except UserError as error:
        raise CheckpointError(f"{file} does not describe a model: {error}") from None
    # The smallest batch: only the model is in question.
    problems = validate(RunConfig(model=described, train=TrainConfig(seq_len=2, global_batch_tokens=2)))
    if problems:
        raise CheckpointError(f"{file} does not describe a model: {problems[0]}")
    return described, family


def _name(folder: Path) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", folder.resolve().name) or "imported"


def _find_weights(
    given: Mapping[str, torch.Tensor], model: ModelConfig, family: Family | None
) -> tuple[dict[str, torch.Tensor], int, ModelConfig]:
    """Our parameters from a state dict with our names or the family's, below whatever prefix.

    Returns:
        The parameters by name, how many tensors of the state dict they took, and the model with its vocabulary.

    Raises:
        CheckpointError: they are not there, or not all of them, or of other shapes.
    """
    if model.layers > len(given):
        raise CheckpointError(
            "the tensors are not those of the configured model", got=f"{len(given)} tensors, {model.layers} layers"
        )
    plain = {_WRAPPERS.sub("", name): name for name in given}
    if len(plain) != len(given):
        twice = next(name for name in given if plain[_WRAPPERS.sub("", name)] != name)
        raise CheckpointError("tensors differ only in what wrappers put into their names", got=twice)
    failure = None
    for anchor in _EMBEDDINGS:
        if anchor != _EMBEDDINGS[0] and family is None:
            continue
        for prefix in sorted({name[: -len(anchor)] for name in plain if _ends_with(name, anchor)}, key=len):
            below = {name[len(prefix) :]: full for name, full in plain.items() if name.startswith(prefix)}
            if model.vocab_size == "auto" and (rows := given[below[anchor]].shape[:1]):
                model = replace(model, vocab_size=rows[0])
            try:
                if anchor == _EMBEDDINGS[0]:
                    tensors = _own(given, below, model)
                    return tensors, len(tensors), model
                assert family is not None
                chosen = _foreign_names(below, family, model)
                return from_hf({name: given[full] for name, full in chosen.items()}, family, model), len(chosen), model
            except UserError as error:
                failure = failure or error
    raise failure or CheckpointError(
        "the source has no embedding by a name that is known",
        got=", ".join(list(given)[:3])[:300] or "no tensors",
        allowed=f"{', '.join(_EMBEDDINGS)}, below any prefix",
        fix="rename the tensors to those of transformers, or of this product",
    )


def _ends_with(name: str, anchor: str) -> bool:
    return name == anchor or name.endswith(f".{anchor}")


def _of_model(below: Mapping[str, str], wanted: set[str]) -> dict[str, str]:
    """Those that may be weights: an optimizer's state, which has other first words, is not."""
    roots = {name.split(".")[0] for name in wanted}
    return {name: full for name, full in below.items() if name.split(".")[0] in roots}


def _own(given: Mapping[str, torch.Tensor], below: Mapping[str, str], model: ModelConfig) -> dict[str, torch.Tensor]:
    shapes = our_shapes(model)
    chosen = _of_model(below, set(shapes) | {"head.weight"})
    if model.tied_embeddings:
        chosen.pop("head.weight", None)
    problems = [f"missing: {name}" for name in shapes if name not in chosen]
    problems += [f"left over: {name}" for name in chosen if name not in shapes]
    tensors = {name: given[chosen[name]] for name in shapes if name in chosen}
    problems += [
        f"{name}: {tuple(tensor.shape)}, wanted {shapes[name]}"
        for name, tensor in tensors.items()
        if tuple(tensor.shape) != shapes[name]
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            "the tensors are not those of the configured model",
            got="; ".join(problems[:3]) + more,
            fix="check model= against the run that wrote them",
        )
    return tensors


def _foreign_names(below: Mapping[str, str], family: Family, model: ModelConfig) -> dict[str, str]:
    wanted = {tensor.name for tensor in hf_tensors(family, model)} | {"lm_head.weight"}
    if "wte.weight" in below:
        # GPT-2 files on the hub were saved from the inner model, without its prefix.
        wanted |= {name.removeprefix("transformer.") for name in wanted}
    return _of_model(below, wanted)


def _tokenizer_files(tokenizer: str | None, beside: Path, model: ModelConfig) -> dict[str, bytes]:
    """What travels along, after it was seen to be a tokenizer that fits the model."""
    place = Path(tokenizer).expanduser() if tokenizer else beside
    folder, file = (place, place / TOKENIZER_FILE) if place.is_dir() else (place.parent, place)
    if not file.is_file():
        if tokenizer:
            raise CheckpointError("there is no tokenizer here", got=place, allowed="a tokenizer.json or its directory")
        return {}
    paths = {TOKENIZER_FILE: file, **{name: folder / name for name in CARRIED if name != TOKENIZER_FILE}}
    try:
        files = {name: read_bounded(path, _MAX_CARRIED_BYTES) for name, path in paths.items() if path.is_file()}
    except OSError as error:
        raise CheckpointError(f"the tokenizer cannot be read: {error.strerror}", got=folder) from None
    with tempfile.TemporaryDirectory() as copy:
        for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE):
            if name in files:
                Path(copy, name).write_bytes(files[name])
        size = load_tokenizer(copy).vocab_size
    if model.vocab_size != "auto" and size > model.vocab_size:
        raise CheckpointError(
            "the tokenizer has more tokens than the model",
            got=f"{size} in {file}",
            allowed=f"at most {model.vocab_size}",
            fix="give the model's own tokenizer: tokenizer=PATH",
        )
    return files


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
