"""Which of a trainer's samples a round uses. One rule a file; a job names one and gives its keyword arguments.

A datasampler has two sides, :attr:`DataSampler.trainer_data_sampler` and :attr:`DataSampler.aggregator_data_sampler`,
which tell each other small values beside the model and the update. Add one by :func:`register`, or by an entry point in
the group ``flame.datasamplers``.
"""

from __future__ import annotations

from flame.sdk.datasamplers.base import DataSampler
from flame.sdk.plugins import Plugins

_HERE = "flame.sdk.datasamplers"

#: Every datasampler by name.
datasamplers: Plugins[DataSampler] = Plugins(
    "datasampler",
    "flame.datasamplers",
    {
        "default": f"{_HERE}.default:Default",
        "fedbalancer": f"{_HERE}.fedbalancer:FedBalancer",
    },
)
make = datasamplers.make
names = datasamplers.names
register = datasamplers.register

__all__ = ["DataSampler", "datasamplers", "make", "names", "register"]
