"""Which samples all parties have, found without sending an id: each party sends HMAC-SHA256(key, id), cut to 128 bits.

The key is made of the job's secret. What that protects: who carries or records the messages (a broker, the network) cannot
try out guessed ids, because it lacks the key; and hashes of two jobs do not match. What it does not: every worker of the
job has the key. The active party, which gets all hashes, can find out by trying whether a guessed id is among a party's
samples; where ids are easy to enumerate, such as account numbers, it can find them all. And every party learns which of its own
samples all others have too, as it must to train on them. A job that is run by hand without ``FLAME_JOB_KEY`` has no secret.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from flame.errors import WorkerError

#: Bytes of a hash. Among 2**32 samples two are equal by chance once in 2**65 jobs.
WIDTH = 16


def hashed(ids: Iterable[Any], key: bytes) -> npt.NDArray[np.uint8]:
    """The keyed hashes of sample ids.

    :param ids: each one bytes, or something whose ``str`` says which sample it is: ``17`` and ``"17"`` are the same.
    :param key: the secret that the parties share.
    :returns: ``[samples, 16]``, in the order of ``ids``.
    :raises flame.errors.WorkerError: two samples have the same id.
    """
    seen: dict[bytes, int] = {}
    for row, each in enumerate(ids):
        text = each if isinstance(each, bytes) else str(each).encode()
        digest = hmac.digest(key, text, hashlib.sha256)[:WIDTH]
        if seen.setdefault(digest, row) != row:
            raise WorkerError(f"The samples {seen[digest]} and {row} have the same id: an id must name one sample.")
    return np.frombuffer(b"".join(seen), np.uint8).reshape(-1, WIDTH)


def common(parties: Sequence[npt.NDArray[np.uint8]]) -> list[npt.NDArray[np.int64]]:
    """The samples that all parties have.

    :param parties: each party's hashes, as :func:`hashed` makes them.
    :returns: for each party the rows of those samples, all in one order (that of the hashes, which tells nothing of the ids).
    :raises flame.errors.WorkerError: what a party gave are no hashes, or not different ones.
    """
    rows = [_rows(hashes) for hashes in parties]
    everywhere = sorted(set.intersection(*(set(each) for each in rows))) if rows else []
    return [np.array([each[digest] for digest in everywhere], np.int64) for each in rows]


def _rows(hashes: npt.NDArray[np.uint8]) -> dict[bytes, int]:
    array = np.asarray(hashes)
    if array.ndim != 2 or array.shape[1] != WIDTH or array.dtype != np.uint8:
        raise WorkerError(f"Hashes of ids are bytes [samples, {WIDTH}], not {array.dtype}{list(array.shape)}.")
    data = array.tobytes()
    rows = {data[at : at + WIDTH]: at // WIDTH for at in range(0, len(data), WIDTH)}
    if len(rows) != len(array):
        raise WorkerError("Two samples of a party have the same hash: an id must name one sample.")
    return rows
