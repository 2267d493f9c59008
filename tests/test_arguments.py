"""What is of a wrong type is refused by the name of its argument, everywhere."""

import re

import numpy as np
import pytest
import torch

import gpu_rnn

T, B, I, H = 3, 2, 3, 4
FUNCTIONS = {"lstm": 4, "gru": 3, "rnn": 1}
LAYERS = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]
WRONG = ["2", [1.0, 2.0], object(), {"a": 1}, (1.5, "a"), b"x"]  # as anything but words
ANY = pytest.mark.parametrize("wrong", WRONG, ids=lambda value: type(value).__name__)
ARRAYS = ["x", "w_ih", "w_hh", "b_ih", "b_hh", "h0"]
FLAGS = ["reverse", "recompute", "step_exact", "training", "return_states"]
AROUND = ["reset", "lengths", "left_padding", "zoneout", "recurrent_dropout", "seed"]


def arrays(name, kind):
    G = FUNCTIONS[name]
    shapes = {"x": (T, B, I), "w_ih": (G * H, I), "w_hh": (G * H, H), "b_ih": (G * H,), "b_hh": (G * H,), "h0": (B, H)}
    return {label: kind.ones(shape) for label, shape in shapes.items()}


def refused(label, run):
    with pytest.raises((TypeError, ValueError), match=rf"(^|\W){re.escape(label)}\W"):
        run()


@ANY
@pytest.mark.parametrize("kind", [np, torch], ids=["numpy", "torch"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_of_a_function(name, kind, wrong):
    function, kwargs = getattr(gpu_rnn, name), arrays(name, kind)
    for label in [*ARRAYS, *FLAGS, *AROUND, "w_hr"]:
        refused(label, lambda: function(**kwargs | {label: wrong}))  # noqa: B023
        refused(label, lambda: gpu_rnn.vjp(function, **kwargs | {label: wrong}))  # noqa: B023
    for label in ("backend", "precision"):
        refused(label, lambda: function(**kwargs | {label: wrong if wrong != "2" else 2}))  # noqa: B023
    own = {
        "lstm": ["coupled", "cell_clip", "peephole", "layer_norm", "recurrent_dropout_on", "layer_norm_over", "c0"],
        "rnn": ["nonlinearity"],
    }
    for label in own.get(name, ["reset_after", "layer_norm", "recurrent_dropout_on", "layer_norm_over"]):
        refused(label, lambda: function(**kwargs | {label: wrong}))  # noqa: B023


@ANY
@pytest.mark.parametrize("name", LAYERS)
def test_of_a_constructor(name, wrong):
    cls = getattr(gpu_rnn, name)
    words = ["nonlinearity"] if "RNN" in name else []
    whole = [] if "Cell" in name else ["num_layers", "batch_first", "dropout", "bidirectional", "proj_size"]
    for label in ["input_size", "hidden_size", "bias", "dtype", *cls.keywords.__annotations__, *whole, *words]:
        refused(label, lambda: cls(**{"input_size": I, "hidden_size": H, label: wrong}))  # noqa: B023


@ANY
def test_of_a_call_and_of_the_rest(wrong):
    layer, x = gpu_rnn.LSTM(I, H), torch.zeros(T, B, I)
    for label in ("reset", "reset_state", "lengths", "left_padding", "return_states", "generator"):
        kwargs = {label: wrong}
        refused(label, lambda: layer(x, **kwargs))  # noqa: B023
    refused("hx", lambda: layer(x, wrong))
    refused("batch", lambda: gpu_rnn.stream(layer, wrong))
    refused("layer", lambda: gpu_rnn.stream(wrong))
    refused("model", lambda: gpu_rnn.replace_(wrong))
    refused("x", lambda: next(gpu_rnn.tbptt(layer, wrong, 1, 2)))
    refused("k1", lambda: next(gpu_rnn.tbptt(layer, x, wrong, 2)))
    sizes = {"T": T, "B": B, "I": I, "H": H}
    for label in (*sizes, "dtype", "device", "training", "library", "backend"):
        refused(label, lambda: gpu_rnn.explain("lstm", **sizes | {label: wrong}))  # noqa: B023
    for label in (*sizes, "dtype", "training", "backend"):
        refused(label, lambda: gpu_rnn.warmup("lstm", **sizes | {label: wrong}))  # noqa: B023
    own = {"gates": "a", "states": "h", "name": "Mine"}
    for label in ("gates", "states", "name", "units", "grad", "check"):
        value = wrong if label not in ("gates", "states", "name", "units") or wrong != "2" else 2
        refused(label, lambda: gpu_rnn.cell(lambda x, h, s: (x[0],), **own | {label: value}))  # noqa: B023


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_mask_is_not_ignored(name):
    """NumPy's and torch's, of every array."""
    function = getattr(gpu_rnn, name)
    for kind in (np, torch):
        kwargs = arrays(name, kind)
        for label, array in kwargs.items():
            masked = (
                np.ma.masked_array(array, mask=True) if kind is np else torch.masked.masked_tensor(array, array > 0)
            )
            for run in (function, lambda **kwargs: gpu_rnn.vjp(function, **kwargs)):
                with pytest.raises(TypeError, match=f"{label}: .* without a mask, got Masked.*lengths="):
                    run(**kwargs | {label: masked})
    lengths = np.ma.masked_array([3, 2], mask=[False, True])
    with pytest.raises(TypeError, match=r"lengths: .* without a mask"):
        function(**arrays(name, np), lengths=lengths)


def test_numpy_numbers_are_numbers():
    layer = gpu_rnn.LSTM(np.int64(3), np.int32(4), np.uint8(2), proj_size=np.int64(2), dropout=np.float32(0.5))
    assert layer.weight_hr_l1.shape == (2, 4)
    kwargs = arrays("lstm", np)
    y, _ = gpu_rnn.lstm(**kwargs, reverse=np.bool_(True))
    np.testing.assert_array_equal(y, gpu_rnn.lstm(**kwargs, reverse=True)[0])
