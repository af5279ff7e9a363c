"""Writes the patients of three hospitals, from the diabetes study that ships with scikit-learn.

442 patients: age in years, body-mass index, mean blood pressure, and how far the disease progressed within a year. The oldest third is
in one hospital, the youngest in another; one hospital did not measure the pressure of everybody.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_diabetes

folder = Path(__file__).parent / "data"
folder.mkdir(exist_ok=True)
study = load_diabetes(scaled=False)
table = np.column_stack([study.data[:, [0, 2, 3]], study.target])
order = np.argsort(table[:, 0] + np.random.default_rng(7).normal(0, 8, len(table)))
for name, rows in zip(["coast", "hills", "city"], np.array_split(order, 3), strict=True):
    part = table[rows]
    if name == "hills":
        part[::5, 2] = np.nan
    np.savetxt(folder / f"{name}.csv", part, "%g", ",", header="age,bmi,pressure,progression", comments="")
    print(f"{name}: {len(part)} patients, {part[:, 0].mean():.1f} years old on average")
