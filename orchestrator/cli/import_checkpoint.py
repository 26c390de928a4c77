"""`checkpoint import`: make checkpoints from models of other software."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.cli.checkpoint_text import PICKLE_HELP, allow_pickle, clean
from orchestrator.config.options import describe_options, option, parse_options
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.observe.bar import Bar

_PROGRAM = "python -m orchestrator checkpoint import"


@dataclass(frozen=True)
class ImportOptions:
    """Options of `checkpoint import`."""

    path: str = option(help="a Hugging Face directory, a torch.distributed.checkpoint directory, or a .ckpt, .pt, .bin")
    output: str = option(help="directory of the new checkpoint, new or empty")
    format: Literal["auto", "hf", "peft", "dcp", "ckpt"] = option(
        "auto", help="auto: what is there; hf, peft, dcp, ckpt"
    )
    base: str | None = option(None, help="of peft's adapters: the checkpoint of the weights that they lie beside")
    model: str | None = option(None, help="option of train's model group, for weights without a config.json")
    config: str | None = option(None, help="config.json of transformers, or its directory, if not beside the weights")
    tokenizer: str | None = option(None, help="tokenizer.json, or its directory, if not beside the weights")
    ignore_keys: tuple[str, ...] = option((), help="keys of config.json, comma-separated, that change nothing computed")
    check_logits: Literal["auto", "true", "false"] = option(
        "auto", help="compute some logits in transformers, too; auto: where it is installed and memory allows"
    )
    report: bool = option(False, help="list every tensor and every key of config.json with what became of it")
    allow_pickle: bool = option(False, help=PICKLE_HELP)
    progress: bool = option(True, help="show a progress bar")


def main(argv: list[str]) -> int:
    """Run the verb. Returns the exit status.

    Args:
        argv: the words after the verb.

    Raises:
        UserError: wrong options, or what cannot be imported.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(f"usage: {_PROGRAM} PATH output=DIRECTORY [key=value ...]\n")
        print("A Hugging Face directory (or DCP, .ckpt) as a checkpoint to train on from.")
        print("What became of every tensor and key is written into it, too: import.json\n")
        print(f"{describe_options(ImportOptions)}\n\nExample: {_PROGRAM} models/Qwen3-0.6B output=imported/qwen3")
        return 0
    words = ["report=true" if word == "--report" else word for word in argv]
    return _import(parse_options(ImportOptions, words, ("path",)))


def _import(options: ImportOptions) -> int:
    from orchestrator.interop.hf_files import ADAPTER_CONFIG
    from orchestrator.interop.importing import describe, detect_format, import_weights

    source = Path(options.path).expanduser()
    if options.format == "peft" or (options.format == "auto" and (source / ADAPTER_CONFIG).is_file()):
        return _import_peft(options, source)
    kind = detect_format(source)
    if options.format not in ("auto", kind):
        raise CheckpointError(f"this is not of format {options.format}", got=source, allowed=f"format={kind}")
    if options.model and options.config:
        raise ConfigError("model= and config= both describe the weights", fix="leave out one of them")
    if kind != "hf":
        # A model that cannot be computed is said before anything is asked of the user.
        describe(source, options.model, options.config, options.ignore_keys)
        what = "a torch.distributed.checkpoint directory" if kind == "dcp" else "a file of torch.save (.ckpt, .bin)"
        allow_pickle(options.allow_pickle, what, "only tensors and plain data of it are read, nothing is executed")
    with Bar("import", None, options.progress) as bar:
        found = import_weights(
            source,
            options.output,
            kind,
            options.model,
            options.config,
            options.tokenizer,
            bar.at,
            options.ignore_keys,
            options.check_logits,
        )
    print(f"{options.output}: {found.parameters:,} parameters in {', '.join(found.dtypes)}, model {found.model.name}")
    if options.report:
        print("\n" + clean("\n".join(found.report.table())) + "\n")
    print(clean("\n".join(found.report.summary())))
    print(f"every tensor and key, and what became of it: {Path(options.output) / 'import.json'}")
    if found.no_tokenizer:
        print(f"tokenizer  {clean(found.no_tokenizer)}")
    print(f"\nTrain on from it ({_which(found.tokenizer)}; optimizer and step are new):")
    more = "" if found.tokenizer else " data.tokenizer.path=TOKENIZER.json"
    print(f"  python -m orchestrator train train.init_from={options.output}{more}")
    return 0


def _import_peft(options: ImportOptions, source: Path) -> int:
    from orchestrator.checkpoint.checkpoint import Checkpoint
    from orchestrator.interop.peft_adapters import import_peft
    from orchestrator.runs.stored_model import find_checkpoint

    if options.base is None:
        raise ConfigError(
            "the directory holds adapters, and not the weights that they lie beside",
            got=source,
            fix="import their model first, and name its checkpoint: base=CHECKPOINT",
        )
    base = Checkpoint(find_checkpoint(options.base, "runs", lambda text: print(f"warning: {clean(text)}")))
    found = import_peft(source, options.output, base)
    lora = found.lora
    print(
        f"{options.output}: adapters of {found.layers} layers, {found.parameters:,} parameters, beside {base.directory}"
    )
    print("\n".join(clean(f"note: {note}") for note in found.notes), end="\n" if found.notes else "")
    print("\nTrain on with them, or merged into all weights (leave out train.lora.rank):")
    print(f"  python -m orchestrator train train.init_from={options.output} train.lora.rank={lora.rank}")
    return 0


def _which(tokenizer: bool) -> str:
    if tokenizer:
        return "the model and the tokenizer are the checkpoint's"
    return "no tokenizer came along: give the model's own here, or to the import as tokenizer=PATH"
