"""Adapters as PEFT writes and reads them: `adapter_config.json` beside `adapter_model.safetensors`.

Where transformers has one matrix for several of ours (queries, keys and values, say), their adapters become one: the
A's lie above each other, the B's in blocks along the diagonal. Other ranks, scales and layers of PEFT's become ours by
zeros that no gradient reaches, and by factors on B.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.checkpoint.adapters import STATE_KEY, adapter_record, open_base, record_for
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.finite import finite_flags
from orchestrator.checkpoint.format import parse_json
from orchestrator.checkpoint.merged_weights import Adapters
from orchestrator.checkpoint.storage import write_file
from orchestrator.checkpoint.writer import Begun, Contents, write
from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import LoraConfig, ModelConfig
from orchestrator.config.validate_adapters import check_lora_ranges
from orchestrator.constants import LORA_A, LORA_B
from orchestrator.data.as_trained import as_trained
from orchestrator.data.model_files import as_transformers_names
from orchestrator.distributed.exchange import SingleProcess
from orchestrator.errors import CheckpointError, ConfigErrors, NonFiniteError
from orchestrator.interop.hf_config import family_of
from orchestrator.interop.hf_files import ADAPTER_CONFIG, read_json, regular_file
from orchestrator.interop.hf_tensor import HFTensor
from orchestrator.interop.hf_weights import hf_tensors
from orchestrator.interop.importing import travelling_files
from orchestrator.interop.outputs import written_aside
from orchestrator.models.shapes import adapter_shapes, takes_adapter
from orchestrator.runs.origin import REPORT, SOURCE_CONFIG
from orchestrator.runs.provenance import software
from orchestrator.runs.stored_model import files_of, model_of, stored_config, tokenizer_of
from orchestrator.sharding.shard import Shard

ADAPTER_WEIGHTS, _PICKLED = "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_LEAVES = {"lora_A.weight": LORA_A, "lora_B.weight": LORA_B}
_DTYPES = {"stored": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of adapter_config.json: what is computed with ...
_READ = {"peft_type", "lora_alpha", "lora_dropout", "use_rslora", "alpha_pattern", "bias"}
# ... what the tensors say as well, or what changes nothing once there are tensors ...
_SAID = {
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "task_type"),
    *("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "megatron_core"),
    *(
        "r",
        "rank_pattern",
        "ensure_weight_tying",
        "megatron_config",
        "init_lora_weights",
        "loftq_config",
        "eva_config",
        "qalora_group_size",
        "runtime_config",
    ),
}
# ... and initial values by which PEFT changes the base, too. Anything else has to be off.
_PLAIN = re.compile(r"[A-Za-z0-9_.]+")
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftImported:
    """The result of `import_peft`.

    Attributes:
        lora: what a run that trains these adapters has as `train.lora`.
        parameters: elements of the adapters.
        layers: matrices that have one.
        notes: what a user should know.
    """

    lora: LoraConfig
    parameters: int
    layers: int
    notes: tuple[str, ...] = ()


# --- writing ----------------------------------------------------------------------------------------


def export_peft(checkpoint: Checkpoint, output: str, dtype: str) -> int:
    """Write the adapters of a checkpoint as `peft.PeftModel.from_pretrained` loads them; tokenizer and template beside.

    Args:
        checkpoint: of adapters.
        output: a new directory.
        dtype: of the written tensors: `stored`, `fp32`, `bf16` or `fp16`.

    Returns:
        The number of matrices that have an adapter, as transformers counts them.

    Raises:
        CheckpointError: it holds whole weights, or no class of transformers computes the model.
        NonFiniteError: a number does not fit `dtype`.
    """
    from safetensors.torch import save

    if adapter_record(checkpoint) is None:
        raise CheckpointError(
            "the checkpoint holds whole weights, and no adapters",
            got=checkpoint.directory,
            fix="export it with format=hf, or one of a run with train.lora.rank",
        )
    model, lora = model_of(checkpoint), stored_config(checkpoint).train.lora
    adapters, tensors, ranks = Adapters(checkpoint, SingleProcess()), dict[str, Tensor](), dict[str, int]()
    theirs = _hf_tensors(checkpoint, model)
    _refuse_dense_beside_experts(adapters, model)
    for tensor in _matrices(theirs):
        if (pair := _joined(tensor, adapters.pairs)) is not None:
            module = tensor.name.removesuffix(".weight")
            ranks[module] = pair[0].shape[0]
            for leaf, matrix in zip(_LEAVES, pair, strict=True):
                tensors[f"{_PREFIX}{module}.{leaf}"] = matrix.to(_DTYPES[dtype]).contiguous()
    if not all(finite_flags(list(tensors.values()))):
        raise NonFiniteError("adapters are not finite, or not in this dtype", got=f"dtype={dtype}")
    config = _config(checkpoint, lora, adapters.scale, ranks, [one.name for one in theirs])
    tokenizer, files = tokenizer_of(checkpoint), files_of(checkpoint)
    files = as_trained(files, tokenizer)[0] if tokenizer else files
    with written_aside(output) as folder:
        for name, content in as_transformers_names(files).items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_file(folder / name, [content])
        write_file(folder / ADAPTER_WEIGHTS, [save(tensors, {"format": "pt"})])
        write_file(folder / ADAPTER_CONFIG, [json.dumps(config, indent=2).encode() + b"\n"])
    return len(ranks)


def _refuse_dense_beside_experts(adapters: Adapters, model: ModelConfig) -> None:
    """PEFT 0.21 takes any gate, up and down of a model with experts for these, in the layers without experts, too."""
    dense = [path for path in adapters.pairs if ".mlp." in path]
    if model.moe.experts and dense:
        raise CheckpointError(
            "PEFT cannot be told of adapters in the dense feed-forward layers of a model with experts",
            got=f"{dense[0]} and {len(dense) - 1} more",
            allowed="adapters of attention alone: train.lora.target_modules=[q,k,v,o]",
            fix="export it with format=hf, which merges them",
        )


def _hf_tensors(checkpoint: Checkpoint, model: ModelConfig) -> list[HFTensor]:
    original = parse_json(checkpoint.read(SOURCE_CONFIG)) if SOURCE_CONFIG in checkpoint.manifest.files else {}
    return hf_tensors(family_of(model, original.get("model_type")), model)


def _matrices(tensors: list[HFTensor]) -> list[HFTensor]:
    """List those of transformers that can have adapters."""
    return [one for one in tensors if len(one.shape) == 2 and all(map(takes_adapter, one.parts))]


def _joined(tensor: HFTensor, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    """Return A and B of a matrix of transformers; None where none of its parts has an adapter."""
    paths = [f"model.{part.removesuffix('.weight')}" for part in tensor.parts]
    found = [pairs[path] for path in paths if path in pairs]
    if not found:
        return None
    if len(paths) == 1:
        return found[0]
    rank, at = sum(a.shape[0] for a, _ in found), 0
    blocks = []
    for path, rows in zip(paths, tensor.sizes, strict=True):
        block = torch.zeros(rows, rank)
        if path in pairs:
            b = pairs[path][1]
            block[:, at : at + b.shape[1]] = b
            at += b.shape[1]
        blocks.append(block)
    return torch.cat([a for a, _ in found]), replace(tensor, transposed=False).join(blocks)


def _config(
    checkpoint: Checkpoint, lora: LoraConfig, scale: float, ranks: Mapping[str, int], names: list[str]
) -> dict[str, Any]:
    """Make `adapter_config.json`."""
    base = open_base(checkpoint, look=False)
    origin = base.state().get("imported") if base else None
    came_from = origin.get("source") if isinstance(origin, dict) else None
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    alpha = {rank: scale * (math.sqrt(rank) if lora.rslora else rank) for rank in ranks.values()}
    others = {module: rank for module, rank in ranks.items() if rank != common}
    leaves = {module.rpartition(".")[2] for module in ranks}
    alike = {name.rpartition(".")[0] for name in names if name.split(".")[-2] in leaves}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(came_from or (base.directory if base else "")),
        "r": common,
        "lora_alpha": alpha[common],
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        # By their last names, where no other matrix has one of these.
        "target_modules": sorted(leaves if alike == set(ranks) else ranks),
        "rank_pattern": others,
        "alpha_pattern": {module: alpha[rank] for module, rank in others.items()},
        "fan_in_fan_out": False,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
    }


# --- reading ----------------------------------------------------------------------------------------


def import_peft(source: Path, output: str, base: Checkpoint) -> PeftImported:
    """Make a checkpoint of step 0 of PEFT's adapters and the weights that they lie beside.

    Args:
        source: directory with `adapter_config.json` and `adapter_model.safetensors`.
        output: the checkpoint's directory, new.
        base: the weights that the adapters were trained on.

    Raises:
        CheckpointError: it is another kind of adapter, or not one of this model.
        ConfigErrors: a number in it is out of range.
    """
    if adapter_record(base) is not None:
        raise CheckpointError(
            "the base is a checkpoint of adapters itself", got=base.directory, fix="give the one of whole weights"
        )
    config, model = read_json(source / ADAPTER_CONFIG), model_of(base)
    given = _read(source)
    settings, dropout, rslora = _settings(config, source)
    pairs = _pairs(given, settings, _matrices(_hf_tensors(base, model)), source)
    (lora, scale), pairs = _alike(pairs, dropout, rslora), dict(pairs)
    tensors = dict(_filled(pairs, lora, scale, model))
    files = {**files_of(base), **travelling_files(None, source, model)[0]}
    files |= {name: base.read(name) for name in (SOURCE_CONFIG, REPORT) if name in base.manifest.files}
    record = record_for(base, scale, Path(output).expanduser().resolve())
    state = {
        "step": 0,
        "imported": {"format": "peft", "source": str(source), "dtypes": ["F32"]},
        STATE_KEY: record.to_dict(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "software": software(),
    }
    run = {"name": model.name, "model": to_dict(model)}
    contents = Contents(state, {**run, "train": {"init_from": record.base, "lora": to_dict(lora)}}, files)
    shards = [
        Shard(name, tuple(data.shape), tuple(slice(0, size) for size in data.shape), data)
        for name, data in tensors.items()
    ]
    with written_aside(output) as folder:
        write(Begun(folder, "import"), 0, shards, SingleProcess(), contents)
    notes = () if len(pairs) * 2 == len(tensors) else ("layers without an adapter have one of zeros, which stays so",)
    return PeftImported(lora, sum(a.numel() + b.numel() for a, b, _ in pairs.values()), len(pairs), notes)


def _read(source: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (source / ADAPTER_WEIGHTS).exists() and (source / _PICKLED).exists():
        raise CheckpointError(
            "these adapters are pickle, which is not read",
            got=source / _PICKLED,
            allowed=ADAPTER_WEIGHTS,
            fix="save them again: model.save_pretrained(DIRECTORY, safe_serialization=True)",
        )
    try:
        return {name: tensor.float() for name, tensor in load_file(regular_file(source / ADAPTER_WEIGHTS)).items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"the adapters cannot be read: {error}"[:300], got=source / ADAPTER_WEIGHTS) from None


@dataclass(frozen=True)
class _Settings:
    """Rank's and alpha's patterns, and what holds without one."""

    alpha: float
    alphas: Mapping[str, float]
    rslora: bool

    def scale(self, module: str, rank: int) -> float:
        """Return PEFT's factor for a module: its pattern is the end of the module's name."""
        found = [value for key, value in self.alphas.items() if module == key or module.endswith(f".{key}")]
        return (found[0] if found else self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def _settings(config: Mapping[str, Any], source: Path) -> tuple[_Settings, float, bool]:
    """Read `adapter_config.json`.

    Raises:
        CheckpointError: something in it asks for more than LoRA.
    """
    wrong = {key: value for key, value in config.items() if key not in _READ | _SAID and value}
    for key, value in (("peft_type", "LORA"), ("bias", "none")):
        if config.get(key, "none") != value:
            wrong[key] = config.get(key)
    began = config.get("init_lora_weights")
    if isinstance(began, str) and began.lower().startswith(_CHANGED_BASE):
        wrong["init_lora_weights"] = began
    if wrong:
        raise CheckpointError(
            "these adapters are more than LoRA beside the weights of a base",
            got=", ".join(f"{key}={json.dumps(value)[:60]}" for key, value in sorted(wrong.items()))[:400],
            allowed='"peft_type": "LORA" with "bias": "none", without DoRA, saved modules or embeddings',
            fix="merge them by PEFT (merge_and_unload), and import the whole model",
        )
    try:
        alphas = {str(key): float(value) for key, value in (config.get("alpha_pattern") or {}).items()}
        if odd := [key for key in alphas if not _PLAIN.fullmatch(key)]:
            raise ValueError(f"alpha_pattern has {odd[0][:60]!r}, where names of modules are read")
        rslora, dropout = bool(config.get("use_rslora")), float(config.get("lora_dropout") or 0.0)
        return _Settings(float(config["lora_alpha"]), alphas, rslora), dropout, rslora
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{ADAPTER_CONFIG} is damaged: {error!r}"[:300], got=source) from None


def _pairs(
    given: Mapping[str, Tensor], settings: _Settings, matrices: list[HFTensor], source: Path
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Return A, B and their scale by our own names of the layers."""
    known = {f"{_PREFIX}{one.name.removesuffix('.weight')}.{leaf}" for one in matrices for leaf in _LEAVES}
    if strange := sorted(given.keys() - known):
        raise CheckpointError(
            "the adapters lie beside matrices that the base has not, or that cannot have any",
            got=f"{', '.join(strange[:3])}{f' and {len(strange) - 3} more' if len(strange) > 3 else ''} in {source}",
            allowed=f"matrices such as {sorted(known)[0]}" if known else "none",
            fix="give the base that they were trained on: base=CHECKPOINT; or merge them by PEFT and import the model",
        )
    pairs = {}
    for tensor in matrices:
        module = tensor.name.removesuffix(".weight")
        names = [f"{_PREFIX}{module}.{leaf}" for leaf in _LEAVES]
        if not any(name in given for name in names):
            continue
        rows, columns = tensor.shape[::-1] if tensor.transposed else tensor.shape
        a, b = (given.get(name, torch.empty(0)) for name in names)
        if a.dim() != 2 or not a.shape[0] or tuple(a.shape) != (a.shape[0], columns) or b.shape != (rows, a.shape[0]):
            raise CheckpointError(
                "an adapter does not fit its matrix",
                got=f"{names[0]} {list(a.shape)} and lora_B {list(b.shape)} beside {[rows, columns]}",
                fix="give the base that they were trained on: base=CHECKPOINT",
            )
        scale = settings.scale(module, a.shape[0])
        for part, rows_of_part in zip(tensor.parts, replace(tensor, transposed=False).split(b), strict=True):
            pairs[part.removesuffix(".weight")] = (a, rows_of_part, scale)
    if not pairs:
        raise CheckpointError("there are no adapters in it", got=source / ADAPTER_WEIGHTS)
    return pairs


def _alike(pairs: Mapping[str, tuple[Tensor, Tensor, float]], dropout: float, rslora: bool) -> tuple[LoraConfig, float]:
    """Return the one rank and scale that all of them can have."""
    rank = max(a.shape[0] for a, _, _ in pairs.values())
    scales = [scale for *_, scale in pairs.values()]
    scale = max(set(scales), key=scales.count)
    names = tuple(sorted({path.rpartition(".")[2] for path in pairs}))
    alpha = scale * (math.sqrt(rank) if rslora else rank)
    lora = from_dict(LoraConfig, {**to_dict(LoraConfig(rank, alpha, dropout, names, rslora))})
    if problems := list(check_lora_ranges(lora)):
        raise ConfigErrors(problems)
    return lora, scale


def _filled(
    pairs: Mapping[str, tuple[Tensor, Tensor, float]], lora: LoraConfig, scale: float, model: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yield the adapters of all layers that a run of `lora` has; zeros, in A and in B, stay zeros."""
    for name, shape in adapter_shapes(model, lora):
        path, _, leaf = name.rpartition(".")
        whole = torch.zeros(shape)
        if path in pairs:
            a, b, own = pairs[path]
            if leaf == LORA_A:
                whole[: a.shape[0]] = a
            else:
                whole[:, : b.shape[1]] = b if own == scale else b * (own / scale)
        yield f"model.{name}", whole
