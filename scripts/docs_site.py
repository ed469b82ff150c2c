"""What MkDocs asks while it builds the site: pages from outside of docs/, links to them, lists.

The Markdown files are written for GitHub. Here a link out of docs/ becomes one to a page of the
site: README and its neighbors are pages, a linked source file is shown, a picture is copied. Lists
are indented as Python-Markdown wants them.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))
import docs_reference  # noqa: E402

TOP = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
"""Pages beside docs/, and their places in the site."""
_LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)(?=[)#])")
_FENCE = re.compile(r"^ *(```|~~~)")
_ITEM = re.compile(r"^( *)(?:[-*+]|\d+\.) ")


def on_files(files: Files, config: Any) -> Files:
    """Add what stands outside of docs/ and what code writes."""
    for path, place in TOP.items():
        files.append(File.generated(config, place, content=(ROOT / path).read_text("utf-8")))
    for place, text in docs_reference.pages().items():
        files.append(File.generated(config, place, content=text))
    for path in sorted(_linked()):
        if path.suffix in (".png", ".svg"):
            made = File.generated(config, _place(path), abs_src_path=str(path))
        else:
            made = File.generated(config, _place(path), content=_shown(path))
        files.append(made)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to files into links to pages, and indent lists."""
    place = page.file.src_uri
    homes = {place: path for path, place in TOP.items()}
    home = ROOT / homes.get(place, f"docs/{place}")
    if not home.is_file():
        return markdown

    def lead(link: re.Match[str]) -> str:
        target = (home.parent / link[1]).resolve()
        if not target.exists():
            return link[1]
        return posixpath.relpath(_place(target), posixpath.dirname(place) or ".")

    return indented(_LINK.sub(lead, markdown))


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Load a script of the site's own where the theme's offline plugin loads one from elsewhere."""
    return _ours(output, page.url)


def on_post_template(output_content: str, template_name: str, **_: Any) -> str:
    """Do so on the page of an unknown address."""
    return _ours(output_content, template_name)


def _ours(page: str, url: str) -> str:
    script = get_relative_url("assets/search-from-file.js", url)
    return re.sub(r'(<script src=")https?://[^"]*(?=">)', rf"\1{script}", page)


def _linked() -> set[Path]:
    """Return the files outside of docs/ that pages link to."""
    found = set()
    for page in [*(ROOT / "docs").glob("*.md"), *(ROOT / path for path in TOP)]:
        for link in _LINK.findall(page.read_text("utf-8")):
            target = (page.parent / link).resolve()
            if target.exists() and _place(target).startswith("source/"):
                found.add(target)
    return found


def _place(path: Path) -> str:
    """Return the place in the site of a file of the project."""
    name = path.relative_to(ROOT).as_posix()
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    picture = path.suffix in (".png", ".svg")
    return TOP.get(name) or f"source/{name}{'' if picture else '.md'}"


def _shown(path: Path) -> str:
    """Return a page with the text of a file, or of the files in a folder."""
    lines = [f"# {path.relative_to(ROOT)}", ""]
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            heading = [f"## {file.name}", ""] if path.is_dir() else []
            language = {".py": "python", ".yaml": "yaml", ".json": "json"}.get(file.suffix, "text")
            lines += [*heading, f"````{language}", file.read_text("utf-8").rstrip(), "````", ""]
    return "\n".join(lines)


def indented(markdown: str) -> str:
    """Give lists four spaces a level and a blank line before them, as Python-Markdown wants.

    GitHub indents by the width of the bullet.
    """
    lines: list[str] = []
    open_items: list[int] = []  # the columns at which the texts of the open items start
    fenced = False
    for line in markdown.splitlines():
        item = None if fenced else _ITEM.match(line)
        above = lines[-1].strip() if lines else ""
        column = len(line) - len(line.lstrip(" "))
        if line.strip() and not fenced and (item or not above):
            open_items = [start for start in open_items if start <= column]
        inside = open_items[-1] if open_items else 0
        if item and column < inside + 4:  # not a line of code
            if above and not open_items and not _ITEM.match(lines[-1]):
                lines.append("")
            open_items.append(len(item[0]))
            levels = len(open_items) - 1
        else:
            levels = len(open_items)
        lines.append(" " * (4 * levels - inside if line.strip() else 0) + line)
        fenced ^= bool(_FENCE.match(line))
    return "\n".join(lines) + "\n"
