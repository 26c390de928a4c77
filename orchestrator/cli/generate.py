"""`generate`: continue prompts with a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.cli.text_words import LAYOUT_HELP, DrawingOptions, read_text, run_writer, split_words
from orchestrator.config.options import describe_options, option, parse_options
from orchestrator.errors import ConfigError, ConfigErrors, DataError

if TYPE_CHECKING:
    from orchestrator.inference.generator import Writer

SUMMARY = "continue prompts with the model of a checkpoint"
_SOURCES = ("prompt", "prompt_file", "prompts_file")
_EXAMPLE = "python -m orchestrator generate prompt='def ' temperature=0.7 top_p=0.95 samples=3"


@dataclasses.dataclass(frozen=True)
class GenerateOptions(DrawingOptions):
    """The options of `generate`; each says in its `help` what it is."""

    prompt: str | None = option(None, help="text to continue", several="several prompts: prompts_file=PATH")
    prompt_file: str | None = option(None, help="or a file that holds it; -: standard input")
    prompts_file: str | None = option(
        None, help='or a file of several: a JSON string or {"prompt": ...} on each line of *.jsonl, else a line each'
    )
    samples: int = option(1, help="texts to write for each prompt, 1 or more; each has the next seed")
    rows: int = option(16, help="texts that a device writes at one time")
    special_tokens_in_text: Literal["text", "token", "error"] | None = option(
        None, help="what special tokens in the prompt are: text, token, error; none: as the model was trained"
    )


def main(argv: list[str]) -> int:
    """Run the verb. Returns the exit status.

    Args:
        argv: the words after the verb.

    Raises:
        UserError: wrong options, or a checkpoint that cannot be used; before anything is printed.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(f"usage: python -m orchestrator generate prompt=TEXT [key=value ...]\n\n{SUMMARY}\n")
        print(f"{describe_options(GenerateOptions)}\n{LAYOUT_HELP}\n\nExample: {_EXAMPLE}")
        return 0
    words, keys = split_words(argv)
    options = parse_options(GenerateOptions, words)
    if problems := _problems(options):
        raise ConfigErrors(problems)
    prompts = _prompts(options)

    from orchestrator.inference.generate_task import GenerateJob, write_texts

    job = GenerateJob(
        prompts,
        options.samples,
        options.tokens,
        options.sampling,
        options.stops,
        options.seed,
        options.rows,
        options.special_tokens_in_text,
        options.json,
    )

    def alone(writer: Writer) -> None:
        write_texts(writer, job)

    return run_writer(options, keys, "generate", job, alone, options.special_tokens_in_text)


def _problems(options: GenerateOptions) -> list[ConfigError]:
    """List everything that is wrong with the values."""
    problems = options.problems(options.samples, options.rows)
    given = [name for name in _SOURCES if getattr(options, name) is not None]
    if len(given) != 1:
        problems.append(
            ConfigError(
                "generate continues what one option gives",
                got=", ".join(given) or "none",
                allowed="prompt=TEXT, prompt_file=PATH (-: standard input) or prompts_file=PATH",
            )
        )
    return problems


def _prompts(options: GenerateOptions) -> list[str]:
    if options.prompt is not None:
        return [options.prompt]
    if options.prompt_file is not None:
        return [read_text(options.prompt_file)]
    path = str(options.prompts_file)
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    if not lines:
        raise DataError("there is no prompt in the file", got=path, allowed="one on each line")
    if not path.endswith(".jsonl"):
        return [line.rstrip("\r") for line in lines]
    return [_prompt(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _prompt(line: str, where: str) -> str:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise DataError("a line of the prompts is no JSON", got=f"{where}: {error}") from None
    text = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise DataError("a line holds no prompt", got=f"{where}: {line[:80]}", allowed='"TEXT" or {"prompt": "TEXT"}')
    return text
