"""Conversations that every machine has: questions about Python's standard library, answered by its own documentation.

They are read from the sources as text; nothing is imported. So a newcomer can fine-tune a model without a download.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import PurePosixPath

from orchestrator.data.conversation import Conversation
from orchestrator.data.formats.reading import Input

_LONGEST = 400  # characters of an answer
_QUESTIONS = ("What does {} do?", "What is {} for?", "Tell me about {}.", "Explain {}.")
_Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def conversations_about(item: Input) -> Iterator[Conversation]:
    """Yield conversations about what a Python source documents: what it is for and, of functions, how it is called.

    Args:
        item: a source of the standard library, named by its path in it.
    """
    size = item.path.stat().st_size
    try:
        tree = ast.parse(item.path.read_bytes())
    except (SyntaxError, ValueError):
        return
    parts = PurePosixPath(item.name).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    found = list(_documented(tree, module))
    for number, (name, node, text) in enumerate(found):
        question = _QUESTIONS[sum(name.encode()) % len(_QUESTIONS)].format(name)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        if not isinstance(node, ast.ClassDef):
            call = f"{name}({ast.unparse(node.args)})"
            messages += [{"role": "user", "content": "How is it called?"}, {"role": "assistant", "content": call}]
        consumed = size if number == len(found) - 1 else 0
        yield Conversation(tuple(messages), consumed=consumed, place=f"{item.path}:{node.lineno}")


def _documented(tree: ast.AST, above: str) -> Iterator[tuple[str, _Documented, str]]:
    """Public functions and classes with what their documentation begins with."""
    for node in getattr(tree, "body", ()):
        if isinstance(node, _Documented) and not node.name.startswith("_"):
            name = f"{above}.{node.name}"
            text = ast.get_docstring(node) or ""
            first = inspect.cleandoc(text).split("\n\n")[0].strip()
            if first and len(first) <= _LONGEST:
                yield name, node, " ".join(first.split())
            if isinstance(node, ast.ClassDef):
                yield from _documented(node, name)
