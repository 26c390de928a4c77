"""Which tensors of a foreign state dict are which weights of a model, and what became of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from orchestrator.checkpoint.writer import DTYPE_NAMES
from orchestrator.config.schema import ModelConfig
from orchestrator.errors import CheckpointError, NonFiniteError, UserError
from orchestrator.interop.foreign_layouts import known_layout, refuse_quantised
from orchestrator.interop.hf_weights import (
    Family,
    embedding_of,
    head_of,
    hf_tensors,
    is_derived,
    our_shapes,
    parts_from_hf,
    without_prefix,
)

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
_OWN_EMBEDDING, _OWN_HEAD = "embed.weight", "head.weight"
_ROWS = 4096  # that are compared or looked at together
_TIED = "equal to the embedding, which it is tied to"
_DERIVED = "follows from the configuration: computed anew"
_OTHER = "no weight of this model: left out"
_FURTHER = "multi-token prediction: left out"
_PREDICTS = re.compile(r"^((?:model\.)?layers\.(\d+)\.)eh_proj\.weight$")


class Parameters(Mapping[str, Tensor]):
    """Parameters, of which those of experts that are stored one by one are put together on access.

    Args:
        parts: parameter -> the tensor, or the tensors of its experts.
    """

    def __init__(self, parts: Mapping[str, Tensor | list[Tensor]]):
        self._parts = parts

    def __getitem__(self, name: str) -> Tensor:
        part = self._parts[name]
        return torch.stack(part) if isinstance(part, list) else part

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def pieces(self, name: str) -> list[Tensor]:
        """Return what a parameter is made of as it is stored: the tensor, or [1, ...] of each expert.

        Args:
            name: of the parameter.
        """
        part = self._parts[name]
        return [one.unsqueeze(0) for one in part] if isinstance(part, list) else [part]


@dataclass(frozen=True)
class FoundWeights:
    """The weights of a model.

    Attributes:
        tensors: every parameter of `Decoder(model)` by name.
        model: as it was described, with its vocabulary, and untied where the file has two different tables.
        fates: what became of each tensor of the source, by its name there.
        taken: of those, the ones that are weights of the model.
        notes: what a user should know.
    """

    tensors: Parameters
    model: ModelConfig
    fates: dict[str, str]
    taken: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass
class _View:
    """The tensors below a prefix, by their names without it.

    Attributes:
        full: name below the prefix -> name in the source.
    """

    given: Mapping[str, Tensor]
    full: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def __contains__(self, name: str) -> bool:
        return name in self.full

    def tensor(self, name: str) -> Tensor:
        return self.given[self.full[name]]


def find_weights(given: Mapping[str, Tensor], model: ModelConfig, family: Family | None) -> FoundWeights:
    """Find our parameters in a state dict with our names or the family's, below whatever prefix.

    Args:
        given: the state dict.
        model: that they are to be of.
        family: whose names they may have; None: ours alone.

    Raises:
        CheckpointError: they are not there, not all of them, of other shapes, or not finite.
    """
    refuse_quantised(given)
    if model.layers > len(given):
        raise known_layout((name, about(given, name)[1]) for name in given) or CheckpointError(
            "the tensors are not those of the configured model", got=f"{len(given)} tensors, {model.layers} layers"
        )
    plain = {_WRAPPERS.sub("", name): name for name in given}
    if len(plain) != len(given):
        twice = next(name for name in given if plain[_WRAPPERS.sub("", name)] != name)
        raise CheckpointError("tensors differ only in what wrappers put into their names", got=twice)
    failure: UserError | None = None
    for anchor, read in _readings(model, family):
        for prefix in sorted({name[: -len(anchor)] for name in plain if _ends_with(name, anchor)}, key=len):
            below = {name[len(prefix) :]: full for name, full in plain.items() if name.startswith(prefix)}
            try:
                found = read(_View(given, below), _with_vocabulary(model, given[below[anchor]]))
            except UserError as error:
                failure = failure or error
                continue
            _refuse_nonfinite(found)
            others = {name: _DERIVED if is_derived(plain) else _OTHER for plain, name in plain.items()}
            return replace(found, fates={**others, **found.fates})
    shapes = ((name, about(given, full)[1]) for name, full in plain.items())
    raise known_layout(shapes) or failure or _no_embedding(given)


def about(given: Mapping[str, Tensor], name: str) -> tuple[str, tuple[int, ...]]:
    """Return the dtype of a tensor, as safetensors names it, and its shape, from a header where there is one.

    Args:
        given: the state dict.
        name: of a tensor.
    """
    if hasattr(given, "about"):
        dtype, shape = given.about(name)
        return str(dtype), tuple(shape)
    return DTYPE_NAMES[given[name].dtype], tuple(given[name].shape)


def _no_embedding(given: Mapping[str, Tensor]) -> CheckpointError:
    return CheckpointError(
        "the source has no embedding by a name that is known",
        got=", ".join(list(given)[:3])[:300] or "no tensors",
        allowed=f"{_OWN_EMBEDDING}, model.embed_tokens.weight, transformer.wte.weight, below any prefix or none",
        fix="rename the tensors to those of transformers, or of this product",
    )


def _readings(
    model: ModelConfig, family: Family | None
) -> Iterator[tuple[str, Callable[[_View, ModelConfig], FoundWeights]]]:
    """Yield what may mark the place of the model in a state dict, and how its names are read there."""
    yield _OWN_EMBEDDING, _own
    if family is None:
        return
    embedding = embedding_of(family)

    def whole(view: _View, model: ModelConfig) -> FoundWeights:
        return _foreign(view, model, family, bare=False)

    def bare(view: _View, model: ModelConfig) -> FoundWeights:
        return _foreign(view, model, family, bare=True)

    yield embedding, whole
    yield without_prefix(embedding, family), bare
    if model.tied_embeddings:
        # Some files name the shared table after the head alone.
        yield head_of(family), whole
        yield head_of(family), bare


def _ends_with(name: str, anchor: str) -> bool:
    return name == anchor or name.endswith(f".{anchor}")


def _with_vocabulary(model: ModelConfig, embedding: Tensor) -> ModelConfig:
    if model.vocab_size == "auto" and (rows := embedding.shape[:1]):
        return replace(model, vocab_size=rows[0])
    return model


def _settle_head(view: _View, model: ModelConfig, embedding: str, head: str) -> ModelConfig:
    """Keep a head apart that is not the embedding, whatever the configuration says: as transformers does."""
    if not (model.tied_embeddings and embedding in view and head in view):
        return model
    if _equal(view.tensor(embedding), view.tensor(head)):
        return model
    view.notes.append(
        f"the configuration says that the embeddings are tied, and the file has a head of its own ({head}): both were "
        "kept, as transformers does, and the model is imported with model.tied_embeddings=false"
    )
    return replace(model, tied_embeddings=False)


def _equal(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape:
        return False
    parts = zip(first.split(_ROWS), second.split(_ROWS), strict=True)
    return all(torch.equal(a.float(), b.float()) for a, b in parts)


def _of_model(names: Iterable[str], wanted: set[str]) -> list[str]:
    """Those that may be weights: an optimizer's state, which has other first words, is not."""
    roots = {name.split(".")[0] for name in wanted}
    return [name for name in names if name.split(".")[0] in roots and not is_derived(name)]


def _own(view: _View, model: ModelConfig) -> FoundWeights:
    model = _settle_head(view, model, _OWN_EMBEDDING, _OWN_HEAD)
    shapes = our_shapes(model)
    chosen = _of_model(view.full, set(shapes) | {_OWN_HEAD})
    fates = {}
    if model.tied_embeddings and _OWN_HEAD in chosen:
        chosen.remove(_OWN_HEAD)
        fates[view.full[_OWN_HEAD]] = _TIED
    problems = [f"missing: {name}" for name in shapes if name not in view]
    problems += [f"left over: {name}" for name in chosen if name not in shapes]
    tensors = {name: view.tensor(name) for name in shapes if name in view}
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
    taken = {view.full[name]: f"model.{name}" for name in shapes}
    return FoundWeights(Parameters(tensors), model, {**fates, **taken}, tuple(taken), tuple(view.notes))


def _foreign(view: _View, model: ModelConfig, family: Family, bare: bool) -> FoundWeights:
    def spelled(name: str) -> str:
        return without_prefix(name, family) if bare else name

    embedding, head = spelled(embedding_of(family)), head_of(family)
    model = _settle_head(view, model, embedding, head)
    tensors = {spelled(tensor.name): tensor for tensor in hf_tensors(family, model, view.full)}
    predicting = _predicting_layers(view.full, family, model.layers)
    chosen = [name for name in _of_model(view.full, set(tensors) | {head}) if not name.startswith(predicting)]
    ours = parts_from_hf({name: view.tensor(name) for name in chosen}, family, model)
    parts = {name: tensor.described for name, tensor in tensors.items()}
    fates = {view.full[name]: parts[name] for name in chosen if name in parts}
    taken = list(fates)
    if predicting:
        fates |= {full: _FURTHER for name, full in view.full.items() if name.startswith(predicting)}
        layers = f"{len(predicting)} layer{'s' if len(predicting) > 1 else ''}"
        view.notes.append(f"{layers} of multi-token prediction are left out: an export has none")
    if model.tied_embeddings and head in view:
        fates[view.full[head]] = _TIED if embedding in view else f"model.{_OWN_EMBEDDING}, which is tied to the head"
        if embedding not in view:
            taken.append(view.full[head])
    return FoundWeights(Parameters(ours), model, fates, tuple(taken), tuple(view.notes))


def _predicting_layers(names: Iterable[str], family: Family, layers: int) -> tuple[str, ...]:
    """Return the prefixes of DeepSeek's layers for multi-token prediction, which come behind those of the model."""
    if family != "deepseek_v3":
        return ()
    found = (_PREDICTS.search(name) for name in names)
    return tuple(match.group(1) for match in found if match and int(match.group(2)) >= layers)


def _refuse_nonfinite(found: FoundWeights) -> None:
    """Name the weights that are not numbers: nothing trained on them would be.

    Raises:
        NonFiniteError: there are some.
    """
    broken = []
    for name in found.tensors:
        pieces = found.tensors.pieces(name)
        count = sum(int(part.numel() - part.isfinite().sum()) for piece in pieces for part in _parts(piece))
        if count:
            broken.append(f"model.{name} ({count:,} of {sum(piece.numel() for piece in pieces):,})")
    if broken:
        more = f" and {len(broken) - 6} more tensors" if len(broken) > 6 else ""
        raise NonFiniteError(
            "weights are not finite (NaN or infinite)",
            got="; ".join(broken[:6]) + more,
            fix="download them again, or take an older checkpoint of whoever trained them",
        )


def _parts(tensor: Tensor) -> Iterable[Tensor]:
    return tensor.split(_ROWS) if tensor.ndim else [tensor]
