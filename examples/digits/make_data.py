"""Writes the digits of four sites and the held-out ones, from the UCI handwritten digits that ship with scikit-learn.

1797 pictures of 8 x 8 pixels, values 0 to 16. A fifth is held out for the aggregator, in the proportions of the labels. The others
are dealt out with label skew: for each digit the sites' shares are drawn from a Dirichlet distribution (alpha 0.5, as is
usual for such experiments), so that every site knows some digits well and others hardly at all.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SITES = 4
ALPHA = 0.5

folder = Path(__file__).parent
rng = np.random.default_rng(7)
digits = load_digits()
x, x_test, y, y_test = train_test_split(
    digits.images.astype(np.uint8),
    digits.target.astype(np.uint8),
    test_size=0.2,
    random_state=7,
    stratify=digits.target,
)
np.savez_compressed(folder / "aggregator" / "held-out.npz", x=x_test, y=y_test)
site = np.empty(len(y), int)
for digit in range(10):
    rows = rng.permutation(np.flatnonzero(y == digit))
    cuts = np.cumsum(rng.dirichlet([ALPHA] * SITES) * len(rows))[:-1].astype(int)
    for number, part in enumerate(np.split(rows, cuts)):
        site[part] = number
for number in range(SITES):
    mine = site == number
    np.savez_compressed(folder / "data" / f"site-{number + 1}.npz", x=x[mine], y=y[mine])
    print(f"site {number + 1}: {mine.sum():4} pictures; of each digit {np.bincount(y[mine], minlength=10)}")
