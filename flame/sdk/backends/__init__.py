"""What carries messages between workers, by name.

A new backend is one file with a subclass of :class:`flame.sdk.backends.base.Backend`, and one line here, or one call
of :func:`register`, or one entry point in the group ``flame.backends``. A backend's module is imported when a channel
chooses it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flame.sdk.plugins import Plugins

if TYPE_CHECKING:
    from flame.sdk.backends.base import Backend, BackendContext

BACKENDS: Plugins[Backend] = Plugins(
    "backend",
    "flame.backends",
    {
        "inproc": "flame.sdk.backends.inproc:InprocBackend",
        "mqtt": "flame.sdk.backends.mqtt:MqttBackend",
        "p2p": "flame.sdk.backends.p2p:P2pBackend",
    },
)


def register(sort: str, place: str) -> None:
    """Make a backend known in this process.

    :param sort: the name by which channels choose it.
    :param place: ``module:Class``; imported when it is chosen first.
    """
    BACKENDS.builtin[sort] = place


def make(sort: str, context: BackendContext) -> Backend:
    """The backend of that name, for one worker.

    :raises flame.errors.SpecError: there is none of that name.
    :raises flame.errors.BackendError: it cannot be used here.
    """
    return BACKENDS.load(sort)(context)
