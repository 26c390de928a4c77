"""`generate`: continue a prompt with a checkpoint."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from orchestrator.api.drawing import check_drawing
from orchestrator.config.options import describe_options, option, parse_options
from orchestrator.errors import ConfigError, ConfigErrors, DataError

if TYPE_CHECKING:
    from orchestrator.data.tokenize import Tokenizer
    from orchestrator.inference.generator import Continuation

SUMMARY = "continue a prompt with the model of a checkpoint"
_MAX_PROMPT_BYTES = 1 << 24
_EXAMPLE = "python -m orchestrator generate prompt='def ' temperature=0.7 top_p=0.95 samples=3"


@dataclass(frozen=True)
class GenerateOptions:
    """The options of `generate`; each says in its `help` what it is."""

    prompt: str | None = option(None, help="text to continue")
    prompt_file: str | None = option(None, help="or a file that holds it; -: standard input")
    checkpoint: str = option("latest", help="latest, a run directory or a checkpoint directory")
    tokens: int = option(128, help="tokens to write at most, 1 or more")
    samples: int = option(1, help="texts to write, 1 or more; each has the next seed")
    temperature: float = option(0.8, help="0 or more; 0 takes the likeliest token each time")
    top_k: int | None = option(None, help="draw among the k likeliest tokens, 1 or more")
    top_p: float | None = option(
        None, help="draw among the likeliest that have this probability together, above 0 to 1"
    )
    min_p: float | None = option(None, help="draw among those of this part of the likeliest one's probability, 0 to 1")
    repetition_penalty: float = option(1.0, help="above 1: tokens that are there already become less likely")
    stop: tuple[str, ...] = option((), help="texts at which to end, comma-separated; \\n is a line break")
    special_tokens_in_text: Literal["text", "token", "error"] | None = option(
        None, help="what special tokens in the prompt are: text, token, error; none: as the model was trained"
    )
    seed: int = option(0, help="of the draws, 0 or more")
    json: bool = option(False, help="print a JSON object per text")
    hardware: Literal["auto", "cpu", "cuda", "rocm"] = option("auto", help="auto, cpu, cuda, rocm")
    runs_dir: str = option("runs", help="where latest looks")


def main(argv: list[str]) -> int:
    """Run the verb. Returns the exit status.

    Args:
        argv: the words after the verb.

    Raises:
        UserError: wrong options, or a checkpoint that cannot be used; before anything is printed.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(f"usage: python -m orchestrator generate prompt=TEXT [key=value ...]\n\n{SUMMARY}\n")
        print(f"{describe_options(GenerateOptions)}\n\nExample: {_EXAMPLE}")
        return 0
    options = parse_options(GenerateOptions, argv)
    if problems := _problems(options):
        raise ConfigErrors(problems)
    prompt = _prompt(options)

    from orchestrator.config.schema import HardwareConfig
    from orchestrator.hardware.target_table import resolve
    from orchestrator.runs.messages import warn
    from orchestrator.runs.stored_model import find_checkpoint

    found = find_checkpoint(options.checkpoint, options.runs_dir, warn)
    target = resolve(HardwareConfig(target=options.hardware, devices=1))

    from orchestrator.inference.generator import Sampling, Writer

    writer = Writer(found, target, options.special_tokens_in_text)
    print(f"checkpoint {found}", file=sys.stderr)
    if note := _spelled(prompt, writer.tokenizer):
        print(note, file=sys.stderr)
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty)
    stop = [text.replace("\\n", "\n") for text in options.stop]
    for number in range(options.samples):
        text = writer.write(prompt, options.tokens, sampling, options.seed + number, stop)
        _show(text, prompt, number, options)
    return 0


def _show(text: Continuation, prompt: str, number: int, options: GenerateOptions) -> None:
    pieces = iter(text)
    if options.json:
        whole = "".join(pieces)
        facts = {"tokens": len(text.ids), "stopped": text.stopped, "seed": options.seed + number}
        print(json.dumps({"prompt": prompt, "text": whole, **facts}, ensure_ascii=False), flush=True)
        return
    first = next(pieces, "")  # an error comes with the first token: before anything is printed
    if options.samples > 1:
        print(f"--- {number + 1} of {options.samples}, seed {options.seed + number}")
    print(prompt + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _problems(options: GenerateOptions) -> list[ConfigError]:
    """List everything that is wrong with the values."""
    drawing = ("tokens", "samples", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    problems = check_drawing(**{name: getattr(options, name) for name in drawing})
    if (options.prompt is None) == (options.prompt_file is None):
        given = "neither" if options.prompt is None else "both"
        problems.append(
            ConfigError(
                "generate continues one prompt",
                got=given,
                allowed="prompt=TEXT or prompt_file=PATH (-: standard input)",
            )
        )
    return problems


def _prompt(options: GenerateOptions) -> str:
    if options.prompt is not None:
        return options.prompt
    assert options.prompt_file is not None
    try:
        if options.prompt_file == "-":
            content = sys.stdin.buffer.read(_MAX_PROMPT_BYTES + 1)
        else:
            with open(Path(options.prompt_file).expanduser(), "rb") as file:
                content = file.read(_MAX_PROMPT_BYTES + 1)
        text = content.decode("utf-8")
    except OSError as error:
        raise DataError("the prompt cannot be read", got=f"{options.prompt_file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DataError("the prompt is not text in UTF-8", got=options.prompt_file) from None
    if len(content) > _MAX_PROMPT_BYTES:
        raise DataError("the prompt is too large", got=options.prompt_file, allowed=f"{_MAX_PROMPT_BYTES:,} bytes")
    return text


def _spelled(prompt: str, tokenizer: Tokenizer) -> str | None:
    """Describe a special token that the prompt spells and that is read as plain text; None without one."""
    if tokenizer.documents.special_tokens_in_text != "text":
        return None
    spelled = next((token for token in tokenizer.special_tokens if token in prompt), None)
    if spelled is None:
        return None
    return (
        f"note: the prompt spells {spelled}, which is plain text to this model; "
        "special_tokens_in_text=token makes it the token"
    )
