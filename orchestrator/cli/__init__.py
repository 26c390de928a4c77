"""The command line: one module per verb, imported only when its verb is called."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from orchestrator import __version__, stopping
from orchestrator.distributed.world import first_process
from orchestrator.errors import FAILED, INTERRUPTED, ConfigError, UserError, describe_defect
from orchestrator.installing import how_to_install
from orchestrator.observe.console import guarded
from orchestrator.output import printing

__all__ = ["VERBS", "main"]

# verb -> what it does; each is a module of this package with `main(argv) -> exit code`.
VERBS = {
    "train": "train a model: a new run, or one that goes on",
    "launch": "train on a cluster: submit to Slurm, Kubernetes and others, follow and cancel",
    "data": "make a token store from text, JSONL or Parquet; look into one",
    "generate": "continue prompts with a trained checkpoint",
    "chat": "talk with a trained checkpoint, by its chat template",
    "evaluate": "tasks of lm-eval, or the loss on any text, with a trained checkpoint where it is placed",
    "runs": "which runs there are, what each is doing; remove old ones",
    "watch": "follow a run on the terminal",
    "compare": "runs, or certificates, side by side: losses, speed, and what differs between them",
    "plan": "what a run needs, on whose chips, how long and for how much, before anyone pays",
    "scaling-law": "fit the losses of a ladder of runs: what more parameters and tokens bring",
    "checkpoint": "look into checkpoints, check, compare, convert and prune them",
    "coordinate-check": "whether activations keep their size as a model gets wider or deeper, by what rule",
    "rehearse": "whether a run fits a TPU, by Google's own compiler and without a TPU",
    "certify": "whether devices compute what they should, in minutes, with a certificate of it",
    "doctor": "what hardware and software is here, what is missing, what to do",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 2 for mistakes of the user, 1 for what is ours; both are said on stderr.

    Args:
        argv: the verb and its words; None for those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _complete()
    # Before anything is imported that takes time, and the standard streams before anything is opened in their place.
    with guarded(quits=True) as output:
        with printing(), stopping.listening(announce=first_process()):
            code = _run_safely(words)
        printed = output.close()
    # What a verb prints is its result, but for a training, whose result is kept elsewhere.
    return code if printed or words[:1] == ["train"] else code or FAILED


def _run_safely(words: list[str]) -> int:
    try:
        return _run(words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "orchestrator":
            raise
        print(f"error: {_missing(error)}", file=sys.stderr)
        return ConfigError.exit_code
    except stopping.Stopped as stop:
        return stop.exit_code
    except KeyboardInterrupt:  # outside of the main thread, where signals are not ours
        return INTERRUPTED
    except Exception as error:
        print(describe_defect(error), file=sys.stderr)
        return FAILED


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if words else ConfigError.exit_code
    if words[0] in ("-V", "--version"):
        print(__version__)
        return 0
    if words[0] in ("-sc", "--shell-completion"):
        # The script that Hydra installs asks the program without a verb; its keys are those of `train`.
        words = ["train", *words]
    verb = words[0]
    try:
        os.getcwd()
    except OSError:
        what = "the folder that the command was started in is gone"
        raise ConfigError(what, fix="cd to one that is there") from None
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        fix = f"did you mean '{close[0]}'?" if close else "see python -m orchestrator --help"
        raise ConfigError("there is no such verb", got=verb, allowed=", ".join(VERBS), fix=fix)
    code: int = importlib.import_module(f"orchestrator.cli.{verb.replace('-', '_')}").main(words[1:])
    return code


def _missing(error: ModuleNotFoundError) -> ConfigError:
    return ConfigError(
        f"this Python lacks the package '{error.name}', which orchestrator needs",
        got=sys.executable,
        fix=how_to_install(),
    )


def _usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items())
    return (
        f"usage: python -m orchestrator VERB [key=value ...]\n\n{verbs}\n\n"
        "Each verb explains itself: python -m orchestrator VERB --help"
    )


def _complete() -> None:
    """Hydra completes the words of `COMP_LINE` itself, if the verb is not among them."""
    line = os.environ.get("COMP_LINE")
    if line and " train " in line:
        os.environ["COMP_LINE"] = line.replace(" train ", " ", 1)
