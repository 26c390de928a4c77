"""Hooks of mkdocs: pages from outside of docs/, links into the repository, and the API pages.

README and its neighbours stay where a reader of the repository looks for them, and are pages of the site, too. A
relative link is written for the repository; here it is turned into one of the site, and a file that is no page is
copied along.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs/"
# file of the repository -> page of the site
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "findings/README.md": "findings.md",
    "recipes/README.md": "recipes.md",
}
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add to the navigation the pages that mkdocs.yml does not name, and the API pages, one per package."""
    assert config.nav is not None
    named = re.findall(r"[\w/-]+\.md", str(config.nav))
    ours = [path.relative_to(ROOT / DOCS).as_posix() for path in sorted((ROOT / DOCS).rglob("*.md"))]
    if more := [page for page in ours if page not in named]:
        config.nav.append({"More": more})
    config.nav.append({"API": [{package: _api_page(package)} for package in packages()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for package in packages():
        files.append(File.generated(config, _api_page(package), content=api(package)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of the repository into those of the site."""
    uri = page.file.src_uri
    source = next((source for source, own in PAGES.items() if own == uri), DOCS + uri)

    def link(found: re.Match[str]) -> str:
        target = normpath(join(dirname(source), found[0]))
        if (ROOT / target).is_dir():
            target = join(target, "README.md")
        if not (ROOT / target).is_file():
            return found[0]  # mkdocs says that it leads nowhere
        if target in PAGES:
            wanted = PAGES[target]
        elif target.startswith(DOCS):
            wanted = target.removeprefix(DOCS)
        else:
            wanted = f"files/{target}"
            if files.get_file_from_path(wanted) is None:
                files.append(File.generated(config, wanted, abs_src_path=str(ROOT / target)))
        return relpath(wanted, dirname(uri) or ".")

    return _LINK.sub(link, markdown)


def packages() -> list[str]:
    """Dotted names of the product's packages, the outermost first."""
    return [_dotted(folder) for folder in sorted({path.parent for path in _modules()})]


def api(package: str) -> str:
    """The page of a package: its docstring, then each of its public modules."""
    folder = ROOT / package.replace(".", "/")
    names = [_dotted(path.with_suffix("")) for path in _modules() if path.parent == folder and path.stem != "__init__"]
    lines = [f"# {package}", "", f"::: {package}", "    options: {members: false, show_root_heading: false}", ""]
    for name in names:
        lines += [f"::: {name}", ""]
    return "\n".join(lines)


def _modules() -> Iterator[Path]:
    for path in sorted((ROOT / "orchestrator").rglob("*.py")):
        if path.stem == "__init__" or not path.stem.startswith("_"):
            yield path


def _dotted(path: Path) -> str:
    return str(path.relative_to(ROOT)).replace(os.sep, ".")


def _api_page(package: str) -> str:
    return f"api/{package}.md"
