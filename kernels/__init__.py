"""Mathematics and hardware: the cell definitions, and the kernels that drive them through time.

Installed and imported as ``gpu_rnn.kernels``. Nothing in here imports torch or CuPy.
"""
