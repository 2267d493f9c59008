"""Microbenchmarks of gpu_rnn and of other implementations of RNN, LSTM and GRU: `python -m bench --help`.

problems         what is measured, in which order    implementations, third_party, modifiers, kernels   what computes it
data             random inputs, outputs by name      correctness       accuracy is checked before anything is timed
timing           one case, A B A B                   worker            a process of its own, with a time limit
roofline         a lower bound of the time           results, report   CSV files; tables, plots and an HTML page
gpu              a whole session on a GPU machine    calibration, device_checks, pytest_journal   parts of it
sass, nvrtc      machine code, without a GPU
"""
