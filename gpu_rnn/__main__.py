"""The command line: `gpu-rnn` or `python -m gpu_rnn`, with info, demo, compare-cells, explain and bench."""

import math
import os
import platform
import runpy
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu_rnn.kernels import cells

from . import __version__
from .backends import dispatch
from .core import arrays
from .core.optional_imports import install, installed, missing, no_gpu, require
from .core.problem import Problem

if absent := [name for name in ("click", "rich") if not installed(name)]:
    print(f"Error: gpu-rnn's commands need {' and '.join(absent)}: {install('rich')}", file=sys.stderr)
    raise SystemExit(2)

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

LIBRARIES = ("numpy", "torch", "triton", "cupy", "matplotlib")
SIZE = click.IntRange(min=1)


class Refused(click.ClickException):
    """One line, and exit status 2."""

    exit_code = 2


class Seconds(click.FloatRange):
    """A time that ends."""

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return seconds


class Commands(click.Group):
    """Whose output may go where there is no room for it, or where it isn't read to its end."""

    def main(self, *args: Any, **keywords: Any) -> Any:
        try:
            try:
                return super().main(*args, **keywords)
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()
        except OSError as error:
            if error.filename is not None:  # not the output's
                raise
            with suppress(OSError):  # what is left in the buffer would be tried again at the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if not isinstance(error, BrokenPipeError):
                with suppress(OSError):
                    click.echo(f"Error: the output can't be written: {error.strerror or error}", err=True)
            raise SystemExit(1) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Recurrent layers as fused CUDA and Triton kernels, and C++ for the CPU."""
    try:
        dispatch.requested_backend()
    except ValueError as error:
        raise Refused(f"${dispatch.VARIABLE}: {error}") from error


@main.command()
def info() -> None:
    """List the backends that this machine can run, and why it cannot run the others."""
    system = Table(show_header=False, box=None)
    system.add_row("gpu_rnn", __version__)
    system.add_row("Python", f"{platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPUs")
    for name in LIBRARIES:
        system.add_row(name, Text(missing(name) or sys.modules[name].__version__))
    for gpu in gpus():
        system.add_row("GPU", Text(gpu))
    if forced := dispatch.requested_backend():
        system.add_row(f"${dispatch.VARIABLE}", forced)

    sample = {place: Problem(cells.get("lstm"), 64, 32, 128, 128, device=place, library=library(place))
              for place in ("cpu", "cuda")}  # fmt: skip
    backends = Table("backend", *(f"arrays on {place}" for place in sample), show_lines=True)
    for name in dispatch.ORDER:
        backends.add_row(name, *(Text("\n".join(availability(name, problem))) for problem in sample.values()))

    console = Console()
    console.print(system)
    console.print(backends)
    console.out("for lstm T=64 B=32 I=128 H=128 float32; for other calls: python -m gpu_rnn explain", highlight=False)


def gpus() -> list[str]:
    if reason := no_gpu():
        return [reason]
    if missing("torch") is None and (cuda := require("torch", "info").cuda).is_available():
        devices = [cuda.get_device_properties(k) for k in range(cuda.device_count())]
        return [
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} multiprocessors, "
            f"{gpu.total_memory / 2**30:.0f} GiB" for gpu in devices
        ]  # fmt: skip
    runtime = require("cupy", "info").cuda.runtime
    return [runtime.getDeviceProperties(k)["name"].decode() for k in range(runtime.getDeviceCount())]


def library(place: str) -> str:
    """Whose arrays could be there."""
    return "torch" if missing("torch") is None else {"cpu": "numpy", "cuda": "cupy"}[place]


def availability(name: str, problem: Problem) -> list[str]:
    reasons = dispatch.backend(name).reasons(problem)
    return [f"no: {reason}" for reason in reasons] or [f"yes: {dispatch.backend(name).plan(problem)}"]


@main.command()
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="A UTF-8 text to learn; without it Python's own standard library.")  # fmt: skip
@click.option("--seconds", type=Seconds(), default=45.0, show_default=True,
              help="How long to train.")  # fmt: skip
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("demo"), show_default=True,
              help="Folder for the figures.")  # fmt: skip
def demo(text: Path | None, seconds: float, out: Path) -> None:
    """Train a character-level LSTM on real text, let it write, and draw what its gates do."""
    for name in ("torch", "matplotlib"):
        if missing(name):
            raise Refused(f"the demo needs {name}: {missing(name)}; {install('rich')} brings all of it")
    from .tools.demo import TextError, run

    try:
        run(text, seconds, out, Console())
    except (TextError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise
        raise Refused(str(error)) from error


@main.command("compare-cells")
@click.argument("cell", nargs=-1, metavar="[CELL]...")
@click.option("--task", "tasks", type=click.Choice(["adding", "copy", "digits"]), multiple=True,
              help="Task, may be repeated; default: all that can run.")  # fmt: skip
@click.option("--steps", type=SIZE, default=200, show_default=True, help="Training steps for each cell and task.")
@click.option("-T", "--length", type=click.IntRange(min=2), default=100, show_default=True,
              help="Sequence length of the adding and copy tasks.")  # fmt: skip
@click.option("-H", "--hidden", type=SIZE, default=64, show_default=True, help="Hidden size.")
@click.option("-L", "--layers", type=SIZE, default=1, show_default=True, help="Number of layers.")
@click.option("-B", "--batch", type=SIZE, default=32, show_default=True, help="Batch size.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), default=3e-3, show_default=True,
              help="Learning rate.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights and data.")
@click.option("--backend", type=click.Choice(dispatch.ORDER), help="Default: native on a CPU with a C++ compiler.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("comparison"), show_default=True,
              help="Folder for the curves.")  # fmt: skip
def compare_cells(cell: tuple[str, ...], tasks: tuple[str, ...], out: Path, **settings: Any) -> None:
    """Train cells on the adding problem, copy memory and permuted digits, and compare them.

    CELL is a name of gpu_rnn.cells, or RNN, LSTM or GRU; default: LSTM GRU JANET LightRU LEM.
    """
    for name in ("torch", "matplotlib", *["sklearn"] * ("digits" in tasks)):
        if missing(name):
            raise Refused(f"the comparison needs {name}: {missing(name)}; {install('sklearn')} brings all of it")
    from .cells import __all__ as known
    from .tools.compare_cells import OTHERS, TASKS, Settings, run

    chosen = cell or ("LSTM", "GRU", "JANET", "LightRU", "LEM")
    if unknown := [name for name in chosen if name not in (*OTHERS, *known)]:
        raise Refused(f"unknown cell {', '.join(unknown)}; there are {', '.join((*OTHERS, *known))}")
    console = Console()
    if not tasks and (reason := missing("sklearn")):
        console.out(f"without the task digits: {reason}", highlight=False)
    tasks = tasks or tuple(name for name in TASKS if name != "digits" or not missing("sklearn"))
    try:
        run(chosen, tasks, Settings(**settings), out, console)
    except (OSError, dispatch.BackendError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise
        raise Refused(str(error)) from error


@main.command()
@click.argument("cell", type=click.Choice(cells.NAMES))
@click.option("-T", "T", type=SIZE, required=True, help="Sequence length.")
@click.option("-B", "B", type=SIZE, required=True, help="Batch size.")
@click.option("-I", "I", type=SIZE, required=True, help="Input size.")
@click.option("-H", "H", type=SIZE, required=True, help="Hidden size.")
@click.option("-P", "P", type=SIZE, help="Projected size, for an lstm with a projection.")
@click.option("--dtype", type=click.Choice(arrays.DTYPES), default="float32", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda if this machine has one.")
@click.option(
    "--library",
    type=click.Choice(["numpy", "torch", "cupy"]),
    help="Library of the arrays; default: torch if installed.",
)
@click.option("--training", is_flag=True, help="Include the backward pass.")
@click.option("--backend", type=click.Choice(dispatch.ORDER), help="Select this backend.")
def explain(**options) -> None:
    """Explain which backend runs a call and how, and why not the others.

    For example: gpu-rnn explain lstm -T 256 -B 64 -I 512 -H 512 --dtype float16 --training
    """
    from .tools.explain import explain

    try:
        click.echo(explain(options.pop("cell"), **options))
    except ValueError as error:
        raise Refused(str(error)) from error


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> None:
    """Run the microbenchmarks, in a checkout only. Their arguments: gpu-rnn bench --help."""
    checkout = Path(__file__).parents[1]
    if not (checkout / "bench" / "__main__.py").exists():
        raise Refused("the benchmarks are not installed; they are in the repository's folder bench/")
    sys.path.insert(0, str(checkout))
    sys.argv = ["python -m bench", *arguments]
    runpy.run_module("bench", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(prog_name="gpu-rnn")
