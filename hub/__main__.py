"""python -m hub: the Triton kernels in the layout of Hugging Face's kernels hub, written from the same sources.

Copied is what imports reach from `edition/`, from the Triton backend and from the cells' definitions, both of which are
found by name. So the edition follows the sources by itself. On the way

    imports     of the package's own modules become relative: the hub loads a kernel under a name that it makes up
    operators   get the namespace that the hub's builder makes for every build, so that versions live side by side
    NumPy       is imported by what takes something from it, no longer by modules: here nothing needs to
    backends    are Triton alone
"""

import argparse
import ast
import re
import runpy
import shutil
import tomllib
from collections.abc import Iterator
from itertools import accumulate, takewhile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
EDITION = ROOT / "hub" / "edition"
PACKAGE = "gpu_rnn"
BACKENDS = ("triton",)
OPERATOR = re.compile(rf"{PACKAGE}::(\w+)")
OWN = {
    "": EDITION / "__init__.py",
    "layers": EDITION / "layers.py",
    "_numpy": EDITION / "_numpy.py",
}
GENERATED = "_ops"  # by the hub's builder: `add_op_namespace_prefix(name)`, and `ops`, torch.ops of that namespace


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hub", description="Write the edition for the kernels hub.")
    parser.add_argument("--out", type=Path, default=ROOT / ".build" / "hub", help="folder (.build/hub)")
    parser.add_argument("--repo", required=True, help="where it is to be uploaded to: OWNER/NAME")
    options = parser.parse_args()
    write(options.out, options.repo)
    print(f"wrote {options.out}")


def write(out: Path, repo: str) -> None:
    package = out / "torch-ext" / PACKAGE
    shutil.rmtree(package, ignore_errors=True)
    for place, text in modules().items():
        (package / place).parent.mkdir(parents=True, exist_ok=True)
        (package / place).write_text(text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = runpy.run_path(str(ROOT / PACKAGE / "version.py"))["VERSION"]
    build = (EDITION / "build.toml").read_text()
    major = version.partition(".")[0]
    (out / "build.toml").write_text(build.format(**project, major=major, repo=repo))
    for file in (ROOT / "LICENSE", EDITION / "CARD.md", EDITION / "flake.nix"):
        shutil.copy(file, out)


def modules() -> dict[Path, str]:
    """Every module of the edition, by its place in the package."""
    cells = [f"kernels.cells.{file.stem}" for file in (ROOT / "kernels" / "cells").glob("[!_]*.py")]
    waiting = [*OWN, *(f"backends.{name}" for name in BACKENDS), *cells]
    reached: dict[str, Module] = {}
    while waiting:
        name = waiting.pop()
        if name in reached or (file := source(name)) is None:
            continue
        reached[name] = Module(name, file)
        waiting += [name.rpartition(".")[0], *reached[name].imports()]
    return {module.place: module.rewritten() for module in reached.values()}


def source(name: str) -> Path | None:
    """The file of a module, by its name within the package; None if it is something inside of one."""
    if name in OWN:
        return OWN[name]
    inside = Path(*name.split("."))
    whole = (ROOT if inside.parts[0] == "kernels" else ROOT / PACKAGE) / inside
    return next((file for file in (whole.with_suffix(".py"), whole / "__init__.py") if file.exists()), None)


class Edit(NamedTuple):
    """Bytes of a file, and what stands there instead."""

    start: int
    end: int
    text: str


class Module:
    def __init__(self, name: str, file: Path) -> None:
        self.name = name
        self.source = file.read_bytes()
        self.tree = ast.parse(self.source, str(file))
        self.lines = list(accumulate(map(len, self.source.splitlines(keepends=True)), initial=0))
        parts = name.split(".") if name else []
        is_package = file.name == "__init__.py"
        self.place = Path(*parts, "__init__.py") if is_package else Path(*parts).with_suffix(".py")
        self.package = parts if is_package else parts[:-1]

    def imports(self) -> Iterator[str]:
        """The names of what it may import from the package, modules and what is in them alike."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and (target := self.target(node)) is not None:
                yield ".".join(target)
                yield from (".".join([*target, alias.name]) for alias in node.names)

    def target(self, node: ast.ImportFrom) -> list[str] | None:
        """The module that is imported from, within the package; None for others."""
        parts = node.module.split(".") if node.module else []
        if node.level:
            target = self.package[: len(self.package) + 1 - node.level] + parts
        elif parts[0] == PACKAGE:
            target = parts[1:]
        else:
            return None
        return target

    def relative(self, target: list[str]) -> tuple[str, str]:
        """The dots, and the name after them, by which this module imports another one."""
        shared = len([*takewhile(lambda pair: pair[0] == pair[1], zip(self.package, target))])
        return "." * (len(self.package) - shared + 1), ".".join(target[shared:])

    def rewritten(self) -> str:
        text = self.source
        for start, end, new in sorted(self.edits(), reverse=True):
            text = text[:start] + new.encode() + text[end:]
        return text.decode()

    def edits(self) -> Iterator[Edit]:
        yield from self.own_imports()
        yield from self.operators()
        yield from self.deferred_numpy()
        if self.name == "backends.dispatch":
            yield self.replaced(self.assigned("ORDER"), repr(BACKENDS).replace("'", '"'))

    def own_imports(self) -> Iterator[Edit]:
        for node in ast.walk(self.tree):
            if not isinstance(node, ast.ImportFrom) or (target := self.target(node)) is None:
                continue
            if not node.level:
                dots, name = self.relative(target)
                yield self.replaced(node, ast.unparse(ast.ImportFrom(name, node.names, len(dots))))

    def operators(self) -> Iterator[Edit]:
        edits = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Constant) and (operator := OPERATOR.fullmatch(str(node.value))):
                edits.append(self.replaced(node, f'add_op_namespace_prefix("{operator[1]}")'))
            elif isinstance(node, ast.Attribute) and ast.unparse(node) == f"torch.ops.{PACKAGE}":
                edits.append(self.replaced(node, "ops"))
        if edits:
            last = [node for node in self.tree.body if isinstance(node, (ast.Import, ast.ImportFrom))][-1]
            end = self.replaced(last, "").end
            dots, name = self.relative([GENERATED])
            edits.append(Edit(end, end, f"\nfrom {dots}{name} import add_op_namespace_prefix, ops"))
        yield from edits

    def deferred_numpy(self) -> Iterator[Edit]:
        for statement in self.tree.body:
            if isinstance(statement, ast.Import) and statement.names[0].name == "numpy":
                name = statement.names[0].asname or "numpy"
                yield self.replaced(statement, f"from {self.relative([])[0]} import _numpy as {name}")
                for node in ast.walk(self.tree):
                    annotation = getattr(node, "returns" if isinstance(node, ast.FunctionDef) else "annotation", None)
                    if annotation and any(ast.unparse(inner) == name for inner in ast.walk(annotation)):
                        yield self.replaced(annotation, f'"{ast.unparse(annotation)}"')

    def assigned(self, name: str) -> ast.expr:
        """What a name of the module is bound to."""
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
                return node.value
        raise ValueError(f"{self.name} assigns no {name}")

    def replaced(self, node: ast.stmt | ast.expr, text: str) -> Edit:
        first, last = self.lines[node.lineno - 1], self.lines[(node.end_lineno or 0) - 1]
        return Edit(first + node.col_offset, last + (node.end_col_offset or 0), text)


if __name__ == "__main__":
    main()
