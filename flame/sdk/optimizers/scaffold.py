"""SCAFFOLD: control variates take the drift out of local steps.

    trainer:  y   <- y - lr (grad F_k(y) - c_k + c)         K times, from y = x
              c_k' = c_k - c + (x - y) / (K lr)             (option II)
    server:   x'   = x + eta (mean_k y_k - x)
              c'   = c + s mean_k (c_k' - c_k)

with s the share of trainers that took part, and means weighted by samples (in the paper all have equally many).

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh: SCAFFOLD: Stochastic Controlled Averaging for Federated Learning.
ICML 2020, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping

from flame.errors import WorkerError
from flame.sdk.optimizers.base import Regularizer, Update, Weights
from flame.sdk.optimizers.layout import Array, Flat, Layout, Run
from flame.sdk.optimizers.population import Population
from flame.sdk.optimizers.serverstep import ServerStep
from flame.sdk.optimizers.sums import Buffers, WeightedSum, blocks, check_finite
from flame.sdk.optimizers.terms import QuadraticTerm, trained
from flame.sdk.plugins import integer, number


class Scaffold(ServerStep):
    """Control variates. Memory: that of FedAvg, the server's variate, and the sum of the trainers' changes to theirs.

    Trainers must use plain SGD, and send the arrays that :meth:`Regularizer.finish` gives as ``Update.extra``.

    :param eta: the server's learning rate, above 0.
    :param num_trainers: how many trainers there are; None: as many as were seen.
    :param k: accepted because Flame's library takes it; the number of local steps is taken from each trainer.
    """

    sort = "scaffold"
    vectors = ("c",)

    def __init__(self, eta: float = 1.0, num_trainers: int | None = None, k: int | None = None) -> None:
        super().__init__()
        self.eta = number("eta", eta, above=0)
        self.population = Population(None if num_trainers is None else integer("num_trainers", num_trainers, low=1))
        self._variates: Layout | None = None
        self._pool = Buffers()
        self._changes = WeightedSum({})

    def begin(self, weights: Weights, round: int) -> None:
        """See :meth:`Optimizer.begin`."""
        super().begin(weights, round)
        if self._variates is None:
            # It has the trained groups of the model's layout, with the same places in them.
            self._variates = Layout(self.named("c"))
        self._changes = WeightedSum(self._pool.take(self._variates))
        self.population.begin()

    def prepare(self, layout: Layout) -> None:
        """See :meth:`FedAvg.prepare`."""
        super().prepare(layout)
        self._variates = None

    def accept(self, update: Update, runs: list[Run]) -> None:
        """See :meth:`FedAvg.accept`."""
        if self._variates is None or not update.extra:
            raise WorkerError(
                f"The update of {update.end} brings no control variate; SCAFFOLD's trainers must use its regularizer."
            )
        changes = self._variates.runs(update.extra, update.end)
        check_finite(changes, update.end)
        self._changes.add(changes, update.count)
        self.population.note(update)

    def close(self, total: WeightedSum) -> Flat:
        """See :meth:`FedAvg.close`."""
        share = self.population.share()
        for group, changes in self._changes.divide().items():
            variate = self.flats["c"][group]
            for part in blocks(variate.size, variate.itemsize):
                variate[part] += share * changes[part]
        return super().close(total)

    def move(self, current: Array, mean: Array, *states: Array) -> None:
        """See :meth:`ServerStep.move`."""
        if self.eta != 1.0:
            mean[:] = current + self.eta * (mean - current)

    def extra(self) -> Weights:
        """The server's control variate, as views."""
        return self.named("c")

    def regularizer(self) -> Regularizer:
        """See :meth:`Optimizer.regularizer`."""
        return ScaffoldTerm()

    def state(self) -> dict[str, Array]:
        """See :meth:`Optimizer.state`."""
        return super().state() | self.population.state()

    def load_state(self, state: Mapping[str, Array]) -> None:
        """See :meth:`Optimizer.load_state`."""
        super().load_state(state)
        self.population.load_state(state)


class ScaffoldTerm(QuadraticTerm):
    """The trainer's side. Adding ``<c - c_k, w>`` to the loss adds ``c - c_k`` to each gradient."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.server: Weights = {}
        self.variate: dict[str, Array] = {}

    def begin(self, weights: Weights, extra: Weights) -> None:
        """See :meth:`Regularizer.begin`."""
        super().begin(weights, extra)
        self.server = extra
        self.linear = {
            name: (extra[name] if name in extra else 0 * values) - self.variate.get(name, 0 * values)
            for name, values in self.start.items()
        }

    def finish(self, weights: Weights, steps: int, learning_rate: float) -> Weights:
        """See :meth:`Regularizer.finish`.

        :raises flame.errors.WorkerError: no step was made, or the learning rate is not above 0.
        """
        if steps < 1 or not learning_rate > 0:
            raise WorkerError(
                "SCAFFOLD needs the number of local steps and the learning rate of the local SGD, both above 0."
            )
        scale = 1.0 / (steps * learning_rate)
        # c_k' - c_k = -c + (x - y) / (K lr)
        change = {name: (self.start[name] - values) * scale for name, values in trained(weights).items()}
        for name, server in self.server.items():
            change[name] -= server
        self.variate = {name: self.variate[name] + each if self.variate else each for name, each in change.items()}
        self.server = {}
        super().finish(weights, steps, learning_rate)
        return change

    def state(self) -> dict[str, Array]:
        """See :meth:`Regularizer.state`."""
        return dict(self.variate)

    def load_state(self, state: Mapping[str, Array]) -> None:
        """See :meth:`Regularizer.load_state`."""
        self.variate = dict(state)
