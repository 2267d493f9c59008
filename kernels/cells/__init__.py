"""The cells: one page of mathematics each.

A page is a module of this folder with

    GATES, STATES           one letter each; the first state is h, the one that meets the recurrent weights
    step(x, h, state)       -> new states, what the gradient needs
    grad(dnew, new, state, saved)
                            -> gradient of x, of h, of state

where every argument is a tuple over gates or states and every element stands for one unit of one batch row (or an
array or tile of them). Who drives time, memory and hardware takes the page as a parameter: a module put here is found
by name, and every backend runs it at once.

A page may name its CANDIDATE, the gate whose activation is what is written into the state. It may have weights of its
own, one per unit: with UNITS, a tuple of their names, step takes a fourth argument, and
grad, which then gives a fourth group, a fifth. A page without grad gives the new states alone and gets its gradient by
`derive`.

Every cell also has variants, in which states are reset, held or mixed from one instant to the next: `weave.py`. Their
names are the cell's with what is woven in, as in "lstm+reset+zoneout(0.1,0.05)".

A page may also show the recurrent weights a value of its own, by `recurrent(gate, value)`. It has a step alone, and its
instant takes two products: kernels then run another cell, in two instants for each (`phases.py`).

A page that stands elsewhere is made a cell by `made` and found by its name after `define`.
"""

import importlib
import pkgutil
from dataclasses import replace
from functools import cache

from ..cell import Cell as Cell
from ..cell import activation as activation
from ..cell import grad_graph as grad_graph
from ..cell import label as label
from ..cell import made as made
from ..cell import operand_grad_graph as operand_grad_graph
from ..cell import operand_graph as operand_graph
from ..cell import reads as reads
from ..cell import step_graph as step_graph
from ..emit import assignments
from ..modifiers import Option, named, read, woven

NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
DEFINED: dict[str, "Cell"] = {}  # of pages from elsewhere


@cache
def get(name: str) -> Cell:
    """The cell of that name, or a ValueError that names them all."""
    base, *parts = name.split("+")
    if base not in NAMES and base not in DEFINED:
        raise ValueError(f"unknown cell {base!r}; there are {', '.join((*NAMES, *DEFINED))}")
    if name in DEFINED:
        return DEFINED[name]
    options, own = read(parts), {}
    if base not in DEFINED:
        page = importlib.import_module(f"{__name__}.{base}")
        if not parts:
            grad, units = getattr(page, "grad", None), getattr(page, "UNITS", ())
            cell = made(name, page.GATES, page.STATES, page.step, grad, units)
            return replace(cell, candidate=getattr(page, "CANDIDATE", ""))
        own = {word: options.pop(word) for word in getattr(page, "VARIANTS", ()) if word in options}
    if own:
        gates, units, step, *others = page.variant(**own)
        (states,) = others or (page.STATES,)
        cell = replace(made(name, gates, states, step, None, units), candidate=getattr(page, "CANDIDATE", ""))
        if "norm" in own:
            groups = ("".join(gate for gate in group if gate in gates) for group in page.TOGETHER)
            cell = replace(cell, together=tuple(groups))
    else:
        cell = get(base)
    return woven(name, cell, **options) if options else cell


def define(cell: Cell) -> Cell:
    """Have a cell of a page from elsewhere found by its name -> the cell, perhaps under a name with a number.

    A name keeps its page: another page gets "mgu#2", so that layers and compiled programs with the one before stay what
    they are. The same page again is the cell that is there already. ValueError for a name that isn't an identifier, or
    that of a page in this folder.
    """
    if not all(map(str.isidentifier, cell.name.split("."))) or cell.name.lower() in NAMES:
        raise ValueError(f"a cell can't be named {cell.name!r}; it takes an identifier, and not {', '.join(NAMES)}")
    named, number = cell, 1
    while written(there := DEFINED.setdefault(named.name, named)) != written(cell):
        number += 1
        named = replace(cell, name=f"{cell.name}#{number}")
    return there


def written(cell: Cell) -> tuple:
    """All that a page says."""
    code = (assignments(graph, repr) for graph in (step_graph(cell.run), grad_graph(cell.run)))
    return cell.gates, cell.states, cell.units, *code


def weave(cell: Cell, **options: Option) -> Cell:
    """The cell with any of its page's own variants, and of

    reset    a flag by which states are replaced before the instant: by zero, or by one `given` for every unit
    given    (with reset)
    hold     a flag by which an instant leaves the states as they are
    dropout  a factor for what the recurrent weights see of h
    candidate  a factor for what the page writes into the state, in the place of that
    zoneout  a probability per state by which it stays what it was; with `mean` by so much, as after training
    mean     (with zoneout)
    """
    return get("+".join([cell.name, *(named(word, value) for word, value in sorted(options.items()) if value)]))
