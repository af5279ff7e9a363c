"""Random numbers that are the same whenever a round is done again.

A round's seed is made of the hyperparameter ``seed``, the worker's place among the others (its role, its data, its groups) and the round's
number; never of ids, which differ from run to run.
"""

from __future__ import annotations

import hashlib
import random
import sys

from flame.sdk.config import Config


def seed_of(config: Config, order: str, round: int) -> int:
    """The seed of a worker's round, below 2^63.

    :param order: the digest of what the worker works on.
    """
    text = "\n".join((str(config.hyperparameters.get("seed", 0)), config.role, order, str(round)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_all(seed: int) -> None:
    """Seed the process's generators: of Python, of numpy, and of PyTorch where it is loaded."""
    import numpy as np  # not before: whoever only opens channels need not load it

    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(seed)
