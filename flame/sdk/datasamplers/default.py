"""All samples, in every round."""

from __future__ import annotations

from flame.sdk.datasamplers.base import AggregatorSampler, DataSampler, TrainerSampler


class Default(DataSampler):
    """Changes nothing."""

    sort = "default"

    def __init__(self) -> None:
        self.trainer_data_sampler = TrainerSampler()
        self.aggregator_data_sampler = AggregatorSampler()
