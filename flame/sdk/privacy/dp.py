"""Differential privacy of a trainer's participation: clipped and noised updates, and an account of what they cost.

    d   = y - x                                   over floating tensors
    y'  = x + d min(1, C / ||d||) + N(0, s^2)     C: clip_threshold, s: noise_factor

Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang: Deep Learning with Differential Privacy. CCS 2016, on whole
updates as in McMahan, Ramage, Talwar, Zhang: Learning Differentially Private Recurrent Language Models. ICLR 2018; the
noise is added by each trainer, so the aggregator need not be trusted. The account is that of
:mod:`flame.sdk.privacy.accountant` with the noise multiplier z = s / C.

What it does not cover: metrics that a trainer reports, its number of samples, and the further arrays that some
optimizers send (SCAFFOLD's variates). Noise is made in floating point, whose lowest bits are known to tell something
(Mironov, CCS 2012).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from flame.errors import SpecError, WorkerError
from flame.sdk.optimizers.base import Weights, is_floating
from flame.sdk.optimizers.layout import BFLOAT16, Array, narrow, plain, widen
from flame.sdk.optimizers.sums import blocks
from flame.sdk.plugins import number
from flame.sdk.privacy.accountant import ORDERS, epsilon, renyi
from flame.sdk.privacy.base import Privacy


class DifferentialPrivacy(Privacy):
    """Gaussian noise on clipped updates. Integer and boolean tensors do not leave: the global model's are sent back.

    :param clip_threshold: C, the largest L2 norm of an update, above 0.
    :param noise_factor: s, the standard deviation of the noise on each number, at least 0; 0 only clips, and then
        epsilon is infinite.
    :param delta: the probability with which the guarantee may fail, in (0, 1).
    :param sampling_rate: the chance of a trainer to take part in a round, in (0, 1]; below 1 each round is cheaper, in
        the eyes of those who do not see who was chosen.
    :param budget: the epsilon that must not be exceeded; None: there is no limit.
    :param seed: for tests only: noise that can be foretold protects nobody.
    """

    sort = "dp"

    def __init__(
        self,
        clip_threshold: float,
        noise_factor: float,
        *,
        delta: float = 1e-5,
        sampling_rate: float = 1.0,
        budget: float | None = None,
        seed: int | None = None,
    ) -> None:
        self.clip_threshold = number("clip_threshold", clip_threshold, above=0)
        self.noise_factor = number("noise_factor", noise_factor, low=0)
        self.delta = number("delta", delta, above=0, below=1)
        self.sampling_rate = number("sampling_rate", sampling_rate, above=0)
        if self.sampling_rate > 1:
            raise SpecError(f"sampling_rate must be at most 1, not {sampling_rate}.", "kwargs")
        self.budget = None if budget is None else number("budget", budget, above=0)
        self.steps = 0
        self._rng = np.random.default_rng(seed)
        self._foretold = seed is not None
        self._costs: list[float] | None = None

    def apply(self, weights: Weights, start: Weights) -> Weights:
        """See :meth:`Privacy.apply`.

        :raises flame.errors.WorkerError: the update has values that are not finite.
        """
        floating = {
            name: (widen(plain(tensor)), widen(plain(start[name])))
            for name, tensor in weights.items()
            if is_floating(tensor)
        }
        scale = self._scale([(new, old) for new, old in floating.values()])
        private: dict[str, Array] = {}
        for name in weights:
            if name not in floating:
                private[name] = start[name]
                continue
            new, old = floating[name]
            result = np.empty(new.shape, new.dtype)
            source, origin, target = new.reshape(-1), old.reshape(-1), result.reshape(-1)
            for part in blocks(new.size, 8):
                noise = self._rng.normal(0.0, self.noise_factor, target[part].size)
                target[part] = origin[part] + (scale * (source[part].astype(np.float64) - origin[part]) + noise)
            private[name] = narrow(result) if plain(weights[name]).dtype == BFLOAT16 else result
        return private

    def apply_dp_fn(self, delta_weights: Weights) -> Weights:
        """The same for a difference, as Flame's library calls it."""
        return self.apply(delta_weights, {name: np.zeros_like(plain(each)) for name, each in delta_weights.items()})

    def step(self) -> None:
        """See :meth:`Privacy.step`."""
        self.steps += 1

    @property
    def epsilon(self) -> float:
        """What the rounds so far have cost a trainer, at :attr:`delta`."""
        return self.epsilon_after(self.steps)

    def epsilon_after(self, steps: int) -> float:
        """What so many rounds cost."""
        if self._costs is None:
            z = self.noise_factor / self.clip_threshold
            self._costs = [renyi(self.sampling_rate, z, order) for order in ORDERS]
        return epsilon([steps * cost for cost in self._costs], self.delta) if steps else 0.0

    def affords(self) -> bool:
        """See :meth:`Privacy.affords`."""
        return self.budget is None or self.epsilon_after(self.steps + 1) <= self.budget

    def metrics(self) -> dict[str, float]:
        """See :meth:`Privacy.metrics`."""
        return {"epsilon": self.epsilon, "delta": self.delta}

    def state(self) -> dict[str, Any]:
        """See :meth:`Privacy.state`."""
        # What makes the noise stays here: who knew it could take the noise away. Where it can be foretold, it may as well be kept.
        return {"steps": self.steps, **({"noise": self._rng.bit_generator.state} if self._foretold else {})}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Privacy.load_state`."""
        self.steps = int(state["steps"])
        if self._foretold and "noise" in state:
            self._rng.bit_generator.state = state["noise"]

    def _scale(self, pairs: list[tuple[Array, Array]]) -> float:
        """min(1, C / ||d||)."""
        squares = math.fsum(
            float(np.square(new.reshape(-1)[part].astype(np.float64) - old.reshape(-1)[part]).sum())
            for new, old in pairs
            for part in blocks(new.size, 8)
        )
        if not math.isfinite(squares):
            raise WorkerError(
                "The update has values that are not finite, so no noise can protect it: lower the learning rate."
            )
        return min(1.0, self.clip_threshold / math.sqrt(squares)) if squares else 1.0
