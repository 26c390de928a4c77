"""`python -m orchestrator compare`: runs, or certificates, side by side."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.config.options import describe_options, option, parse_options
from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.certify.differences import Sides

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
        print("Of certificates (certificate.json files): the cases, losses and versions in which two vendors differ.\n")
        print(f"{describe_options(CompareOptions)}\n\nExamples")
        print(f"  {_PROGRAM} tiny llama_20m html=compare.html")
        print(f"  {_PROGRAM} docs/certificates/cpu.json certificates/trn2/certificate.json")
        return 0
    own = [
        word for word in argv if word.startswith("-") or word.partition("=")[0] in CompareOptions.__dataclass_fields__
    ]
    options = parse_options(CompareOptions, own)
    words = [word for word in argv if word not in own]
    if _are_certificates(words):
        return _compare_certificates(words, options)

    from orchestrator.api.comparing import compare

    comparison = compare(words, runs_dir=options.runs_dir)
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


def _are_certificates(words: list[str]) -> bool:
    """Whether certificates are meant: files, or folders with a certificate and no run in them.

    Raises:
        ConfigError: some of them are, and others are not.
    """
    from orchestrator.certify.certificate import FILE

    found = [word.endswith(".json") or (Path(word) / FILE).is_file() for word in words]
    if any(found) and not all(found):
        got = ", ".join(words)
        raise ConfigError("runs are compared with runs, and certificates with certificates", got=got)
    return any(found)


def _compare_certificates(words: list[str], options: CompareOptions) -> int:
    from orchestrator.certify.certificate import read
    from orchestrator.certify.differences import Sides
    from orchestrator.report.certificate_page import write_comparison_page

    if len(words) < 2:
        raise ConfigError("two certificates or more are compared", got=", ".join(words))
    sides, page = Sides.of([read(Path(word)) for word in words]), options.html
    tables = _tables(sides)
    if page is not None:
        path = _new_page() if page == "auto" else Path(page).expanduser()
        try:
            write_comparison_page(path, f"Certificates: {' and '.join(sides.labels)}", tables)
        except FileExistsError:
            raise ConfigError("there is a file of that name", got=path, fix="name another one") from None
        except OSError as error:
            raise ConfigError(f"the page cannot be written: {error.strerror or error}", got=path) from None
        page = str(path)
    if options.json:
        print(json.dumps({**sides.to_dict(), "page": page}, indent=2))
        return 0
    from orchestrator.report.run_text import aligned

    for heading, names, rows in tables:
        print(f"{heading}\n" + (aligned([names, *rows]) if rows else "nothing") + "\n")
    if page is not None:
        print(f"page       {page}")
    return 0


def _tables(sides: Sides) -> list[tuple[str, list[str], list[list[str]]]]:
    losses = [
        [
            f"{apart.one} and {apart.other}",
            apart.layouts,
            "not finite" if apart.losses is None else f"{apart.losses:.1e}",
            str(apart.step),
            f"{apart.allowed:.1e}",
            "agrees" if apart.agrees else "differs",
        ]
        for apart in sides.losses()
    ]
    verdicts = [[line] for line in sides.verdicts()]
    if not sides.comparable:
        verdicts.append(["they were held against different references: versions of orchestrator that are far apart"])
    return [
        ("Certificates", ["", *sides.labels], sides.results()),
        ("Verdicts that differ", ["case"], verdicts),
        ("Losses", ["between", "layout", "largest difference", "at step", "allowed", "verdict"], losses),
        ("Measured values that differ, on the worst layout", ["case", *sides.labels], sides.cases()),
        ("Devices and software that differ", ["key", *sides.labels], sides.facts()),
    ]


def _new_page() -> Path:
    """Return a name for the page that no file has yet."""
    names = itertools.chain([_PAGE], (f"compare-{number}.html" for number in range(2, 10_000)))
    for name in names:
        if not Path(name).exists():
            return Path(name)
    raise ConfigError(f"there are too many pages of that name here: {_PAGE}", fix="name another one: html=PATH")
