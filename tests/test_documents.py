"""README.md and the guides: links lead somewhere, README's Python runs, and README stays short."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/NOTES.md")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    """As code hosts make them of headings."""
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    titles = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in titles]  # links by their text
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    prose = FENCE.sub("", document.read_text(encoding="utf-8"))
    inline = re.findall(r"\]\((?!\w+://)([^)#\s]*)(?:#([^)\s]*))?\)", prose)
    for path, anchor in inline + re.findall(r"^\[\w+\]: (?!\w+://)([^#\s]*)(?:#(\S*))?$", prose, re.MULTILINE):
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{document.name} links to {path}"
        assert not anchor or anchor in anchors(target), f"{document.name} links to {path}#{anchor}"


def test_every_figure_is_shown():
    shown = "".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    assert not [path.name for path in (ROOT / "docs" / "figures").iterdir() if f"figures/{path.name})" not in shown]


def test_readme_is_short():
    assert len(README.splitlines()) <= 160


def test_python_of_readme_runs():
    pytest.importorskip("torch")
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["y"].shape == (100, 32, 256)
    assert type(names["model"]["encoder"]).__module__.startswith("gpu_rnn.")


@pytest.mark.parametrize("command", re.findall(r"`make ([\w./-]+)`", README))
def test_commands_of_readme_are_targets(command):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(VENV)", ".venv")
    assert re.search(rf"^(.* )?{re.escape(command)}( .*)?:", makefile, re.MULTILINE)
