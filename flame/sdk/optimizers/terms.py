"""The trainer's side of FedProx, FedDyn and SCAFFOLD: one term, with different constants.

    term(w)     = strength / 2 * ||w - x||^2 + <linear, w>
    gradient(w) = strength (w - x) + linear

with x the global model that the round started from. Only floating parameters take part, no running statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flame.errors import WorkerError
from flame.sdk.optimizers.base import Regularizer, Weights
from flame.sdk.optimizers.layout import Array, is_trained, plain, widen


def trained(weights: Weights) -> dict[str, Array]:
    """The trained tensors of a model as numpy arrays; bfloat16 as float32."""
    arrays = {name: plain(tensor) for name, tensor in weights.items()}
    return {name: widen(array) for name, array in arrays.items() if is_trained(name, array)}


class QuadraticTerm(Regularizer):
    """A pull towards the global model, and a linear correction.

    :param strength: of the pull, at least 0.
    """

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self.start: Weights = {}
        self.linear: Weights = {}
        self._tensors: dict[tuple[str, str], Any] = {}

    def begin(self, weights: Weights, extra: Weights) -> None:
        """See :meth:`Regularizer.begin`. The weights are kept by reference, until :meth:`finish`."""
        self.start = trained(weights)
        self._tensors.clear()

    def finish(self, weights: Weights, steps: int, learning_rate: float) -> Weights:
        """See :meth:`Regularizer.finish`. Lets go of the global model: it may be a message's memory that is wanted again."""
        self.start = {}
        self._tensors.clear()
        return {}

    def gradient(self, weights: Weights) -> Weights:
        """See :meth:`Regularizer.gradient`."""
        result: dict[str, Array] = {}
        for name, values in trained(weights).items():
            slope = self.strength * (values - self.start[name]) if self.strength else np.zeros_like(values)
            if name in self.linear:
                slope += self.linear[name]
            result[name] = slope
        return result

    def get_term(self, **kwargs: Any) -> Any:
        """The term as a PyTorch scalar. Argument names are those of Flame's library.

        :param curr_model: the local module; or ``curr_model_params`` or ``w``: its parameters, named (a mapping) or
            in the order of the model's.
        :param prev_model: the global model, in the same forms (``prev_model_params``, ``w_t``); without it, the one
            that the round began with.
        :raises flame.errors.WorkerError: no current model was given, or its parameters do not match the global model's.
        """
        current = _first(kwargs, "curr_model", "curr_model_params", "w")
        if current is None:
            raise WorkerError("get_term needs the local model: get_term(curr_model=self.model).")
        before = _first(kwargs, "prev_model", "prev_model_params", "w_t")
        parameters = self._named(current)
        origin = self._named(before) if before is not None and self.strength else {}
        total: Any = 0.0
        for name, parameter in parameters.items():
            if self.strength:
                reference = origin[name].detach() if origin else self._tensor("start", name, parameter)
                total = total + self.strength / 2 * ((parameter - reference) ** 2).sum()
            if self.linear:
                total = total + (self._tensor("linear", name, parameter) * parameter).sum()
        return total

    def _named(self, model: Any) -> dict[str, Any]:
        if hasattr(model, "named_parameters"):
            return dict(model.named_parameters())
        if isinstance(model, Mapping):
            return dict(model)
        parameters = list(model)
        found = dict(zip(self.start or map(str, range(len(parameters))), parameters, strict=False))
        if self.start and [tuple(each.shape) for each in parameters] != [each.shape for each in self.start.values()]:
            raise WorkerError("get_term cannot tell which parameter is which: give curr_model=self.model.")
        return found

    def _tensor(self, kind: str, name: str, like: Any) -> Any:
        """An array of this round as a tensor beside the parameter ``like``; made once a round."""
        tensor = self._tensors.get((kind, name))
        if tensor is None:
            import torch

            source = self.start if kind == "start" else self.linear
            if name not in source:
                raise WorkerError(f"The parameter {name!r} is not in the global model that this round began with.")
            tensor = torch.tensor(source[name]).to(like.device, like.dtype)
            self._tensors[kind, name] = tensor
        return tensor


def _first(kwargs: Mapping[str, Any], *names: str) -> Any:
    return next((kwargs[name] for name in names if kwargs.get(name) is not None), None)
