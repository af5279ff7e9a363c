"""The interface of a datasampler: a trainer's side, an aggregator's side, and what they tell each other."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol


class ChannelLike(Protocol):
    """What a datasampler sees of a channel."""

    def get_end_property(self, end: str, key: str) -> Any:
        """What was noted about an end; None where nothing was."""


class TrainerSampler:
    """The trainer's side; this one uses all samples in every round."""

    def load_dataset(self, dataset: Any) -> Any:
        """Prepare a dataset; called by the user's ``load_data``. Gives what :meth:`sample` takes."""
        return dataset

    def sample(self, dataset: Any, **kwargs: Any) -> Any:
        """The samples of this round, in the form of ``dataset``."""
        return dataset

    def get_metadata(self) -> dict[str, Any]:
        """What to tell the aggregator's side, with the update."""
        return {}

    def handle_metadata_from_aggregator(self, metadata: Mapping[str, Any]) -> None:
        """What the aggregator's side has told, with the model."""

    def state(self) -> dict[str, Any]:
        """All that a restart needs, as plain values."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up the state of an earlier process."""


class AggregatorSampler:
    """The aggregator's side; this one has nothing to say."""

    def get_metadata(self, round: int, selected_ends: Sequence[str]) -> dict[str, Any]:
        """What to tell the trainers of a round, with the model."""
        return {}

    def handle_metadata_from_trainer(self, metadata: Mapping[str, Any], end: str, channel: ChannelLike) -> None:
        """What the side of ``end`` has told, with its update."""

    def state(self) -> dict[str, Any]:
        """All that a restart needs, as plain values."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up the state of an earlier process."""


class DataSampler(abc.ABC):
    """One rule. Constructed with its keyword arguments from the job; a worker uses the side of its role."""

    sort: ClassVar[str]
    #: Whether its choices depend on how long things take.
    timed: ClassVar[bool] = False
    trainer_data_sampler: TrainerSampler
    aggregator_data_sampler: AggregatorSampler
