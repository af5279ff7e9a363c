"""Writes data/north.csv and data/south.csv from the diabetes study that ships with scikit-learn.

442 patients; of each the body-mass index, the blood pressure, and how far the disease had progressed a year later, all as
standard scores. The leaner half is north, the rest south: no site alone sees the whole range.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_diabetes

study = load_diabetes()
columns = np.column_stack([study.data[:, 2], study.data[:, 3], study.target])
scores = (columns - columns.mean(axis=0)) / columns.std(axis=0)
leaner = scores[:, 0] < np.median(scores[:, 0])
folder = Path(__file__).parent / "data"
for name, rows in (("north", scores[leaner]), ("south", scores[~leaner])):
    np.savetxt(folder / f"{name}.csv", rows, fmt="%.4f", delimiter=",", header="bmi,pressure,progression", comments="")
