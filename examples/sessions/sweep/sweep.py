"""Which hyperparameters suit federated averaging? A hundred training runs over eight settings, on warm executors.

python examples/sessions/sweep/sweep.py
"""

import argparse
import asyncio
import itertools
import statistics
import time
from typing import Any

import numpy as np

import flame.sessions
from flame.sdk import optimizers
from flame.sdk.optimizers import Update

SITES, BATCH, ROUNDS = 5, 20, 5
SETTINGS = [
    {"optimizer": optimizer, "rate": rate, "epochs": epochs}
    for optimizer, rate, epochs in itertools.product(("fedavg", "fedavgm"), (0.05, 0.5), (1, 4))
]


class Training:
    """Simulates a federation: sites with few of the ten digits each, whose models an optimizer merges in each round."""

    def on_session_enter(self, ctx: Any) -> None:
        """The data set is there once, and no task carries or reads it."""
        self.images, self.labels = ctx.common_data["images"], ctx.common_data["labels"]

    def on_task_invoke(self, ctx: Any, task: Any) -> float:
        """A training run; gives the accuracy on pictures that no site has seen."""
        setting, rng = task.input["setting"], np.random.default_rng(task.input["seed"])
        order = rng.permutation(len(self.labels))
        test, train = order[:360], order[360:]
        by_label = train[np.argsort(self.labels[train], kind="stable")]
        sites = np.array_split(by_label, SITES)  # two digits each, or nearly so
        optimizer = optimizers.make(setting["optimizer"], {})
        model: Any = {"weight": np.zeros((64, 10), np.float32), "bias": np.zeros(10, np.float32)}
        for number in range(task.input["rounds"]):
            optimizer.begin(model, number)
            for name, mine in enumerate(sites):
                weights = self._local(model, mine, setting, rng)
                optimizer.fold(Update(end=f"site-{name}", weights=weights, count=len(mine), version=number))
            model = optimizer.finish()
        scores = self.images[test] @ model["weight"] + model["bias"]
        return float((scores.argmax(axis=1) == self.labels[test]).mean())

    def _local(self, model: Any, mine: Any, setting: Any, rng: Any) -> dict[str, Any]:
        """A site's epochs of gradient descent on its own pictures."""
        weight, bias = model["weight"].copy(), model["bias"].copy()
        for _ in range(setting["epochs"]):
            for batch in np.array_split(rng.permutation(mine), len(mine) // BATCH):
                x, y = self.images[batch], self.labels[batch]
                wrong = np.exp(x @ weight + bias)
                wrong /= wrong.sum(axis=1, keepdims=True)
                wrong[np.arange(len(y)), y] -= 1
                weight -= setting["rate"] / len(y) * (x.T @ wrong)
                bias -= setting["rate"] / len(y) * wrong.sum(axis=0)
        return {"weight": weight, "bias": bias}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    if given.runs < 2 * len(SETTINGS):
        parser.error(f"a deviation takes two runs of each setting: --runs {2 * len(SETTINGS)} or more")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    data = {"images": (images / 16).astype(np.float32), "labels": labels.astype(np.int64)}
    seeds = range(-(-given.runs // len(SETTINGS)))  # one seed after the other, so that all settings meet the same ones
    runs = [(number, seed) for seed in seeds for number in range(len(SETTINGS))][: given.runs]
    began = time.perf_counter()
    found: dict[int, list[float]] = {number: [] for number in range(len(SETTINGS))}
    async with flame.sessions.open(Training, common_data=data, resources={"cpu": 1}) as session:  # one for each core
        tasks = ({"setting": SETTINGS[number], "seed": seed, "rounds": given.rounds} for number, seed in runs)
        answers = session.map(tasks)
        for number, _ in runs:
            found[number].append(await anext(answers))
    print(f"{len(runs)} runs in {time.perf_counter() - began:.1f} s\n")
    print(f"{'optimizer':<10}{'rate':>6}{'epochs':>8}{'runs':>6}   accuracy (mean ± sd)")
    for number, accuracies in sorted(found.items(), key=lambda each: -statistics.mean(each[1])):
        optimizer, rate, epochs = SETTINGS[number].values()
        shown = f"{statistics.mean(accuracies):.3f} ± {statistics.stdev(accuracies):.3f}"
        print(f"{optimizer:<10}{rate:>6}{epochs:>8}{len(accuracies):>6}   {shown}")


if __name__ == "__main__":
    asyncio.run(main())
