"""Links in Markdown, followed offline: is the file there, and the heading that the link names?

A heading has one name on GitHub and another in JupyterLab: "Step 2. Scale" is #step-2-scale on the one and
#Step-2.-Scale on the other. A link into a Markdown file must work on both, so its heading is written in lower
case there. A notebook's headings can be reached in JupyterLab alone (GitHub opens it at the top), so a link into
a notebook has JupyterLab's name.
"""
import functools
import re
from pathlib import Path
from urllib.parse import unquote

import nbformat

# Fences, code spans and formulas, in which signs have other meanings than in prose.
NOT_PROSE = re.compile(r"```.*?```|``.*?``|`[^`]*`|\$\$.*?\$\$|\$[^$\n]*\$", re.DOTALL)
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[(?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*\]\(\s*([^)\s]*)(?:\s+\"[^\"]*\")?\s*\)")
IMAGE = re.compile(r"!\[[^\]]*\]\(\s*([^)\s]*)")
BARE = re.compile(r"(?<![(\w])https?://[^\s<>)\]|]*[^\s<>)\]|.,;:!?*]")
# A host with a name, no user, no port, and nothing that an address cannot hold.
WELL_FORMED = re.compile(r"https://(?:[a-z0-9-]+\.)+[a-z]{2,}(?:/[\w./~%+@=:,-]*)?(?:\?[\w=&%.+-]*)?(?:#[\w./%:=-]+)?")


def prose(text: str) -> str:
    return NOT_PROSE.sub("", text)


def headings(text: str) -> list[str]:
    """What a reader sees of each heading: links, code and emphasis without their marks."""
    found = re.findall(r"^#{1,6} +(.*?)(?: +#+)? *$", FENCE.sub("", text), re.MULTILINE)
    return [re.sub(r"[`*]", "", re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)) for heading in found]


def github_slugs(text: str) -> list[str]:
    slugs = []
    for heading in headings(text):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        before = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in slugs)
        slugs.append(f"{slug}-{before}" if before else slug)
    return slugs


def jupyterlab_ids(text: str) -> list[str]:
    return [heading.replace(" ", "-") for heading in headings(text)]


@functools.cache
def _text(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = nbformat.v4.reads(text).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def anchors(path: Path, text: str | None = None) -> set[str]:
    """The fragments that lead to a heading of this file wherever it is read."""
    text = _text(path) if text is None else text
    if path.suffix == ".ipynb":
        return set(jupyterlab_ids(text))
    return set(github_slugs(text)) & set(jupyterlab_ids(text))


def targets(text: str) -> list[str]:
    text = prose(text)
    found = LINK.findall(text) + IMAGE.findall(text) + BARE.findall(LINK.sub("", text))
    return list(dict.fromkeys(found))


def broken_links(path: Path, text: str, root: Path):
    """Yield what is wrong with the links of `text`, which stands in the file `path` of the project in `root`."""
    for target in targets(text):
        if re.match(r"[a-z]+:", target):
            if not WELL_FORMED.fullmatch(target):
                yield f"the link to {target} is not https://, a host and a path"
            continue
        name, _, fragment = target.partition("#")
        there = (path.parent / unquote(name)).resolve() if name else path.resolve()
        if target in ("", "#") or name.startswith("/") or not there.is_relative_to(root.resolve()):
            yield f"the link to {target!r} leads out of the project"
        elif name and not there.exists():
            yield f"the link to {target} leads nowhere"
        elif "#" in target and there.suffix not in (".md", ".ipynb"):
            yield f"the link to {target} names a heading, and only .md and .ipynb files have some"
        elif "#" in target:
            known = anchors(there, None if name else text)
            if unquote(fragment) not in known:
                yield f"the link to {target} names no heading; there are: {', '.join(sorted(known))}"
