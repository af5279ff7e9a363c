"""Writes what three laboratories and a clinic know of the same patients, from the breast cancer study that ships with scikit-learn.

569 patients, for each ten measurements of cell nuclei: their means, their standard errors, their worst values. Each laboratory has
one of the three tables, in an order of its own, and misses some patients; the clinic has the diagnoses.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer

LABORATORIES = {"mean": slice(0, 10), "error": slice(10, 20), "worst": slice(20, 30)}

folder = Path(__file__).parent / "data"
rng = np.random.default_rng(7)
study = load_breast_cancer()
count = len(study.target)
ids = np.array([f"P{number:05d}" for number in rng.choice(100_000, count, replace=False)])
x = (study.data / 10 ** np.floor(np.log10(study.data.max(axis=0)))).astype(np.float32)

folder.mkdir(exist_ok=True)
for name, columns in LABORATORIES.items():
    rows = rng.permutation(count)[: count - 10]
    np.savez_compressed(folder / f"{name}.npz", id=ids[rows], x=x[rows][:, columns])
rows = rng.permutation(count)
held_out = rng.random(count) < 0.25
np.savez_compressed(
    folder / "diagnoses.npz", id=ids[rows], benign=study.target[rows].astype(np.uint8), held_out=held_out
)
print(f"{count} patients, {study.target.sum()} of them benign; {held_out.sum()} are held out.")
