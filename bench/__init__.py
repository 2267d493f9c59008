"""Microbenchmarks of gpu_rnn and of everybody else who computes an RNN, LSTM or GRU: `python -m bench --help`.

problems    what is measured, in which order        contenders, peers   who takes part
oracle      data, the exact answer, the tolerance   timing              one case: checked first, then interleaved
around      what is around a cell                   kernels             our kernels alone
worker      one case in a process of its own        floor               what the machine would allow
results     append-only CSV, and what changed       report              tables in the documents, plots, HTML
gpu         the whole visit to a GPU machine        machine, progress   where this runs, and how long it still takes
"""
