"""MkDocs hooks: the README as front page, linked files outside docs/ as pages, formulas as SVG.

The guides link to files by relative path, so that links work in a checkout and on a code host. The site has no
repository around it: here every linked file or folder becomes a page. A link to a missing file stays as it is, and
fails the build (`strict` in mkdocs.yml). Formulas are drawn here, so that pages need no script and no network.
"""

import html
import os
import re
from functools import cache
from pathlib import Path

import ziamath
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
FRONT = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
LINK = re.compile(r"(?:(?<=\]\()|(?<=\]: ))([^)#:\s]+)(?=[)#\n])")  # inline, or by reference
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
FONT_SIZE = 16  # px, of the text around formulas
ziamath.config.svg2 = False  # paths instead of shared symbols, whose ids would collide on a page
LANGUAGES = {".py": "python", ".cu": "cuda", ".cuh": "cuda", ".toml": "toml", ".cpp": "cpp", ".h": "cpp"}
ORIGINS: dict[str, Path] = {}  # path in the site -> the Markdown file in the repository that it shows


def on_files(files, config):
    """Add a page for every file outside docs/ that a page links to, directly or through another page."""
    documents = {ROOT / name for name in FRONT} | set((ROOT / "docs").rglob("*.md"))
    seen: set[Path] = set()
    while documents:
        path = documents.pop()
        seen.add(path)
        address = site_path(path)
        if path.suffix == ".md":
            ORIGINS[address] = path
            documents |= {target for target in targets(path) if target.exists()} - seen
        if (ROOT / "docs") not in path.parents:
            files.append(File.generated(config, address, content=page_text(path)))
    return files


def on_page_markdown(markdown, page, **_):
    origin = ORIGINS.get(page.file.src_uri)
    if origin is None:
        return None

    def rewrite(match):
        target = resolve(origin, match[1])
        return os.path.relpath(site_path(target), Path(page.file.src_uri).parent) if target.exists() else match[1]

    return "".join(part if part.startswith("```") else LINK.sub(rewrite, part) for part in FENCE.split(markdown))


def on_page_content(content, **_):
    return FORMULA.sub(lambda match: draw(html.unescape(match[2]), inline=match[1] == "span"), content)


@cache
def draw(latex, inline):
    formula = ziamath.Latex(latex.replace("{aligned}", "{align*}"), FONT_SIZE, color="currentColor", inline=inline)
    label = html.escape(latex, quote=True)
    kind = f'formula" style="vertical-align: {formula.getyofst():.1f}px' if inline else "formula displayed"
    return formula.svg().replace("<svg ", f'<svg role="img" aria-label="{label}" class="{kind}" ', 1)


def targets(path):
    prose = "".join(part for part in FENCE.split(path.read_text()) if not part.startswith("```"))
    return {resolve(path, link) for link in LINK.findall(prose)}


def resolve(path, link):
    return Path(os.path.normpath(path.parent / link))


def site_path(path):
    """The address of a repository's file in the site."""
    inside = path.relative_to(ROOT)
    if inside == Path("README.md"):
        return "index.md"
    if inside.parts[0] == "docs":
        return Path(*inside.parts[1:]).as_posix()
    if path.suffix == ".md":
        return inside.as_posix()
    return f"source/{inside.as_posix()}{'/index' * path.is_dir()}.md"


def page_text(path):
    if path.suffix == ".md":
        return path.read_text()
    inside = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        names = sorted(child.name + "/" * child.is_dir() for child in path.iterdir() if child.name != "__pycache__")
        return "\n".join([f"# {inside}/", "", *(f"- `{name}`" for name in names), ""])
    return f"# {inside}\n\n~~~~ {{.{LANGUAGES.get(path.suffix, 'text')} linenums=1}}\n{path.read_text()}\n~~~~\n"
