"""The cell definitions: the mathematics of each cell, once.

A cell definition is a module of this folder with

    GATES, STATES           one letter each; the first state is h, which the recurrent weights are applied to
    step(x, h, state)       -> new states, values saved for grad
    grad(dnew, new, state, saved)
                            -> gradients of x, of h, of state

Every argument is a tuple over gates or states: x the input projection and h the recurrent projection of each gate,
state the states before the time step. An element stands for one hidden unit of one sequence, or for an array or tile of
them. The time loop, memory and hardware are the backends' part, which take the definition as a parameter: a module put
here is found by its name, and every backend runs it. A module of several cells has CELLS, {name: (step, grad)}.

Optional are

    CANDIDATE               the gate whose activation is written into the state
    UNITS                   names of trainable values, one per hidden unit each: step takes a fourth argument, grad a
                            fifth, and grad returns a fourth tuple, their gradients
    VARIANTS, variant(...)  names of variants, and what defines the cell with some of them
    TOGETHER                gates that layer normalization takes together

Without grad, step returns the new states alone, and the gradient is derived (`autodiff.derive`). A definition may apply
the recurrent weights to a value of its own, by `recurrent(gate, value)`. It has no grad then, each of its time steps
takes two matmuls, and kernels run a lowered cell, which takes two steps for each (`two_pass.py`).

Modifiers reset, hold or mix the states of any cell from one time step to the next (`modifiers.py`). The name of a
modified cell lists them, as in "lstm+reset+zoneout(0.1,0.05)".

A cell defined elsewhere is made by `make_cell`, and found by its name after `register`.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import ModuleType

from ..cell import Cell as Cell
from ..cell import activation as activation
from ..cell import grad_graph as grad_graph
from ..cell import label as label
from ..cell import make_cell as make_cell
from ..cell import reads as reads
from ..cell import recurrent_input_grad_graph as recurrent_input_grad_graph
from ..cell import recurrent_input_graph as recurrent_input_graph
from ..cell import step_graph as step_graph
from ..emit import assignments
from ..modifiers import Option, build_modified, format_option, parse_options

REGISTERED: dict[str, "Cell"] = {}  # cells defined elsewhere
LIBRARIES: dict[str, Callable[[str], object]] = {}  # what defines "library.name" elsewhere, once it is looked up


def definitions() -> dict[str, ModuleType]:
    """{name of a cell of this folder: its module}."""
    stems = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = {stem: importlib.import_module(f"{__name__}.{stem}") for stem in stems}
    return {name: module for stem, module in modules.items() for name in getattr(module, "CELLS", [stem])}


MODULES = definitions()
NAMES = tuple(sorted(MODULES))


@cache
def get(name: str) -> Cell:
    """Return the cell of that name, modifiers included. ValueError, with all names, for an unknown one."""
    base, *parts = name.split("+")
    library, _, short = base.partition(".")
    if base not in REGISTERED and library in LIBRARIES:
        LIBRARIES[library](short)
    if base not in MODULES and base not in REGISTERED:
        raise ValueError(
            f"unknown cell {base!r}; there are {', '.join((*NAMES, *REGISTERED))}, and a cell of gpu_rnn.cell once the "
            "module that defines it is imported"
        )
    if name in REGISTERED:
        return REGISTERED[name]
    options, own = parse_options(parts), {}
    if base not in REGISTERED:
        module = MODULES[base]
        candidate = getattr(module, "CANDIDATE", "")
        if not parts:
            own_functions = getattr(module, "step", None), getattr(module, "grad", None)
            step, grad = getattr(module, "CELLS", {}).get(base, own_functions)
            cell = make_cell(name, module.GATES, module.STATES, step, grad, getattr(module, "UNITS", ()))
            return replace(cell, candidate=candidate)
        own = {word: options.pop(word) for word in getattr(module, "VARIANTS", ()) if word in options}
    if own:
        gates, units, step, *others = module.variant(**own)
        (states,) = others or (module.STATES,)
        cell = replace(make_cell(name, gates, states, step, None, units), candidate=candidate)
        if "norm" in own:
            groups = ("".join(gate for gate in group if gate in gates) for group in module.TOGETHER)
            cell = replace(cell, norm_groups=tuple(groups))
    else:
        cell = get(base)
    return build_modified(name, cell, **options) if options else cell


def register(cell: Cell) -> Cell:
    """Register a cell defined elsewhere, to be found by its name. Return the registered cell.

    A name keeps its definition: a different one gets "mgu#2", so that layers and compiled programs with the one before
    stay what they are. An equal definition returns the cell that is registered already. ValueError for a name that
    isn't an identifier, or that of a cell in this folder.
    """
    if not all(map(str.isidentifier, cell.name.split("."))) or cell.name.lower() in NAMES:
        raise ValueError(f"a cell can't be named {cell.name!r}; it takes an identifier, and not {', '.join(NAMES)}")
    named, number = cell, 1
    while fingerprint(registered := REGISTERED.setdefault(named.name, named)) != fingerprint(cell):
        number += 1
        named = replace(cell, name=f"{cell.name}#{number}")
    return registered


def fingerprint(cell: Cell) -> tuple:
    """All that a cell definition says, to compare by."""
    code = (assignments(graph, repr) for graph in (step_graph(cell.kernel_cell), grad_graph(cell.kernel_cell)))
    return cell.gates, cell.states, cell.per_unit_params, *code


def apply_modifiers(cell: Cell, **options: Option) -> Cell:
    """Return the cell with any of its own variants, and of these modifiers:

    reset        a flag by which states are replaced before the time step: by zero, or by a `reset_state` of every unit
    reset_state  (with reset)
    hold         a flag by which a time step leaves the states as they are
    dropout      a factor of h where the recurrent weights are applied to it
    candidate    a factor of what is written into the state, instead of that of h
    zoneout      a probability per state that it stays what it was; with `mean` its expectation, as after training
    mean         (with zoneout)
    """
    return get("+".join([cell.name, *(format_option(word, value) for word, value in sorted(options.items()) if value)]))
