"""`python -m orchestrator compare`: runs side by side."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from orchestrator.config.options import describe_options, option, parse_options
from orchestrator.errors import ConfigError

_PROGRAM = "python -m orchestrator compare"
_PAGE = "compare.html"


@dataclass(frozen=True)
class CompareOptions:
    """Options of `compare`."""

    html: str | None = option(
        "auto", help=f"page with the curves, a new file; auto: {_PAGE}, with a number if that is there; none: no page"
    )
    json: bool = option(False, help="print JSON")
    runs_dir: str = option("runs", help="where latest and names look")


def main(argv: list[str]) -> int:
    """Run the verb; `argv` is what follows `compare`. Returns the exit status.

    Raises:
        UserError: wrong options, a run that is not there, or a page that cannot be written.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(f"usage: {_PROGRAM} RUN RUN ... [key=value ...]\n")
        print("Compare runs: losses, tokens, throughput, time, and the keys of the configuration that differ.")
        print("RUN is latest, a run directory, or the name of a run, whose newest one is meant.\n")
        print(f"{describe_options(CompareOptions)}\n\nExample: {_PROGRAM} tiny llama_20m html=compare.html")
        return 0
    own = [
        word for word in argv if word.startswith("-") or word.partition("=")[0] in CompareOptions.__dataclass_fields__
    ]
    options = parse_options(CompareOptions, own)

    from orchestrator.api.comparing import compare

    comparison = compare([word for word in argv if word not in own], runs_dir=options.runs_dir)
    page = options.html
    if page is not None:
        page = str(comparison.write_html(_new_page() if page == "auto" else Path(page).expanduser()))
    if options.json:
        print(json.dumps({"runs": comparison.table, "differences": comparison.differences, "page": page}, indent=2))
    else:
        print(comparison)
        if page is not None:
            print(f"\npage       {page}")
    return 0


def _new_page() -> Path:
    """Return a name for the page that no file has yet."""
    names = itertools.chain([_PAGE], (f"compare-{number}.html" for number in range(2, 10_000)))
    for name in names:
        if not Path(name).exists():
            return Path(name)
    raise ConfigError(f"there are too many pages of that name here: {_PAGE}", fix="name another one: html=PATH")
