"""`python -m orchestrator checkpoint`: look into checkpoints, check, compare, convert and prune them."""

from __future__ import annotations

import difflib
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.cli.checkpoint_text import (
    PICKLE_HELP,
    allow_pickle,
    clean,
    difference_rows,
    how_to_load_adapters,
    inspect_rows,
    signature_rows,
    size_text,
    strict_json,
)
from orchestrator.config.options import describe_options, option, parse_options
from orchestrator.errors import CheckpointError, ConfigError, ConfigErrors, UserError
from orchestrator.observe.bar import Bar

if TYPE_CHECKING:
    from orchestrator.checkpoint.checkpoint import Checkpoint
    from orchestrator.checkpoint.storage import AnyPath

SUMMARY = "look into checkpoints, check, compare, convert and prune them"
_PROGRAM = "python -m orchestrator checkpoint"
_PATH_HELP = "latest, a run directory, a directory of checkpoints, or a checkpoint; s3://..., gs://... too"
_RUNS_HELP = "where latest looks"
_GB = 1_000_000_000
_SHOWN = 20  # damaged ranges, or contradictions, that are printed


@dataclass(frozen=True)
class InspectCheckpointOptions:
    """Options of `checkpoint inspect`."""

    path: str = option(help=_PATH_HELP)
    tensors: bool = option(False, help="list every tensor with its shape and shards")
    json: bool = option(False, help="print JSON")
    runs_dir: str = option("runs", help=_RUNS_HELP)


@dataclass(frozen=True)
class VerifyOptions:
    """Options of `checkpoint verify`."""

    path: str = option(help=f"{_PATH_HELP}; of several the newest")
    trusted_keys: tuple[str, ...] = option((), help="public keys (PEM), comma-separated: another signature is damage")
    require_signature: bool = option(False, help="no signature is damage, too")
    deep: bool = option(False, help="read the tensors, too: NaN and infinity in them")
    progress: bool = option(True, help="show a progress bar")
    runs_dir: str = option("runs", help=_RUNS_HELP)


@dataclass(frozen=True)
class DiffOptions:
    """Options of `checkpoint diff`."""

    a: str = option(help=_PATH_HELP)
    b: str = option(help="another one, of whatever layout")
    prefix: str = option("", help="compare tensors of this prefix alone: model., optimizer.")
    json: bool = option(False, help="print JSON")
    progress: bool = option(True, help="show a progress bar")
    runs_dir: str = option("runs", help=_RUNS_HELP)


@dataclass(frozen=True)
class ExportOptions:
    """Options of `checkpoint export`."""

    path: str = option(help=_PATH_HELP)
    output: str = option(help="directory to write, new or empty")
    format: Literal["hf", "peft", "dcp"] = option(
        "hf",
        help="hf (transformers; adapters merged), peft (adapters alone), dcp (torch.distributed.checkpoint; pickle)",
    )
    dtype: Literal["stored", "fp32", "bf16", "fp16"] = option("stored", help="of the weights: stored, fp32, bf16, fp16")
    weights: Literal["trained", "ema"] = option("trained", help="trained, or ema: their average (train.ema.decay)")
    max_shard_gb: float = option(5.0, help="of one file of hf, in GB of 10^9 bytes")
    names: Literal["own", "hf"] = option("own", help="of dcp's tensors: own, or hf (those of transformers)")
    verify: bool = option(True, help="hash the checkpoint first")
    allow_pickle: bool = option(False, help=PICKLE_HELP)
    progress: bool = option(True, help="show a progress bar")
    runs_dir: str = option("runs", help=_RUNS_HELP)


@dataclass(frozen=True)
class PruneOptions:
    """Options of `checkpoint prune`."""

    path: str = option(help="latest, a run directory, or a directory of checkpoints; s3://... too")
    keep_last: int = option(help="the newest so many stay, 1 or more")
    keep_every_steps: int | None = option(None, help="and those at multiples of this")
    dry_run: bool = option(False, help="remove nothing, list what would go")
    verify: bool = option(True, help="hash the newest that stays first: one that is whole must be left")
    progress: bool = option(True, help="show a progress bar")
    runs_dir: str = option("runs", help=_RUNS_HELP)


def main(argv: list[str]) -> int:
    """Run the verb; `argv` is what follows `checkpoint`. Returns the exit status.

    Raises:
        UserError: wrong options, or a checkpoint that cannot be used.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    if name in _MODULES:
        code: int = importlib.import_module(f"orchestrator.cli.{_MODULES[name][0]}").main(rest)
        return code
    if name not in _SUBVERBS:
        close = difflib.get_close_matches(name, [*_SUBVERBS, *_MODULES], n=1)
        raise ConfigError(
            f"there is no '{name}' under 'checkpoint'",
            got=name,
            allowed=", ".join([*_SUBVERBS, *_MODULES]),
            fix=f"did you mean '{close[0]}'?" if close else f"see {_PROGRAM} --help",
        )
    subverb = _SUBVERBS[name]
    places = " ".join(place.upper() for place in subverb.positional)
    if any(word in ("-h", "--help") for word in rest):
        print(f"usage: {_PROGRAM} {name} {places} [key=value ...]\n\n{subverb.summary}\n")
        print(f"{describe_options(subverb.options)}\n\nExample: {_PROGRAM} {name} {subverb.example}")
        return 0
    words = ["json=true" if word == "--json" else word for word in rest]
    return subverb.run(parse_options(subverb.options, words, subverb.positional))


def _help() -> str:
    summaries = {name: subverb.summary for name, subverb in _SUBVERBS.items()}
    summaries |= {name: summary for name, (_, summary) in _MODULES.items()}
    rows = "\n".join(f"  {name:<8}  {summary}" for name, summary in summaries.items())
    return (
        f"usage: {_PROGRAM} SUBVERB PATH [key=value ...]\n\n{SUMMARY}\n\n{rows}\n\nOptions: {_PROGRAM} SUBVERB --help"
    )


def _inspect(options: InspectCheckpointOptions) -> int:
    from orchestrator.checkpoint.summary import facts
    from orchestrator.runs.run_directory import read_history

    checkpoint = _open(options.path, options.runs_dir)
    found = {**facts(checkpoint, options.tensors), "legs": read_history(checkpoint)[0]}
    print(strict_json(found) if options.json else "\n".join(inspect_rows(found)))
    return 0


def _verify(options: VerifyOptions) -> int:
    from orchestrator.checkpoint.attestation import attested, examine, hash_files, strangers
    from orchestrator.checkpoint.checkpoint import Checkpoint
    from orchestrator.checkpoint.signing import trust

    # A signature of any kind will do where one is required.
    trusted = trust(options.trusted_keys, required=False)
    path = _find(options.path, options.runs_dir, damaged=True)
    try:
        checkpoint = Checkpoint(path, trusted)
        whole, digests = bool(attested(checkpoint)), dict[str, str]()
        total = sum(file.bytes for file in checkpoint.manifest.files.values())
        with Bar("verify", total, options.progress) as bar:
            if whole:
                damage, digests = hash_files(checkpoint, bar.add)
            else:
                damage = [str(one) for one in checkpoint.damage(bar.add)]
        signatures = [] if damage else examine(checkpoint, digests, trusted)
        unsigned = [] if damage or not whole else list(strangers(checkpoint))
    except CheckpointError as error:
        print(f"damaged: {clean(str(error))}")
        return 1
    for one in damage[:_SHOWN]:
        print(f"damaged: {clean(one)}")
    if len(damage) > _SHOWN:
        print(f"... and {len(damage) - _SHOWN} more ranges")
    if damage:
        count = "1 damaged range" if len(damage) == 1 else f"{len(damage)} damaged ranges"
        print(f"\n{path}: {count}; the run falls back to an older checkpoint")
        return 1
    files = f"{len(checkpoint.manifest.files)} files, {size_text(total)}, all hashes match"
    refused = [*(text for one in signatures for text in one.wrong), *unsigned]
    if options.require_signature and not any(one.by for one in signatures):
        refused.append("the checkpoint is not signed by a key of trusted_keys")
    if refused:
        for text in refused[:_SHOWN]:
            print(f"wrong: {clean(text)}")
        print(f"\n{path}: {files} the manifest, but it is not what was signed, or not by whom you trust")
        return 1
    if wrong := list(itertools.islice(_contradictions(checkpoint), _SHOWN)):
        for text in wrong:
            print(f"wrong: {clean(text)}")
        print(f"\n{path}: {files}, but they do not mean a checkpoint that can be used")
        return 1
    tensors = f"{len(checkpoint.manifest.tensors)} tensors"
    print(f"{path}: whole; {files}; {tensors} where the manifest says, state, configuration and model fit each other")
    print("\n".join(signature_rows(signatures)))
    return _verify_deep(checkpoint, options.progress) if options.deep else 0


def _verify_deep(checkpoint: Checkpoint, progress: bool) -> int:
    from orchestrator.checkpoint.deep_check import element_count, nonfinite_tensors

    with Bar("look", element_count(checkpoint), progress, unit="") as bar:
        found = nonfinite_tensors(checkpoint, bar.add)
    for one in found:
        print(f"not finite: {clean(str(one))}")
    if found:
        print(f"\n{len(found)} of {len(checkpoint.manifest.tensors)} tensors are not finite: the run had diverged")
        return 1
    print("every number in its tensors is finite")
    return 0


def _contradictions(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield what the hashes do not tell: parts that contradict each other."""
    from orchestrator.checkpoint.consistency import contradictions
    from orchestrator.runs.run_directory import read_history
    from orchestrator.runs.stored_model import model_of, tokenizer_of

    yield from contradictions(checkpoint)
    looks: tuple[Callable[[Checkpoint], object], ...] = (model_of, tokenizer_of, read_history)
    for look in looks:
        try:
            look(checkpoint)
        except ConfigErrors as error:
            yield from (f"config.yaml: {problem.what}" for problem in error.problems)
        except UserError as error:
            yield error.what


def _diff(options: DiffOptions) -> int:
    from orchestrator.checkpoint.diff import common_elements, compare

    first, second = _open(options.a, options.runs_dir), _open(options.b, options.runs_dir)
    with Bar("compare", common_elements(first, second, options.prefix), options.progress, unit="") as bar:
        found = compare(first, second, options.prefix, bar.add)
    if options.json:
        from dataclasses import asdict

        about = {"a": str(first.directory), "b": str(second.directory), "equal": found.equal}
        print(strict_json({**about, **asdict(found)}))
    else:
        print(f"a  {first.directory}, step {first.step}\nb  {second.directory}, step {second.step}\n")
        print("\n".join(difference_rows(found)))
    return 0 if found.equal else 1


def _export(options: ExportOptions) -> int:
    if options.format == "dcp":
        allow_pickle(options.allow_pickle, "a torch.distributed.checkpoint directory", "whoever loads it executes it")
    if not options.max_shard_gb > 0:
        raise ConfigError("'max_shard_gb' is out of range", got=options.max_shard_gb, allowed="more than 0")
    from orchestrator.checkpoint.adapters import open_base
    from orchestrator.checkpoint.averaged import averaged
    from orchestrator.interop.exporting import export_dcp, export_hf, weight_bytes

    checkpoint = _open(options.path, options.runs_dir)
    for part in filter(None, (checkpoint, open_base(checkpoint)) if options.verify else ()):
        total = sum(file.bytes for file in part.manifest.files.values())
        with Bar("verify", total, options.progress) as bar:
            part.verify(bar.add)
    if options.weights == "ema":
        checkpoint = averaged(checkpoint)
    if options.format == "peft":
        from orchestrator.interop.peft_adapters import export_peft

        count = export_peft(checkpoint, options.output, options.dtype)
        which = f"the adapters of {count} matrices"
        print(f"step {checkpoint.step} of {checkpoint.directory}: {which} are now {options.output}")
        for line in how_to_load_adapters(options.output):
            print(line)
        return 0
    with Bar("export", weight_bytes(checkpoint, options.dtype), options.progress) as bar:
        if options.format == "hf":
            limit = max(1, int(min(options.max_shard_gb, 1e6) * _GB))
            exported = export_hf(checkpoint, options.output, options.dtype, limit, bar.add)
        else:
            count = export_dcp(checkpoint, options.output, options.dtype, options.names, bar.add)
    which = ", averaged weights," if options.weights == "ema" else ""
    print(f"step {checkpoint.step} of {checkpoint.directory}{which} is now {options.output}")
    if options.format == "dcp":
        print(f"{count} tensors, weights alone")
        return 0
    if not exported.tokenizer:
        print("the checkpoint carries no tokenizer, so there is none in the output")
    if exported.note:
        print(f"note: {exported.note}")
    print(f"\nLoad it ({exported.loader}):")
    print(f"  transformers.AutoModelForCausalLM.from_pretrained({options.output!r})")
    return 0


def _prune(options: PruneOptions) -> int:
    for key, value in (("keep_last", options.keep_last), ("keep_every_steps", options.keep_every_steps)):
        if value is not None and value < 1:
            raise ConfigError(f"'{key}' is out of range", got=value, allowed="1 or more")
    from orchestrator.checkpoint.storage import locate
    from orchestrator.runs.listing import newest_run
    from orchestrator.runs.pruning import prune_checkpoints

    path = newest_run(options.runs_dir) if options.path == "latest" else locate(options.path)
    keep = (options.keep_last, options.keep_every_steps)
    with Bar("verify", None, options.progress) as bar:
        gone, kept = prune_checkpoints(path, *keep, options.dry_run, options.verify, bar.add)
    for one in gone:
        print(f"{'would remove' if options.dry_run else 'removed'}  {one}")
    print(f"{len(gone)} {'would be removed' if options.dry_run else 'removed'}, {len(kept)} kept")
    return 0


def _find(where: str, runs_dir: str, damaged: bool = False) -> AnyPath:
    from orchestrator.runs.stored_model import find_checkpoint

    return find_checkpoint(where, runs_dir, lambda text: print(f"warning: {clean(text)}", file=sys.stderr), damaged)


def _open(where: str, runs_dir: str) -> Checkpoint:
    from orchestrator.checkpoint.checkpoint import Checkpoint

    return Checkpoint(_find(where, runs_dir))


@dataclass(frozen=True)
class _Subverb:
    summary: str
    options: type[Any]
    run: Callable[[Any], int]
    example: str
    positional: tuple[str, ...] = ("path",)


_SUBVERBS = {
    "inspect": _Subverb(
        "step, provenance, tensors and data position", InspectCheckpointOptions, _inspect, "latest tensors=true"
    ),
    "verify": _Subverb(
        "hash every byte and compare the parts with each other; exits with 1 where something is wrong, and names it",
        VerifyOptions,
        _verify,
        "runs/tiny/20261124-120000",
    ),
    "diff": _Subverb(
        "compare two tensor by tensor; exits with 0 where they are bitwise equal, else with 1",
        DiffOptions,
        _diff,
        "runs/a/1/checkpoints/step-00000100 latest prefix=model.",
        ("a", "b"),
    ),
    "export": _Subverb(
        "weights, configuration and tokenizer for transformers, or weights for torch.distributed.checkpoint",
        ExportOptions,
        _export,
        "latest output=exported/mine dtype=bf16",
    ),
    "prune": _Subverb(
        "remove old checkpoints of a run that is not running",
        PruneOptions,
        _prune,
        "runs/tiny/20261124-120000 keep_last=1",
    ),
}
# Sub-verbs with a module of their own in this package: name -> (module with `main(argv)`, summary).
_MODULES: dict[str, tuple[str, str]] = {
    "import": ("import_checkpoint", "a Hugging Face directory (or DCP, .ckpt) as a checkpoint to train on from"),
    "sign": ("sign", "sign one that is there: manifest, OpenSSF model signature, in-toto statement"),
    "handover": ("handover", "whether a checkpoint computes the same on some hardware as where it was saved"),
}
