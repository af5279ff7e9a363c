"""How updates become the next global model. One algorithm a file; a job names one and gives its keyword arguments.

``make("fedadam", {"eta": 0.03})`` gives the optimizer; ``register("mine", MyOptimizer)`` adds one, and so does an
entry point in the group ``flame.optimizers``.
"""

from __future__ import annotations

from flame.sdk.optimizers.base import Optimizer, Regularizer, Update
from flame.sdk.plugins import Plugins

_HERE = "flame.sdk.optimizers"

#: Every optimizer by name.
optimizers: Plugins[Optimizer] = Plugins(
    "optimizer",
    "flame.optimizers",
    {
        "fedadagrad": f"{_HERE}.fedadagrad:FedAdagrad",
        "fedadam": f"{_HERE}.fedadam:FedAdam",
        "fedavg": f"{_HERE}.fedavg:FedAvg",
        "fedavgm": f"{_HERE}.fedavgm:FedAvgM",
        "fedbuff": f"{_HERE}.fedbuff:FedBuff",
        "feddyn": f"{_HERE}.feddyn:FedDyn",
        "fedgft": f"{_HERE}.fedgft:FedGFT",
        "fedprox": f"{_HERE}.fedprox:FedProx",
        "fedyogi": f"{_HERE}.fedyogi:FedYogi",
        "krum": f"{_HERE}.krum:Krum",
        "median": f"{_HERE}.median:Median",
        "multikrum": f"{_HERE}.krum:MultiKrum",
        "scaffold": f"{_HERE}.scaffold:Scaffold",
        "trimmedmean": f"{_HERE}.trimmedmean:TrimmedMean",
    },
)
make = optimizers.make
names = optimizers.names
register = optimizers.register

__all__ = ["Optimizer", "Regularizer", "Update", "make", "names", "optimizers", "register"]
