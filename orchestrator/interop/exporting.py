"""A checkpoint's weights for other software."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from orchestrator.checkpoint.adapters import open_base, whole_tensors
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.finite import describe_nonfinite, finite_flags
from orchestrator.checkpoint.format import parse_json
from orchestrator.checkpoint.merged_weights import weights_reader
from orchestrator.checkpoint.reader import DTYPES, Reader
from orchestrator.checkpoint.storage import write_file
from orchestrator.checkpoint.writer import DTYPE_NAMES
from orchestrator.config.schema import ModelConfig
from orchestrator.data.as_trained import as_trained
from orchestrator.data.model_files import TOKENIZER_FILE, as_transformers_names
from orchestrator.errors import CheckpointError, NonFiniteError
from orchestrator.interop.hf_config import family_of, from_hf_config
from orchestrator.interop.hf_config_write import to_hf_config
from orchestrator.interop.hf_files import FileLayout
from orchestrator.interop.hf_files_write import Spec, write_tensors
from orchestrator.interop.hf_tensor import HFTensor
from orchestrator.interop.hf_weights import hf_tensors, our_shapes
from orchestrator.interop.import_report import read_layouts
from orchestrator.interop.outputs import written_aside
from orchestrator.runs.origin import REPORT, SOURCE_CONFIG
from orchestrator.runs.stored_model import files_of, model_of, tokenizer_of

Dtype = Literal["stored", "fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# transformers 5 splits text in this way for any tokenizer beside a model of type qwen2, whatever tokenizer.json says.
_QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"


@dataclass(frozen=True)
class Exported:
    """The result of `export_hf`.

    Attributes:
        loader: class of transformers that loads it.
        tokenizer: whether there is one.
        note: what to mind when it is loaded, if anything.
    """

    loader: str
    tokenizer: bool
    note: str = ""


def export_hf(
    checkpoint: Checkpoint, output: str, dtype: Dtype, max_file_bytes: int, progress: Callable[[int], object]
) -> Exported:
    """Write what `transformers.AutoModelForCausalLM.from_pretrained` loads, a tensor at a time.

    Args:
        checkpoint: the checkpoint.
        output: a new directory.
        dtype: of the written weights; `stored` keeps each one's own.
        max_file_bytes: size of a file, unless one tensor is larger.
        progress: told the bytes of each tensor that was written.

    Raises:
        CheckpointError: no class of transformers computes this model, or the output is in use or cannot be written.
        NonFiniteError: a weight is not finite, or too large for `dtype`.
    """
    model = model_of(checkpoint)
    original = _source_config(checkpoint)
    family = family_of(model, original["model_type"] if original else None)
    layouts = _layouts(checkpoint)
    came = [name for one in layouts for name in one.tensors]
    tensors = {tensor.name: tensor for tensor in hf_tensors(family, model, came)}
    base = open_base(checkpoint)
    reader = weights_reader(checkpoint, base)
    dtypes, model_shapes = _dtypes(checkpoint, base, model, dtype), our_shapes(model)
    specs = [Spec(name, DTYPE_NAMES[_common(tensor, dtypes)], tensor.shape) for name, tensor in tensors.items()]

    def produce(spec: Spec) -> torch.Tensor:
        return _produce(reader, tensors[spec.name], model_shapes, DTYPES[spec.dtype])

    tokenizer, files = tokenizer_of(checkpoint), files_of(checkpoint)
    notes: list[str] = []
    if tokenizer:
        files, notes = as_trained(files, tokenizer)
    stored_as = str(DTYPES[max(specs, key=lambda spec: spec.bytes).dtype]).removeprefix("torch.")
    config = to_hf_config(model, family, tokenizer.eos_id if tokenizer else None, stored_as, original)
    with written_aside(output) as folder:
        write_tensors(folder, specs, produce, max_file_bytes, progress, layouts)
        for name, content in as_transformers_names(files).items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_file(folder / name, [content])
        write_file(folder / "config.json", [json.dumps(config, indent=2).encode() + b"\n"])
    if tokenizer:
        notes.append(_tokenizer_note(checkpoint, str(config["model_type"])))
    if tokenizer and tokenizer.is_nameless:
        notes = ["nobody has named the tokenizer of the training data: tokenizer.json gives ids names, and no text ids"]
    return Exported(str(config["architectures"][0]), tokenizer is not None, "; ".join(filter(None, notes)))


def _source_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the `config.json` that the model was imported with, or None.

    Raises:
        CheckpointError: it is none that an import would have taken.
    """
    if SOURCE_CONFIG not in checkpoint.manifest.files:
        return None
    try:
        config = parse_json(checkpoint.read(SOURCE_CONFIG))
        from_hf_config(config, frozenset(config))
    except (ValueError, TypeError, AttributeError, RecursionError, CheckpointError) as error:
        raise CheckpointError(
            f"the config.json that travels with the checkpoint cannot be read: {error}"[:400],
            got=checkpoint.directory / SOURCE_CONFIG,
        ) from None
    return dict(config)


def _layouts(checkpoint: Checkpoint) -> tuple[FileLayout, ...]:
    """Return the files that an imported model came in."""
    return read_layouts(checkpoint.read(REPORT)) if REPORT in checkpoint.manifest.files else ()


def _tokenizer_note(checkpoint: Checkpoint, model_type: str) -> str:
    if model_type != "qwen2":
        return ""
    pre_tokenizer = json.loads(checkpoint.read(TOKENIZER_FILE)).get("pre_tokenizer")
    if json.dumps(_QWEN2_SPLIT)[1:-1] in json.dumps(pre_tokenizer):
        return ""
    return (
        "AutoTokenizer of transformers 5 splits text in Qwen2's own way for this model type, which is not the way of "
        "this tokenizer: load it by transformers.PreTrainedTokenizerFast.from_pretrained"
    )


def export_dcp(
    checkpoint: Checkpoint, output: str, dtype: Dtype, names: Literal["own", "hf"], progress: Callable[[int], object]
) -> int:
    """Write the weights as a `torch.distributed.checkpoint` directory.

    Args:
        checkpoint: the checkpoint.
        output: a new directory.
        dtype: of the written weights; `stored` keeps each one's own.
        names: of the tensors: those of the product, as `model.layers.0.attn.q.weight`, or those of transformers.
        progress: told the bytes of each tensor that was written.

    Returns:
        The number of tensors.

    Raises:
        CheckpointError: as `export_hf`; with `names="own"` any model can be written.
    """
    from orchestrator.interop.dcp import write_dcp

    model = model_of(checkpoint)
    base, shapes = open_base(checkpoint), our_shapes(model)
    dtypes, reader = _dtypes(checkpoint, base, model, dtype), weights_reader(checkpoint, base)
    if names == "hf":
        tensors = {tensor.name: tensor for tensor in hf_tensors(family_of(model), model)}
    else:
        tensors = {f"model.{name}": HFTensor(name, shape, (name,)) for name, shape in shapes.items()}

    def produce(name: str) -> torch.Tensor:
        return _produce(reader, tensors[name], shapes, _common(tensors[name], dtypes))

    described = {
        name: torch.empty(tensor.shape, dtype=_common(tensor, dtypes), device="meta")
        for name, tensor in tensors.items()
    }
    with written_aside(output) as folder:
        write_dcp(folder, described, produce, progress)
    return len(tensors)


def _produce(
    reader: Reader, tensor: HFTensor, shapes: Mapping[str, tuple[int, ...]], wanted: torch.dtype
) -> torch.Tensor:
    """Make a tensor of what is stored: of an expert, its part of the weights alone is read."""
    return tensor.join([_read(reader, part, tensor.box(shapes[part]), wanted) for part in tensor.parts])


def _read(reader: Reader, name: str, box: tuple[slice, ...], wanted: torch.dtype) -> torch.Tensor:
    """Read a part of a weight in the dtype that is written.

    Raises:
        NonFiniteError: it is not finite, or not in that dtype.
    """
    stored = reader.tensor(f"model.{name}", box)
    weight = stored.to(wanted)
    if not finite_flags([weight])[0]:
        before = finite_flags([stored])[0]
        kind = str(wanted).removeprefix("torch.")
        raise NonFiniteError(
            f"a weight does not fit {kind}" if before else "a weight of the checkpoint is not finite: its run diverged",
            got=f"model.{name}: {describe_nonfinite(weight)}{f' in {kind}' if before else ''}",
            fix="export with dtype=bf16 or dtype=stored" if before else "export an earlier checkpoint of that run",
        )
    return weight


def weight_bytes(checkpoint: Checkpoint, dtype: Dtype) -> int:
    """Return how many bytes an export writes.

    Args:
        checkpoint: the checkpoint.
        dtype: of the written weights; `stored` keeps each one's own.
    """
    model = model_of(checkpoint)
    dtypes = _dtypes(checkpoint, open_base(checkpoint, look=False), model, dtype)
    return sum(torch.Size(shape).numel() * dtypes[name].itemsize for name, shape in our_shapes(model).items())


def _dtypes(
    checkpoint: Checkpoint, base: Checkpoint | None, model: ModelConfig, dtype: Dtype
) -> dict[str, torch.dtype]:
    """Return the dtype that each of our parameters is written in.

    Raises:
        CheckpointError: the stored tensors are not those of the model that the configuration describes.
    """
    stored, result = whole_tensors(checkpoint, base), {}
    for name, shape in our_shapes(model).items():
        tensor = stored.get(f"model.{name}")
        if tensor is None or tensor.shape != shape:
            raise CheckpointError(
                "the checkpoint does not hold the model that its configuration describes",
                got=f"model.{name}: {tensor.shape if tensor else 'missing'}",
                allowed=f"{shape}",
            )
        result[name] = DTYPES[tensor.dtype] if dtype == "stored" else _DTYPES[dtype]
    return result


def _common(tensor: HFTensor, dtypes: dict[str, torch.dtype]) -> torch.dtype:
    """Return the one dtype of a tensor that is made of several of ours."""
    result = dtypes[tensor.parts[0]]
    for part in tensor.parts[1:]:
        result = torch.promote_types(result, dtypes[part])
    return result
