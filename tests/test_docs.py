"""The pages of docs/ and README: links lead somewhere, commands exist, and what is printed is what they print."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator

import pytest
import yaml

from orchestrator import cli
from orchestrator.config.compose import compose
from tests.lab.pages import LATER, NOT_RUN, PAGES, ROOT, Block, blocks

BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL, CONSOLE = ("bash", "console")
_LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)")
_PRODUCT = re.compile(r"\borchestrator (?=[a-z])")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    for target in _LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=str)
def test_yaml_can_be_read(block):
    assert list(yaml.safe_load_all("\n".join(block.lines)))


def test_blocks_say_what_becomes_of_them():
    for block in BLOCKS:
        assert block.note in ("", LATER) or block.note.startswith(NOT_RUN) or block.language not in (SHELL, CONSOLE)
        if block.language in (SHELL, CONSOLE) and block.page.parent != ROOT:
            assert block.note or block.language == CONSOLE, f"{block}: say how it is run, or why not"
        if block.language == "":
            assert not _PRODUCT.search(block.text.partition("\n")[0]), f"{block}: a command is bash or console"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == SHELL], ids=str)
def test_every_command_and_key_exists(block, monkeypatch, capsys):
    """Also of commands that are not run: configurations are composed, options looked up in the verb's help."""
    monkeypatch.chdir(ROOT)
    for verb, words in product_commands(block):
        if verb == "launch" and any(word.startswith("engine=") for word in words):
            # The words of `train`, but for the engine and the verb's own options.
            own = [word for word in words if word.partition("=")[0] != "dry_run"]
            verb, words = "train", [f"launch={word[7:]}" if word.startswith("engine=") else word for word in own]
        if verb == "train":
            if not {"--config-dir", "-m", "--cfg", "--help"} & set(words) and "=mine" not in " ".join(words):
                compose(words)
            continue
        names = [verb, words[0]] if verb in ("data", "checkpoint") else [verb]
        assert cli.main([*names, "--help"]) == 0
        options = set(re.findall(r"^  (\w+)=", capsys.readouterr().out, re.MULTILINE))
        for key in [word.partition("=")[0] for word in words if re.match(r"\w+=", word)]:
            assert (
                key in options or verb in ("plan", "rehearse", "launch", "coordinate-check") or "handover" in names
            ), f"{block}: {verb} has no {key}="


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == CONSOLE and not b.note], ids=str)
def test_what_is_printed_is_what_the_command_prints(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    first, *expected = block.lines
    (_, words), *_ = product_commands(Block(block.page, block.line, SHELL, "", [first]))
    printed = io.TextIOWrapper(
        io.BytesIO(), encoding="utf-8"
    )  # a plan is drawn with other characters where it has to be
    with contextlib.redirect_stdout(printed):
        cli.main(["plan", *words])
    printed.seek(0)
    assert_shown(expected, printed.read().splitlines())


def assert_shown(expected: list[str], printed: list[str]) -> None:
    """Lines of a page against those of the product; a line `...` stands for any number of them."""
    pattern = "".join(".*" if line == "..." else re.escape(line.rstrip() + "\n") for line in expected)
    found = "".join(line.rstrip() + "\n" for line in printed)
    assert re.fullmatch(pattern, found, re.DOTALL), f"the page is not what is printed:\n{found}"


def product_commands(block: Block) -> Iterator[tuple[str, list[str]]]:
    """Verb and words of every command of the product in a block, but for what the reader fills in (`...`, `=NAME`)."""
    for line in block.text.splitlines():
        line = re.sub(r"\s+#.*$", "", line.strip().removeprefix("$ "))
        found = re.match(r".*?(?:-m |^)orchestrator (.*)|(?:.*/)?scripts/(train\b.*)", line)
        if found:
            text = found[1] or found[2]
            if text.count("'") % 2:
                text = text.rstrip("'")  # of what is quoted for another shell
            verb, *words = [
                word for word in shlex.split(text) if word not in ("...", "&") and not re.search("=[A-Z]+$", word)
            ]
            yield verb, words
