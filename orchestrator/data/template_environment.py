"""The sandbox in which chat templates run: what they may use, and what they may not reach.

It is what transformers 5 gives them: `tojson`, `raise_exception`, `strftime_now`, `namespace`, `dict`, loop controls,
and `{% generation %}` around what the assistant says. Blocks of the latter come out between two marks, characters that
no text has, so that rendering keeps no state and threads may share a template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from orchestrator.errors import DataError, shown

# Noncharacters of Unicode: never in exchanged text, and taken out of messages before they are rendered.
GENERATION_START, GENERATION_END = "\ufdd0", "\ufdd1"
SPELT_START, SPELT_END = "\ufdd2", "\ufdd3"
MARKS = GENERATION_START + GENERATION_END + SPELT_START + SPELT_END
_MOST_CHARACTERS = 1 << 26  # of a rendered conversation; a row may have as many bytes


class CompiledTemplate:
    """A template, ready to render.

    Args:
        template: of Jinja.
        name: for messages.
        marks_generation: whether it has `{% generation %}` blocks.
    """

    def __init__(self, template: Any, name: str, marks_generation: bool):
        self._template, self._name, self.marks_generation = template, name, marks_generation

    def render(self, **variables: Any) -> str:
        """Return the text, with marks around `{% generation %}` blocks.

        Args:
            **variables: plain data.

        Raises:
            DataError: the template refuses the data, or fails on it.
        """
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(**variables):
                size += len(piece)
                if size > _MOST_CHARACTERS:
                    raise DataError(
                        "the chat template writes without end",
                        got=f"over {_MOST_CHARACTERS:,} characters of one conversation",
                        fix="mend the template",
                    )
                pieces.append(piece)
        except (DataError, KeyboardInterrupt):
            raise
        except Exception as error:  # whatever a template of a stranger does with data that it does not expect
            raise DataError(
                f"the chat template{_called(self._name)} does not render this conversation",
                got=shown(f"{type(error).__name__}: {error}", 500),
                allowed="messages as the template expects them: roles, their order, and what each has",
            ) from None
        return "".join(pieces)


def compile_template(text: str, name: str, now: Callable[[], datetime]) -> CompiledTemplate:
    """Compile a chat template.

    Args:
        text: of the template.
        name: for messages.
        now: gives the date for templates that write it.

    Raises:
        DataError: it is no template.
    """
    import jinja2
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    found: list[bool] = []

    class Generation(ext.Extension):
        """`{% generation %}` ... `{% endgeneration %}`."""

        tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            found.append(True)
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> str:
            return f"{GENERATION_START}{caller()}{GENERATION_END}"

    class Namespace(jinja2.utils.Namespace):
        """A namespace without names that lead into the interpreter."""

        def __init__(*args: Any, **values: Any) -> None:
            self, positional = args[0], args[1:]
            _refuse_private(dict(*positional, **values), jinja2.exceptions.SecurityError)
            jinja2.utils.Namespace.__init__(self, *positional, **values)

        def __setitem__(self, key: str, value: Any) -> None:
            _refuse_private([key], jinja2.exceptions.SecurityError)
            super().__setitem__(key, value)

    def refuse(message: object) -> None:
        raise jinja2.exceptions.TemplateError(str(message))

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=refuse,
        strftime_now=lambda form: now().strftime(form),
        namespace=Namespace,
        dict=_Dictionary(),
    )
    try:
        return CompiledTemplate(environment.from_string(text), name, bool(found))
    except (jinja2.exceptions.TemplateError, RecursionError, MemoryError, SyntaxError, ValueError) as error:
        raise DataError(
            f"the chat template{_called(name)} cannot be read",
            got=shown(f"line {getattr(error, 'lineno', '?')}: {error}", 300),
            allowed="a template in Jinja, as transformers has them",
        ) from None


class _Dictionary:
    """What templates call to make a dictionary; the class itself would lead into the interpreter."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _refuse_private(names: Iterable[object], error: type[Exception]) -> None:
    for name in names:
        if isinstance(name, str) and name.startswith("_"):
            raise error(f"a namespace has no name that begins with an underscore: {name}")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter writes HTML's characters as escapes.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _called(name: str) -> str:
    return "" if name == "default" else f" '{name}'"
