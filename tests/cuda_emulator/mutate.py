"""Remove one barrier of a kernel, to see that a test notices.

    library = compile([DEVICE, Source("persistent.cu", switchable(text))])
    for n, barrier in enumerate(barriers(text)):
        library.launch(..., without=n)

compiles once for all of them; without(text, n) is a text for a compilation of its own. A barrier that no
schedule, sanitizer or deadlock misses is either superfluous or not tested."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# Statements that order what threads do. A kernel's own helpers can be added: barriers(text, (*BARRIERS,
# "exchange")).
BARRIERS = (
    "__syncthreads",
    "__syncwarp",
    "named_barrier_sync",
    "cluster_sync",
    "mbarrier_arrive_expect_tx",
    "mbarrier_wait_cluster",
)


class Barrier(NamedTuple):
    """One synchronization statement."""

    line: int  # from 1
    text: str
    function: str  # that it stands in
    start: int
    end: int  # of the call, without its semicolon


def barriers(text: str, names: Sequence[str] = BARRIERS) -> list[Barrier]:
    """The statements of `text` that call one of `names`, in order."""
    code = _blank_out(text)
    functions = list(_functions(code))
    pattern = re.compile(rf"(?<![\w.:])(?:{'|'.join(map(re.escape, names))})\s*\(")
    result = []
    for match in pattern.finditer(code):
        end = _after_bracket(code, match.end() - 1)
        before = code[: match.start()].rstrip()
        starts_statement = before.endswith((";", "{", "}", ")", ":", "else", "do"))
        if not starts_statement or not code[end:].lstrip().startswith(";"):
            continue  # a definition, or part of an expression
        inside = [name for name, first, last in functions if first < match.start() < last]
        if inside:
            line = text.count("\n", 0, match.start()) + 1
            result.append(Barrier(line, text[match.start() : end], inside[0], match.start(), end))
    return result


def without(text: str, n: int, names: Sequence[str] = BARRIERS) -> str:
    """`text` without its n-th barrier. Lines keep their numbers, and an `if` before it keeps its (empty)
    statement."""
    barrier = barriers(text, names)[n]
    return text[: barrier.start] + re.sub(r"[^\n]", " ", barrier.text) + text[barrier.end :]


def switchable(text: str, names: Sequence[str] = BARRIERS) -> str:
    """`text` in which Library.launch(without=n) removes the n-th barrier."""
    for n, barrier in reversed(list(enumerate(barriers(text, names)))):
        switched = f"(host::without == {n} ? void() : void({barrier.text}))"
        text = text[: barrier.start] + switched + text[barrier.end :]
    return text


def _blank_out(text: str) -> str:
    """`text` with comments, strings and preprocessor lines as spaces, everything else in its place."""
    pattern = r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'|^[ \t]*#(?:\\\n|[^\n])*"
    blanks = re.compile(r"[^\n]")
    return re.sub(pattern, lambda match: blanks.sub(" ", match[0]), text, flags=re.DOTALL | re.MULTILINE)


def _after_bracket(code: str, position: int) -> int:
    """Behind the bracket that closes the one at `position`."""
    depth = 0
    for i in range(position, len(code)):
        depth += (code[i] in "({[") - (code[i] in ")}]")
        if depth == 0:
            return i + 1
    return len(code)


def _functions(code: str) -> Iterator[tuple[str, int, int]]:
    """(name, start and end of the body) of functions, also of those in a struct."""
    for match in re.finditer(r"\b(\w+)\s*\(", code):
        behind = _after_bracket(code, match.end() - 1)
        body = re.match(r"\s*(?:const\s*)?\{", code[behind:])
        if body and match[1] not in ("if", "for", "while", "switch"):
            start = behind + body.end() - 1
            yield match[1], start, _after_bracket(code, start)
