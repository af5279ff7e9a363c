"""The ring all-reduce: every member ends with the same weighted mean, and none carries more traffic than another.

    x' = sum_k n_k y_k / sum_k n_k

The model lies in flat vectors. They are cut by bytes into as many chunks as there are members, so that a model with one huge
tensor is spread as evenly as any other. First each chunk travels once round the ring and is added up (reduce-scatter), then
the finished chunks travel round once more (all-gather): a member sends and receives 2 (N - 1) / N of the model, whatever N is.

Chunks are cut into pieces, and a piece is passed on as soon as it is there: the network carries one while the next is being
added. The number of samples travels with each piece and is added up on the way. Each element is divided once, by the member
that finishes its chunk, so all members end with the same bits.

Patarasuk, Yuan: Bandwidth optimal all-reduce algorithms for clusters of workstations. J. Parallel Distrib. Comput. 69 (2009).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from flame.errors import WorkerError
from flame.sdk.channel import WINDOW
from flame.sdk.optimizers.layout import Array, Flat

#: How many pieces a member sends before it waits for the first one of its neighbour.
AHEAD = 2
#: Bytes of a piece, at most and at least.
LARGEST_PIECE = 1 << 20
SMALLEST_PIECE = 64 << 10

Parts = dict[str, Array]
Send = Callable[[int, Parts, float], None]
Receive = Callable[[int], tuple[Parts, float]]


def piece_bytes(size: int) -> int:
    """How large a piece may be in a ring of ``size``: all pieces that are under way could lie at one member, and fit its window."""
    return max(SMALLEST_PIECE, min(LARGEST_PIECE, WINDOW // (2 * size * (AHEAD + 1))))


def allreduce(  # noqa: PLR0917 (they say where this member is)
    flat: Flat, count: float, rank: int, size: int, send: Send, receive: Receive, *, piece: int | None = None
) -> float:
    """Turn the members' sums into the mean of them all, in place.

    :param flat: this member's model times its number of samples, one vector a group; at the end the mean.
    :param count: its number of samples.
    :param rank: its place in the ring, from 0.
    :param size: how many members the ring has.
    :param send: ``send(index, parts, samples)`` gives a piece to the next member; the arrays may be changed afterwards.
    :param receive: ``receive(index)`` gives the piece of that number from the member before.
    :param piece: bytes of a piece; None: see :func:`piece_bytes`.
    :returns: the number of samples of all members; with 0 there is no mean, and ``flat`` has no meaning.
    :raises flame.errors.WorkerError: what was received does not fit the model.
    """
    total = sum(vector.nbytes for vector in flat.values())
    pieces = max(1, -(-total // (size * (piece or piece_bytes(size)))))
    if size == 1:
        _divide(flat, count)
        return count
    counts = [count] * size
    items = 2 * (size - 1) * pieces
    # A piece is sent on a whole turn of pieces after it was received, so at most so many can be sent before that.
    ahead = min(pieces - 1, AHEAD)
    for turn in range(items + ahead):
        if turn < items:
            step, number = divmod(turn, pieces)
            chunk = (rank - step) % size
            send(turn, _part(flat, chunk, size, number, pieces), counts[chunk])
        if turn >= ahead:
            step, number = divmod(turn - ahead, pieces)
            chunk = (rank - step - 1) % size
            mine = _part(flat, chunk, size, number, pieces)
            theirs, samples = receive(turn - ahead)
            _check(mine, theirs)
            if step < size - 1:
                for group, vector in mine.items():
                    np.add(vector, theirs[group], out=vector)
                samples += count
                if step == size - 2:
                    _divide(mine, samples)
            else:
                for group, vector in mine.items():
                    np.copyto(vector, theirs[group])
            counts[chunk] = samples
            del theirs
    return counts[0]


def _part(flat: Flat, chunk: int, chunks: int, number: int, pieces: int) -> Parts:
    """One piece of one chunk: views of the vectors."""
    parts = {}
    for group, vector in flat.items():
        start, stop = len(vector) * chunk // chunks, len(vector) * (chunk + 1) // chunks
        parts[group] = vector[
            start + (stop - start) * number // pieces : start + (stop - start) * (number + 1) // pieces
        ]
    return parts


def _divide(parts: Flat, by: float) -> None:
    if by > 0:
        for vector in parts.values():
            np.divide(vector, by, out=vector)


def _check(mine: Parts, theirs: Parts) -> None:
    if mine.keys() != theirs.keys() or any(
        theirs[group].shape != vector.shape or theirs[group].dtype != vector.dtype for group, vector in mine.items()
    ):
        raise WorkerError(
            "The members of the ring have different models: check that all make the same in initialize()."
        )
