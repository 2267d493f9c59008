"""`replace_` and `restore_`: the recurrent layers of a model become ours, and torch.nn's again.

A module stays the same object and changes its class. What it has stays as it is: parameters, hooks, training mode,
parametrizations; what only one side keeps (keywords here, lists of weights there) is made and dropped on the way.
"""

import warnings
from collections.abc import Mapping
from typing import Any, Unpack

from torch import nn
from torch.nn.utils import parametrize

from ..core.validation import describe_value
from .base import GRUKeywords, Keywords, LSTMKeywords, Recurrent
from .layers import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

GPU_RNN_CLASSES: dict[type, type] = {
    getattr(nn, ours.__name__): ours for ours in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)
}
TORCH_CLASSES = {ours: theirs for theirs, ours in GPU_RNN_CLASSES.items()}
BASES = (nn.RNNBase, nn.RNNCellBase)
CACHES = ("_flat_weights", "_flat_weights_names", "_flat_weight_refs", "_all_weights")  # of torch.nn's layers
KEYWORDS = {**LSTMKeywords.__annotations__, **GRUKeywords.__annotations__}
# How a layer computes and begins, not what it computes; the last two are listed with what they specify
FORGOTTEN = {
    "backend", "precision", "recompute", "step_exact", "forget_bias", "recurrent_dropout_on", "layer_norm_over",
}  # fmt: skip


def replace_(model: nn.Module, **keywords: Unpack[Keywords]) -> nn.Module:
    """Turn every torch.nn.RNN, LSTM, GRU, RNNCell, LSTMCell and GRUCell of a model into ours, in place.

    The modules stay the same objects and only change their class, so that everything that refers to them or to their
    parameters goes on: optimizers, hooks, modules that are used twice, weight norms and other parametrizations.

    What looks for torch.nn's classes no longer finds them: `isinstance(module, torch.nn.LSTM)` is false,
    `torch.ao.quantization.quantize_dynamic(model, {torch.nn.LSTM})` leaves ours as they are without a word,
    `torch.jit.script`, CoreML's and TFLite's converters don't know them. `restore_` is the way back; see
    docs/conversion.md.

    Left alone, with a warning that names them, are modules of which it can't be known what they compute: those of
    classes derived from torch.nn's, and those whose `forward` was assigned to the instance, as accelerate's hooks and
    some weight drops do.

    Args:
        model: any module, also one that is itself such a layer. backend, precision and so on: those of every replaced
            layer, as for `LSTM`.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: unknown keywords or values, num_heads; the model is unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {describe_value(model)}")
    if unknown := keywords.keys() - Keywords.__annotations__:
        raise TypeError(f"replace_ got an unexpected keyword argument {min(unknown)!r}")
    Recurrent._checked(keywords, Keywords)
    if (heads := keywords.get("num_heads", 1)) != 1:
        raise ValueError(f"num_heads={heads}: replace_ keeps the weights, and torch.nn's are those of one head")
    skipped: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, BASES):
            continue
        ours = counterpart(module, GPU_RNN_CLASSES)
        if ours is None or is_wrapped(module):
            reason = "layers with a forward of their own" if ours else "classes derived from torch.nn's"
            skipped.setdefault(reason, []).append(called(name, type(module).__name__))
            continue
        for cache in CACHES:  # kept, they would keep weights alive that are replaced later
            vars(module).pop(cache, None)
        module.__class__ = ours
        module._set(keywords)
    for reason, names in skipped.items():
        warnings.warn(f"replace_ left {reason} alone: {', '.join(names)}", stacklevel=2)
    return model


def restore_(model: nn.Module) -> nn.Module:
    """Turn every gpu_rnn.RNN, LSTM, GRU, RNNCell, LSTMCell and GRUCell of a model into torch.nn's, in place.

    The inverse of `replace_`, for layers that were made here, too: the road to what knows torch.nn's classes alone, as
    `torch.jit.script`, `quantize_dynamic`, CoreML and TFLite; see docs/conversion.md. The modules stay the same
    objects, with their parameters, hooks and training mode. `backend`, `precision`, `recompute` and `step_exact`, which
    say how to compute, and `forget_bias`, which only counts at the beginning, are forgotten.

    Args:
        model: any module, also one that is itself such a layer.

    Returns:
        The model.

    Raises:
        NotImplementedError: torch.nn has no form for some of the layers: those with `zoneout`, `recurrent_dropout`,
            `peephole`, `reset_after=False`, `num_heads` and so on, RNN and GRU with `proj_size`, custom cells, derived
            classes, layers whose `forward` was assigned to the instance. It names all of them, and nothing is changed.
    """
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, Recurrent)}
    obstacles = {name: why for name, module in layers.items() if (why := obstacle(module))}
    if obstacles:
        listing = ", ".join(called(name, why) for name, why in obstacles.items())
        raise NotImplementedError(f"torch.nn has no form for these layers, and restore_ changed nothing: {listing}")
    for module in layers.values():
        lists = [getattr(module, name, None) for name in ("_all_weights", "_flat_weights_names")]
        for keyword in KEYWORDS:
            vars(module).pop(keyword, None)
        module.__class__ = counterpart(module, TORCH_CLASSES)
        if isinstance(module, nn.RNNBase):
            module._all_weights, module._flat_weights_names = lists
            module._init_flat_weights()
    return model


def obstacle(module: Recurrent) -> str:
    """Why torch.nn has no form for a layer; empty if it has one."""
    kind = type(module).__name__
    if counterpart(module, TORCH_CLASSES) is None:
        return f"{kind}, a class of its own"
    if is_wrapped(module):
        return f"{kind} with a forward of its own"
    beyond = {name: getattr(module, name) for name in sorted(KEYWORDS.keys() - FORGOTTEN)}
    beyond = {name: value for name, value in beyond.items() if value not in (getattr(Recurrent, name), (0, 0))}
    if module.proj_size and not isinstance(module, LSTM):
        beyond["proj_size"] = module.proj_size
    return f"{kind} with {', '.join(f'{name}={value}' for name, value in beyond.items())}" if beyond else ""


def counterpart(module: nn.Module, classes: Mapping[type, type]) -> type | None:
    """The class among `classes` for that of a module, if there is one."""
    cls = type(module)
    if not parametrize.is_parametrized(module):
        return classes.get(cls)
    # torch.nn.utils.parametrize derives a class for each module, with a property per parameter: derive its like
    base = classes.get(cls.__bases__[0])
    members = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    return base and type(cls.__name__, (base,), members)


def called(name: str, note: str) -> str:
    return f"{name or 'the model itself'} ({note})"


def is_wrapped(module: nn.Module) -> bool:
    """Whether the instance has a `forward` of its own, most often around the bound method of its class."""
    return "forward" in vars(module)


def as_gpu_rnn_layer(layer: Any) -> Any:
    """A copy of a layer, on the same parameters, as gpu_rnn's layer even if it is torch.nn's. TypeError for others."""
    if not isinstance(layer, Recurrent) and not (isinstance(layer, nn.Module) and counterpart(layer, GPU_RNN_CLASSES)):
        raise TypeError(f"expected a recurrent layer or a function of gpu_rnn, or a layer of torch.nn; got {layer!r}")
    if is_wrapped(layer):
        raise TypeError(f"{layer!r} has a forward of its own, assigned to the instance, which can't be looked into")
    return replace_(shallow_copy(layer))


def shallow_copy(module: Any) -> Any:
    """A copy of a torch.nn.Module on the same parameters. copy.copy refuses one that is parametrized."""
    own = object.__new__(type(module))
    own.__dict__ |= vars(module)
    return own
