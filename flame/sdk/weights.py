"""A model of any library as named arrays, and back.

Roles exchange models as mappings of name -> numpy array. What ``self.model`` may be:

* a PyTorch module: its ``state_dict``, buffers such as BatchNorm's included. The arrays are views of the module's memory
  where it lies on the CPU, so taking them costs nothing; bfloat16, which numpy does not have, travels as float32.
* a dict of numpy arrays (or numbers), or a list of them
* anything with ``get_weights()`` and ``set_weights()``, such as a Keras model: a list, named by its order, or a dict

PyTorch is looked for in :data:`sys.modules` only: where the user's code has not imported it, no model can be one of its.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from flame.errors import WorkerError

Array = npt.NDArray[Any]
Weights = dict[str, Array]


def get_weights(model: Any) -> Weights:
    """The model's weights, in the model's own order.

    :param model: see the module's text.
    :returns: C-contiguous arrays. They may share the model's memory: copy what must outlive its next change.
    :raises flame.errors.WorkerError: the model is of no kind that is known here, or holds something that is no array.
    """
    if is_torch(model):
        return {
            name: _from_torch(value) for name, value in model.state_dict().items() if _torch_tensor(value)
        }  # a module's "extra state" may be anything; it is not averaged
    if isinstance(model, Mapping):
        return {str(name): _from_value(name, value) for name, value in model.items()}
    if isinstance(model, list):
        return _numbered(model)
    if _own_way(model):
        values = model.get_weights()
        if isinstance(values, Mapping):
            return {str(name): _from_value(name, value) for name, value in values.items()}
        return _numbered(values)
    raise WorkerError(
        f"self.model is {'None' if model is None else 'of type ' + type(model).__name__}. Set it in initialize() to a "
        "PyTorch module, a dict of numpy arrays, or an object with get_weights() and set_weights()."
    )


def set_weights(model: Any, weights: Mapping[str, Any]) -> None:
    """Give the model other weights. Their values are copied into the model's own memory where that is possible.

    :param model: see the module's text.
    :param weights: arrays (they may be read-only), with the names and shapes that :func:`get_weights` gives.
    :raises flame.errors.WorkerError: names or shapes differ; the text names the first difference.
    """
    if is_torch(model):
        _set_torch(model, weights)
    elif isinstance(model, MutableMapping):
        _check_names({str(name): name for name in model}, weights)
        for name in model:
            model[name] = _into(str(name), model[name], weights[str(name)])
    elif isinstance(model, list):
        names = _numbered(model)
        _check_names(names, weights)
        model[:] = [_into(name, value, weights[name]) for name, value in zip(names, model, strict=True)]
    elif _own_way(model):
        current = model.get_weights()
        named = dict(current) if isinstance(current, Mapping) else _numbered(current)
        _check_names({str(name): name for name in named}, weights)
        values = {name: _checked(str(name), np.asarray(old), weights[str(name)]) for name, old in named.items()}
        model.set_weights(values if isinstance(current, Mapping) else list(values.values()))
    else:
        get_weights(model)  # says in words what is wrong


def is_torch(model: Any) -> bool:
    """Whether the model is a PyTorch module to be taken by its ``state_dict``; Keras' on PyTorch is one, but has a way of its own."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module) and not _own_way(model)


def _own_way(model: Any) -> bool:
    return hasattr(model, "get_weights") and hasattr(model, "set_weights")


def as_arrays(values: Mapping[str, Any]) -> Weights:
    """What arrived in a message as numpy arrays: tensors of PyTorch (bfloat16 comes as such) are turned into arrays."""
    return {name: _from_torch(value) if _torch_tensor(value) else value for name, value in values.items()}


def _torch_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _from_torch(value: Any) -> Array:
    torch = sys.modules["torch"]
    value = value.detach()
    if value.device.type != "cpu":
        value = value.cpu()
    if value.dtype is torch.bfloat16:
        value = value.float()
    array: Array = value.contiguous().numpy()
    return array


def _from_value(name: Any, value: Any) -> Array:
    if _torch_tensor(value):
        return _from_torch(value)
    array = np.asarray(value)
    if array.dtype.kind not in "fiubc" and array.dtype.name != "bfloat16":
        raise WorkerError(f"self.model[{name!r}] is a {type(value).__name__}, which is no array of numbers.")
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


def _numbered(values: Sequence[Any]) -> Weights:
    width = len(str(max(len(values) - 1, 0)))
    return {f"w{index:0{width}d}": _from_value(index, value) for index, value in enumerate(values)}


def _set_torch(model: Any, weights: Mapping[str, Any]) -> None:
    torch = sys.modules["torch"]
    state = {name: value for name, value in model.state_dict().items() if _torch_tensor(value)}
    _check_names(state, weights)
    with torch.no_grad():
        for name, tensor in state.items():
            value = weights[name]
            if not _torch_tensor(value):
                value = torch.from_numpy(_unlocked(value))
            if value.shape != tensor.shape:
                raise _misshapen(name, tensor.shape, value.shape)
            tensor.copy_(value)


def _unlocked(array: Array) -> Array:
    """The same memory without numpy's read-only flag, which PyTorch warns of; it is only read from here."""
    array = np.asarray(array)
    return array if array.flags.writeable else np.asarray(_Alias(array))


class _Alias:
    def __init__(self, array: Array) -> None:
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
        self.owner = array


def _into(name: str, old: Any, value: Any) -> Any:
    """``value`` in the memory of ``old`` where that can be written, else as a new array."""
    if not isinstance(old, np.ndarray):
        return np.array(_checked(name, np.asarray(old), value))
    value = _checked(name, old, value)
    if not old.flags.writeable:
        return np.array(value, dtype=old.dtype)
    np.copyto(old, value, casting="same_kind")
    return old


def _checked(name: str, old: Array, value: Any) -> Array:
    array = _from_torch(value) if _torch_tensor(value) else np.asarray(value)
    if array.shape != old.shape:
        raise _misshapen(name, old.shape, array.shape)
    return array


def _check_names(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    if mine.keys() != theirs.keys():
        name = min(mine.keys() ^ theirs.keys())
        where = "this role's model lacks" if name in theirs else "only this role's model has"
        raise WorkerError(
            f"The received model does not fit self.model: {where} {name!r}. Build the same model in all roles."
        )


def _misshapen(name: str, mine: Sequence[int], theirs: Sequence[int]) -> WorkerError:
    return WorkerError(
        f"The received model does not fit self.model: {name!r} is {list(theirs)}, here it is {list(mine)}. "
        "Build the same model in all roles."
    )
