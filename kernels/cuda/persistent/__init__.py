"""Configuration and launch of persistent.cu, whose blocks hold the recurrent weights on-chip for a whole sequence.

- config: what a launch is, as frozen data (blocks, threads, registers, shared memory); and the device
- cost_model: predicted microseconds of a time step, all constants in one place
- selection: the fastest configuration by prediction, or the reasons why there is none
- launch: the kernel launches of a configuration
"""

from .config import DEVICES, ITEMSIZE, REGISTER_FILE, SCOPES, UNPROVEN, Device, PersistentConfig
from .cost_model import CYCLES_PER_MICROSECOND
from .launch import HEADERS, KERNELS, Instance, kernel_name, kernel_params, launches, time_slices, translation_unit
from .selection import (
    WORK_REGISTERS,
    CellCost,
    Selection,
    candidates,
    cell_cost,
    check_occupancy,
    fuse_runs,
    reductions,
    registers_per_element,
    select,
    select_verified,
    select_wavefront,
)

__all__ = [
    "CYCLES_PER_MICROSECOND", "DEVICES", "HEADERS", "ITEMSIZE", "KERNELS", "REGISTER_FILE", "SCOPES", "UNPROVEN",
    "WORK_REGISTERS", "CellCost", "Device", "Instance", "PersistentConfig", "Selection", "candidates", "cell_cost",
    "check_occupancy", "fuse_runs", "kernel_name", "kernel_params", "launches", "reductions",
    "registers_per_element", "select", "select_verified", "select_wavefront", "time_slices", "translation_unit",
]  # fmt: skip
