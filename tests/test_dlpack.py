"""Arrays of an unknown library: they go in by DLPack and come out as that library's."""

import numpy as np
import pytest

import gpu_rnn
from gpu_rnn.kernels import cells

from .conftest import sequence_arrays


class Foreign:
    """As little as the array API requires of an array, with no method more."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()

    def __array_namespace__(self):
        return Library


class Library:
    @staticmethod
    def from_dlpack(array):
        return Foreign(np.from_dlpack(array))


def flat(results):
    if isinstance(results, dict):
        return list(results.values())
    return [leaf for part in results for leaf in flat(part)] if isinstance(results, tuple) else [results]


FUNCTIONS = {"lstm": gpu_rnn.lstm, "gru": gpu_rnn.gru, "rnn_tanh": gpu_rnn.rnn}


def call(run, name, rng, kind):
    x, weights, state = sequence_arrays(rng, name, 3, 2, 4, 5, dtype=np.float32)
    initial = {letter + "0": kind(array) for letter, array in zip(cells.get(name).states, state)}
    return run(kind(x), *map(kind, weights[:4]), **initial)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_give_back_the_kind_they_were_given(name):
    expected = flat(call(FUNCTIONS[name], name, np.random.default_rng(1), np.asarray))
    actual = flat(call(FUNCTIONS[name], name, np.random.default_rng(1), Foreign))
    for ours, plain in zip(actual, expected, strict=True):
        assert type(ours) is Foreign
        np.testing.assert_array_equal(ours._array, plain)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vjp_too(name):
    def both(kind):
        def run(*args, **kwargs):
            outputs, pullback = gpu_rnn.vjp(FUNCTIONS[name], *args, **kwargs)
            return outputs, pullback(outputs)

        return call(run, name, np.random.default_rng(1), kind)

    (_, expected), (_, actual) = both(np.asarray), both(Foreign)
    assert actual.keys() == expected.keys()
    for label, ours in actual.items():
        assert type(ours) is Foreign
        np.testing.assert_array_equal(ours._array, expected[label])


def test_what_is_no_array_is_still_refused(rng):
    x, weights, _ = sequence_arrays(rng, "gru", 3, 2, 4, 5)
    with pytest.raises(TypeError, match="expected a NumPy, torch or CuPy array, got list"):
        gpu_rnn.gru(x.tolist(), *weights[:4])
