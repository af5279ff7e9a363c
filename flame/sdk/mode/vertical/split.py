"""What both sides of a split network share: the tags, the key for the ids, and tensors of PyTorch in messages."""

from __future__ import annotations

from typing import Any

import numpy as np

from flame.errors import MissingExtra, WorkerError
from flame.sdk.mode.role import Role

TAG_ALIGN = "align"
TAG_FORWARD = "forward"
TAG_BACKWARD = "backward"

#: What the job's secret is made into for hashing ids.
PURPOSE = "vertical: sample ids"


#: Small values beside a message: the rounds that a party can go back to; the one that all go back to; that all shall align anew; that
#: all shall keep this round; that it is the last one, so that the answer is waited for; the answer: it is kept.
HAS, BACK_TO, ANEW, KEEP, LAST, KEPT = "has", "back", "anew", "keep", "last", "kept"


def pytorch() -> Any:
    """The module ``torch``.

    :raises flame.errors.MissingExtra: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingExtra("torch", "torch", "Vertical federated learning") from error
    return torch


def ids_of(role: Role) -> Any:
    """The sample ids that ``load_data`` has set.

    :raises flame.errors.WorkerError: it has not.
    """
    ids = getattr(role, "ids", None)
    if ids is None:
        raise WorkerError(f"{type(role).__name__} has no ids: set self.ids in load_data, one for each sample.")
    return ids


def make_optimizer(role: Role) -> Any:
    """The optimizer that ``initialize`` has set as ``self.optimizer``, else SGD at the job's learning rate.

    :raises flame.errors.WorkerError: ``self.model`` is no PyTorch module.
    """
    torch = pytorch()
    if not isinstance(role.model, torch.nn.Module):
        raise WorkerError(
            f"self.model of {type(role).__name__} is {type(role.model).__name__}: set it in initialize to a torch.nn.Module."
        )
    chosen = getattr(role, "optimizer", None)
    parameters = list(role.model.parameters())
    if chosen is not None or not parameters:
        return chosen
    return torch.optim.SGD(parameters, lr=role.config.hyperparameters.learning_rate or 0.01)


def as_tensor(value: Any, like: Any, sender: str) -> Any:
    """A received matrix as a tensor of PyTorch with memory of its own.

    :param like: a tensor; gives the device.
    :param sender: whom to name in an error.
    :raises flame.errors.WorkerError: it is no matrix of finite numbers.
    """
    torch = pytorch()
    tensor = value if isinstance(value, torch.Tensor) else None
    if tensor is None and isinstance(value, np.ndarray):
        tensor = torch.from_numpy(np.array(value))
    if tensor is None or tensor.dim() != 2 or not tensor.is_floating_point():
        shape = f"{getattr(value, 'dtype', type(value).__name__)}{list(getattr(value, 'shape', []))}"
        raise WorkerError(f"{sender} sent {shape} where a matrix [samples, outputs] of floats belongs.")
    if not bool(torch.isfinite(tensor).all()):
        raise WorkerError(f"{sender} sent values that are not finite: lower the learning rate, or look at its data.")
    return tensor.to(like.device) if like is not None else tensor
