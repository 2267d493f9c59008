"""In the place of NumPy, which needn't be here: it is imported when something is taken from it."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    return getattr(import_module("numpy"), name)
