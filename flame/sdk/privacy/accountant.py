"""How much privacy the sampled Gaussian mechanism costs: Renyi differential privacy, turned into (epsilon, delta).

One use of the mechanism takes each participant with probability q, adds up what they bring (L2 norm at most 1) and adds
Gaussian noise of standard deviation z. At order a it costs log(A) / (a - 1), with A the a-th moment of the ratio of its
densities with and without one participant. Uses add up.

* Mironov: Renyi Differential Privacy. CSF 2017.
* Mironov, Talwar, Zhang: Renyi Differential Privacy of the Sampled Gaussian Mechanism. 2019, section 3.3 (A).
* Canonne, Kamath, Steinke: The Discrete Gaussian for Differential Privacy. NeurIPS 2020, proposition 12 (epsilon).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

#: The orders among which the best one is looked for.
ORDERS: tuple[float, ...] = (
    *(1 + x / 10 for x in range(1, 100)),
    *(float(x) for x in range(11, 64)),
    *(64.0, 80.0, 96.0, 128.0, 192.0, 256.0, 384.0, 512.0, 768.0, 1024.0),
)


def renyi(q: float, z: float, order: float) -> float:
    """The cost of one use at an order.

    :param q: the probability with which each participant is taken, in [0, 1].
    :param z: the noise's standard deviation over the largest norm, at least 0.
    :param order: above 1.
    """
    if q == 0:
        return 0.0
    if z == 0:
        return math.inf
    if q == 1:
        return order / (2 * z * z)
    log_a = _log_a_integer(q, z, int(order)) if order == int(order) else _log_a_fraction(q, z, order)
    return max(log_a, 0.0) / (order - 1)


def epsilon(costs: Sequence[float], delta: float, orders: Sequence[float] = ORDERS) -> float:
    """The least epsilon for which (epsilon, delta) differential privacy follows.

    :param costs: Renyi cost at each of ``orders``, of all uses together.
    :param delta: in (0, 1).
    """
    if not any(costs):
        return 0.0
    found = (
        cost + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
        for cost, order in zip(costs, orders, strict=True)
    )
    return max(0.0, min(found))


def _log_a_integer(q: float, z: float, order: int) -> float:
    """log A for a whole order: a binomial sum."""
    terms = [
        _log_binomial(order, k) + k * math.log(q) + (order - k) * math.log1p(-q) + (k * k - k) / (2 * z * z)
        for k in range(order + 1)
    ]
    top = max(terms)
    return top + math.log(math.fsum(math.exp(term - top) for term in terms))


def _log_a_fraction(q: float, z: float, order: float) -> float:
    """log A for any order: the integral, cut where q N(1) exceeds (1 - q) N(0), and each part as a binomial series."""
    cut = z * z * math.log(1 / q - 1) + 0.5
    total, total_sign = -math.inf, 1.0
    log_choose, sign = 0.0, 1.0
    for k in range(10_000):
        rest = order - k
        left = (
            rest * math.log1p(-q)
            + k * math.log(q)
            + (k * k - k) / (2 * z * z)
            + _log_half_erfc((k - cut) / (math.sqrt(2) * z))
        )
        right = (
            k * math.log1p(-q)
            + rest * math.log(q)
            + (rest * rest - rest) / (2 * z * z)
            + _log_half_erfc((cut - rest) / (math.sqrt(2) * z))
        )
        term = log_choose + _log_add(left, right)
        total, total_sign = _log_add_signed(total, total_sign, term, sign)
        if k > order and term < total - 35:
            break
        # The next binomial coefficient, order over k + 1; it alternates once k exceeds the order.
        factor = rest / (k + 1)
        log_choose += math.log(abs(factor))
        sign *= math.copysign(1.0, factor)
    return total


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _log_half_erfc(x: float) -> float:
    """log(erfc(x) / 2), also where erfc(x) is too small for a float."""
    if x < 20:
        return math.log(math.erfc(x) / 2)
    square = 1 / (2 * x * x)
    return -x * x - math.log(2 * x * math.sqrt(math.pi)) + math.log1p(-square + 3 * square**2 - 15 * square**3)


def _log_add(a: float, b: float) -> float:
    low, high = min(a, b), max(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def _log_add_signed(a: float, sign_a: float, b: float, sign_b: float) -> tuple[float, float]:
    """The logarithm and sign of sign_a e^a + sign_b e^b."""
    if sign_a == sign_b:
        return _log_add(a, b), sign_a
    if a == b:
        return -math.inf, 1.0
    (low, _), (high, sign) = sorted([(a, sign_a), (b, sign_b)])
    return (high if low == -math.inf else high + math.log1p(-math.exp(low - high))), sign
