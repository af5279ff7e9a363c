"""Who takes part in a round. One rule a file; a job or a channel names one and gives its keyword arguments.

``make("random", {"k": 4})`` gives the selector of one channel; ``register("mine", MySelector)`` adds one, and so does
an entry point in the group ``flame.selectors``.
"""

from __future__ import annotations

from flame.sdk.plugins import Plugins
from flame.sdk.selectors.base import Selector

_HERE = "flame.sdk.selectors"

#: Every selector by name.
selectors: Plugins[Selector] = Plugins(
    "selector",
    "flame.selectors",
    {
        "async_oort": f"{_HERE}.async_oort:AsyncOort",
        "default": f"{_HERE}.default:Default",
        "fedbuff": f"{_HERE}.fedbuff:FedBuff",
        "oort": f"{_HERE}.oort:Oort",
        "random": f"{_HERE}.random:Random",
        "round_robin": f"{_HERE}.round_robin:RoundRobin",
    },
)
make = selectors.make
names = selectors.names
register = selectors.register

__all__ = ["Selector", "make", "names", "register", "selectors"]
