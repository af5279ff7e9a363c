"""Rounds to a target accuracy for each optimizer, on digits that are split by label over ten sites.

    python compare.py               the table and the plot, at the tuned rates of rates.json
    python compare.py --tune        looks for the rates first (some minutes) and writes rates.json

Everything runs in this process, with the optimizers as a job uses them. In each round half of the sites take part. Each
figure is the median over seeds, which change the split, the first weights, the order of samples and who takes part. The
rates are tuned on other seeds than those shown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from sites import Model, accuracy, gradient, split, start

from flame.errors import WorkerError
from flame.sdk import optimizers
from flame.sdk.optimizers import Update

HERE = Path(__file__).parent
SITES, CHOSEN, SKEW = 10, 5, 0.1
EPOCHS, BATCH = 5, 16
TARGET, WINDOW, LIMIT = 0.93, 5, 150
TUNING_SEEDS, SEEDS = range(100, 106), range(10)

LOCAL = (0.1, 0.3, 0.6)
#: What is tried: the optimizer's arguments, beside the local rate.
GRID: dict[str, dict[str, tuple[Any, ...]]] = {
    "fedavg": {},
    "fedavgm": {"beta_1": (0.5, 0.7, 0.9), "eta": (0.3, 1.0)},
    "fedprox": {"mu": (0.001, 0.01, 0.1)},
    "fedadam": {"eta": (0.02, 0.05, 0.1), "tau": (1e-3, 1e-2)},
    "fedadagrad": {"eta": (0.03, 0.1, 0.3), "tau": (1e-3, 1e-2)},
    "fedyogi": {"eta": (0.02, 0.05, 0.1), "tau": (1e-3, 1e-2)},
    "feddyn": {"alpha": (0.01, 0.03, 0.1)},
    "scaffold": {"eta": (0.7, 1.0)},
}
FIXED: dict[str, dict[str, Any]] = {"feddyn": {"num_trainers": SITES}, "scaffold": {"num_trainers": SITES}}


def train(regularizer: Any, model: Model, x: Any, y: Any, rate: float, rng: np.random.Generator) -> tuple[Model, int]:
    """A site's local epochs of SGD; gives its model and the number of steps."""
    local = {name: array.copy() for name, array in model.items()}
    steps = 0
    for _ in range(EPOCHS):
        for batch in np.array_split(rng.permutation(len(y)), max(1, len(y) // BATCH)):
            slopes, term = gradient(local, x[batch], y[batch]), regularizer.gradient(local)
            for name, array in local.items():
                array -= rate * (slopes[name] + term.get(name, 0))
            steps += 1
    return local, steps


def run(
    sort: str, kwargs: dict[str, Any], rate: float, seed: int, limit: int = LIMIT, stop: bool = False
) -> list[float]:
    """The accuracy after each round; with ``stop`` only until the target is reached."""
    rng = np.random.default_rng(seed)
    parts, test = split(SITES, SKEW, seed)
    optimizer = optimizers.make(sort, kwargs | FIXED.get(sort, {}))
    regularizers = [optimizer.regularizer() for _ in parts]
    model: Any = start(seed)
    reached = []
    for number in range(limit):
        optimizer.begin(model, number)
        extra = optimizer.extra()
        for k in sorted(rng.choice(SITES, CHOSEN, replace=False)):
            x, y = parts[k]
            if not len(y):
                continue
            regularizers[k].begin(model, extra)
            local, steps = train(regularizers[k], model, x, y, rate, rng)
            sent = regularizers[k].finish(local, steps, rate)
            optimizer.fold(Update(end=f"site{k}", weights=local, count=len(y), version=number, extra=sent))
        model = optimizer.finish()
        reached.append(accuracy(model, *test))
        if stop and np.mean(reached[-WINDOW:]) >= TARGET and len(reached) >= WINDOW:
            break
    return reached


def rounds_to_target(reached: list[float]) -> int:
    """The round at which the mean of the last :data:`WINDOW` accuracies is the target's; one more than there were if
    there is none. A single accuracy would reward curves that jump up and down.
    """
    means = np.convolve(reached, np.ones(WINDOW) / WINDOW, "valid")
    return next((i + WINDOW for i, value in enumerate(means) if value >= TARGET), len(reached) + 1)


def tune() -> dict[str, dict[str, Any]]:
    """For each optimizer the arguments that need the fewest rounds on the tuning seeds."""
    best: dict[str, dict[str, Any]] = {}
    for sort, grid in GRID.items():
        tried = []
        for rate, *values in itertools.product(LOCAL, *grid.values()):
            kwargs = dict(zip(grid, values, strict=True))
            try:
                with np.errstate(all="ignore"):
                    rounds = [rounds_to_target(run(sort, kwargs, rate, seed, stop=True)) for seed in TUNING_SEEDS]
            except WorkerError as error:  # values that are not finite: the rate is too large
                print(f"{sort} {kwargs} rate {rate}: {error}")
                continue
            tried.append((statistics.mean(rounds), rate, kwargs))
        mean, rate, kwargs = min(tried, key=lambda each: each[0])
        best[sort] = {"rate": rate, "kwargs": kwargs}
        print(f"{sort}: {mean:g} rounds with local rate {rate}, {kwargs}", flush=True)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true")
    tuned = tune() if parser.parse_args().tune else json.loads((HERE / "rates.json").read_text())
    (HERE / "rates.json").write_text(json.dumps(tuned, indent=2) + "\n")
    curves = {sort: [run(sort, each["kwargs"], each["rate"], seed) for seed in SEEDS] for sort, each in tuned.items()}
    print(f"\n{'optimizer':<12}{'rounds to ' + str(TARGET):>16}{'best':>8}{'worst':>8}{'after ' + str(LIMIT):>12}")
    for sort, runs in sorted(curves.items(), key=lambda each: statistics.median(map(rounds_to_target, each[1]))):
        rounds = sorted(map(rounds_to_target, runs))
        shown = [
            str(each) if each <= LIMIT else f">{LIMIT}" for each in (statistics.median(rounds), rounds[0], rounds[-1])
        ]
        last = statistics.median(each[-1] for each in runs)
        print(f"{sort:<12}{shown[0]:>16}{shown[1]:>8}{shown[2]:>8}{last:>12.3f}")
    draw(curves)


def draw(curves: dict[str, list[list[float]]]) -> None:
    """Write the plot beside this file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for sort, runs in curves.items():
        axes.plot(range(1, LIMIT + 1), np.median(runs, axis=0), label=sort)
    axes.axhline(TARGET, color="grey", linestyle=":")
    axes.set(xlabel="round", ylabel="accuracy on held-out digits", ylim=(0.5, 1), title="Ten sites, split by label")
    axes.legend()
    figure.savefig(HERE / "rounds.png", dpi=120)


if __name__ == "__main__":
    main()
