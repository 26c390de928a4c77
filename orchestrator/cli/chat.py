"""`chat`: talk with a checkpoint's model on the terminal."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING

from orchestrator.cli.text_words import LAYOUT_HELP, DrawingOptions, run_writer, split_words
from orchestrator.config.options import describe_options, option, parse_options
from orchestrator.errors import ConfigErrors

if TYPE_CHECKING:
    from orchestrator.inference.generator import Writer

SUMMARY = "talk with the model of a checkpoint, by its own chat template"
_EXAMPLE = "python -m orchestrator chat checkpoint=latest system='Answer in one sentence.' temperature=0.7"


@dataclasses.dataclass(frozen=True)
class ChatOptions(DrawingOptions):
    """The options of `chat`; each says in its `help` what it is."""

    system: str | None = option(None, help="the system message; none: what the template has")
    template: str | None = option(None, help="simple, chatml, or a file in Jinja; none: the model's own")
    tokens: int = option(512, help="tokens of an answer at most, 1 or more")


def main(argv: list[str]) -> int:
    """Run the verb. Returns the exit status.

    Args:
        argv: the words after the verb.

    Raises:
        UserError: wrong options, or a checkpoint that cannot be used or has no chat template.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(f"usage: python -m orchestrator chat [key=value ...]\n\n{SUMMARY}")
        print("Each line of the input is a message; /help lists the commands.\n")
        print(f"{describe_options(ChatOptions)}\n{LAYOUT_HELP}\n\nExample: {_EXAMPLE}")
        return 0
    words, keys = split_words(argv)
    options = parse_options(ChatOptions, words)
    if problems := options.problems():
        raise ConfigErrors(problems)

    from orchestrator.data.conversation_encoder import given_template
    from orchestrator.inference.chat_task import Answering, ChatJob, ChatSession

    template = None if options.template is None else given_template(options.template, "template")

    job = ChatJob(options.system, options.tokens, options.sampling, options.stops, options.seed, template, options.json)

    def alone(writer: Writer) -> None:
        answering = Answering(writer, job)
        ChatSession(answering, answering).hold(sys.stdin, sys.stdout)

    return run_writer(options, keys, "chat", job, alone)
