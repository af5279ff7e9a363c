"""Datasets that tell the index of each sample, and parts of them. Any object with ``len`` and ``[index]`` will do, and
PyTorch's ``DataLoader`` takes them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Indexed:
    """A dataset whose samples end with their index: ``(data, target)`` becomes ``(data, target, index)``."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        item = self.dataset[index]
        return (*item, index) if isinstance(item, tuple | list) else (item, index)


class Subset:
    """Some samples of a dataset.

    :param indices: of the samples, in the order in which they come.
    """

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]
