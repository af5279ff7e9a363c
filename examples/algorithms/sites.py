"""Ten sites with handwritten digits, split by label, and a small network in numpy that they train."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits

Array = npt.NDArray[np.float32]
Model = dict[str, Array]

HIDDEN = 32


def split(sites: int, skew: float, seed: int) -> tuple[list[tuple[Array, Array]], tuple[Array, Array]]:
    """The digits that ship with scikit-learn: a part for each site, and one to test on.

    Each label's samples go to the sites in shares drawn from a Dirichlet distribution: the smaller ``skew``, the fewer
    labels a site has.
    """
    rng = np.random.default_rng(seed)
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    order = rng.permutation(len(images))
    test, train = order[:360], order[360:]
    parts: list[list[int]] = [[] for _ in range(sites)]
    for label in range(10):
        mine = train[labels[train] == label]
        cuts = (np.cumsum(rng.dirichlet(np.full(sites, skew))) * len(mine)).astype(int)[:-1]
        for part, indices in zip(parts, np.split(mine, cuts), strict=True):
            part.extend(indices)
    return [(images[part], labels[part]) for part in parts], (images[test], labels[test])


def start(seed: int) -> Model:
    """The network's first weights."""
    rng = np.random.default_rng(seed)
    return {
        "hidden.weight": (rng.standard_normal((64, HIDDEN)) * np.sqrt(2 / 64)).astype(np.float32),
        "hidden.bias": np.zeros(HIDDEN, np.float32),
        "out.weight": (rng.standard_normal((HIDDEN, 10)) * np.sqrt(1 / HIDDEN)).astype(np.float32),
        "out.bias": np.zeros(10, np.float32),
    }


def scores(model: Model, x: Array) -> tuple[Array, Array]:
    """The hidden layer and the ten scores of each image."""
    hidden = np.maximum(x @ model["hidden.weight"] + model["hidden.bias"], 0)
    return hidden, hidden @ model["out.weight"] + model["out.bias"]


def gradient(model: Model, x: Array, y: Array) -> Model:
    """Of the mean cross-entropy."""
    hidden, out = scores(model, x)
    out = np.exp(out - out.max(axis=1, keepdims=True))
    out /= out.sum(axis=1, keepdims=True)
    out[np.arange(len(y)), y] -= 1
    out /= len(y)
    back = (out @ model["out.weight"].T) * (hidden > 0)
    return {
        "hidden.weight": x.T @ back,
        "hidden.bias": back.sum(axis=0),
        "out.weight": hidden.T @ out,
        "out.bias": out.sum(axis=0),
    }


def accuracy(model: Model, x: Array, y: Array) -> float:
    """The share of images that are recognised."""
    return float((scores(model, x)[1].argmax(axis=1) == y).mean())
