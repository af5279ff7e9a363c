"""The trainer of asynchronous federated learning.

It does what a synchronous one does: it works on the version that it is given and sends back the difference, because the job's
optimizer wants differences. Which versions those are, and how many others work meanwhile, it need not know.
"""

from flame.sdk.mode.horizontal.syncfl.trainer import TAG_FETCH, TAG_UPLOAD
from flame.sdk.mode.horizontal.syncfl.trainer import Trainer as SyncTrainer

__all__ = ["TAG_FETCH", "TAG_UPLOAD", "Trainer"]


class Trainer(SyncTrainer):
    """Trains whatever version it is given; see :class:`flame.sdk.mode.horizontal.syncfl.trainer.Trainer`."""
