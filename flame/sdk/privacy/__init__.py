"""What protects a trainer's data before its update leaves. One rule a file; a job names one and gives its arguments.

Add one by :func:`register`, or by an entry point in the group ``flame.privacies``.
"""

from __future__ import annotations

from flame.sdk.plugins import Plugins
from flame.sdk.privacy.base import Privacy

_HERE = "flame.sdk.privacy"

#: Every privacy by name.
privacies: Plugins[Privacy] = Plugins(
    "privacy",
    "flame.privacies",
    {
        "default": f"{_HERE}.default:Default",
        "dp": f"{_HERE}.dp:DifferentialPrivacy",
    },
)
make = privacies.make
names = privacies.names
register = privacies.register

__all__ = ["Privacy", "make", "names", "privacies", "register"]
