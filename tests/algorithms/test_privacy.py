"""What differential privacy does to an update, and that its price is the right one."""

import json
import math

import numpy as np
import pytest

from flame.errors import SpecError, WorkerError
from flame.sdk import privacy
from flame.sdk.privacy.accountant import ORDERS, epsilon, renyi


def dp(**kwargs):
    return privacy.make("dp", {"clip_threshold": 1.0, "noise_factor": 0.0, **kwargs})


def model(value, size=20):
    return {
        "w": np.full((size, 5), value, "f4"),
        "b": np.full(size, value, "f8"),
        "n": np.array(int(value * 10)),
        "flag": np.array([value > 0]),
    }


def norm(new, old):
    return math.sqrt(sum(((new[k].astype("f8") - old[k]) ** 2).sum() for k in ("w", "b")))


def test_by_default_an_update_leaves_as_it_is():
    weights = model(1.0)
    assert privacy.make("default").apply(weights, model(0.0)) is weights


@pytest.mark.parametrize("length", [0.01, 3.0, 1e6])
def test_an_update_is_clipped_over_all_floating_tensors(length):
    start, private = model(0.5), dp(clip_threshold=2.0)
    result = private.apply(model(0.5 + length), start)
    before = norm(model(0.5 + length), start)
    assert norm(result, start) == pytest.approx(min(before, 2.0), rel=1e-5)
    direction = (result["w"] - start["w"]) / np.float32(min(1, 2.0 / before))
    np.testing.assert_allclose(direction, length, rtol=1e-3)
    assert result["w"].dtype == np.float32
    assert result["b"].dtype == np.float64


def test_counters_do_not_leave_the_trainer():
    start = model(0.5)
    result = dp().apply(model(7.0), start)
    assert result["n"] == start["n"]
    assert (result["flag"] == start["flag"]).all()


def test_the_noise_is_gaussian_with_the_said_deviation():
    start = model(0.0, 20_000)
    noise = dp(noise_factor=0.3, seed=1).apply(start, start)
    values = np.concatenate([noise["w"].ravel(), noise["b"]])
    assert values.std() == pytest.approx(0.3, rel=0.01)
    assert abs(values.mean()) < 0.005
    assert (np.abs(values) < 0.3).mean() == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.01)


def test_noise_differs_from_update_to_update_and_from_trainer_to_trainer():
    start = model(0.0)
    one = dp(noise_factor=0.3)
    draws = [one.apply(start, start)["w"], one.apply(start, start)["w"], dp(noise_factor=0.3).apply(start, start)["w"]]
    assert len({draw.tobytes() for draw in draws}) == 3


def test_bfloat16_stays_what_it_is():
    torch = pytest.importorskip("torch")
    start = {"w": torch.zeros(8, dtype=torch.bfloat16)}
    assert dp().apply({"w": torch.ones(8, dtype=torch.bfloat16)}, start)["w"].dtype is torch.bfloat16


def test_a_difference_is_made_private_under_the_name_of_flames_library():
    assert np.linalg.norm(dp().apply_dp_fn({"w": np.full(100, 5.0)})["w"]) == pytest.approx(1.0)


def test_an_update_that_has_diverged_is_refused():
    bad = model(1.0)
    bad["w"][0] = np.nan
    with pytest.raises(WorkerError, match="not finite"):
        dp().apply(bad, model(0.0))


def integral(q, z, order):
    """log A by the trapezoidal rule: the moment of ((1 - q) N(0) + q N(1)) / N(0) under N(0), in logarithms."""
    x = np.linspace(-20 * z, order + 20 * z, 400_001)
    ratio = np.logaddexp(np.log1p(-q), np.log(q) + (2 * x - 1) / (2 * z * z))
    log_density = -(x**2) / (2 * z * z) - math.log(z * math.sqrt(2 * math.pi))
    values = order * ratio + log_density
    top = values.max()
    return top + math.log(np.trapezoid(np.exp(values - top), x))


@pytest.mark.parametrize("q", [1e-4, 0.01, 0.2, 0.7])
@pytest.mark.parametrize("z", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("order", [1.1, 1.5, 2, 2.7, 5, 9.9, 32, 63.5])
def test_the_price_at_an_order_is_the_integral_that_defines_it(q, z, order):
    assert renyi(q, z, order) * (order - 1) == pytest.approx(max(0, integral(q, z, order)), rel=1e-6, abs=1e-10)


def test_the_price_agrees_with_published_figures():
    # The values that the tests of TensorFlow Privacy's accountant give for 50 steps at q = 0.01, z = 2.5.
    orders, published = [1.5, 2.5, 5, 50, 100], [0.00065, 0.001085, 0.00218075, 0.023846, 167.416307]
    for order, expected in zip(orders, published, strict=True):
        assert 50 * renyi(0.01, 2.5, order) == pytest.approx(expected, abs=1e-5)
    assert 10 * renyi(0.1, 2, 5) == pytest.approx(0.07737, abs=1e-5)


@pytest.mark.parametrize(
    ("q", "z", "steps", "delta", "published"),
    [
        (150 / 60000, 1.3, 15 * 400, 1e-5, 0.7242234026109595),
        (100 / 100000, 1.0, 30 * 1000, 1e-7, 1.4154988495444845),
        (1024 / 1e8, 0.1, 976_563, 1e-7, 5907982.31138195),
    ],
)
def test_epsilon_agrees_with_published_figures(q, z, steps, delta, published):
    # From the tests of TensorFlow Privacy's compute_dp_sgd_privacy; its orders begin at 1.25 and end at 512.
    orders = [1.25, 1.5, 1.75, *(2 + x / 4 for x in range(8)), 4.5, *range(5, 64), 128, 256, 512]
    costs = [steps * renyi(q, z, order) for order in orders]
    assert epsilon(costs, delta, orders) == pytest.approx(published, rel=1e-6)


def exact_delta(eps, z):
    """Of the Gaussian mechanism without sampling (Balle, Wang: ICML 2018, theorem 8)."""

    def phi(x):
        return math.erfc(-x / math.sqrt(2)) / 2

    return phi(1 / (2 * z) - eps * z) - math.exp(eps) * phi(-1 / (2 * z) - eps * z)


@pytest.mark.parametrize(("z", "steps"), [(1.0, 1), (5.0, 10), (2.0, 30)])
def test_epsilon_is_an_upper_bound_of_the_exact_one_and_not_far_above(z, steps):
    bound = epsilon([steps * renyi(1.0, z, order) for order in ORDERS], 1e-5)
    # k uses without sampling are one use with less noise.
    assert exact_delta(bound, z / math.sqrt(steps)) <= 1e-5
    assert exact_delta(0.85 * bound, z / math.sqrt(steps)) > 1e-5


def test_the_account_grows_with_each_round_and_stops_at_the_budget():
    private = dp(noise_factor=4.0, budget=2.0, sampling_rate=0.5)
    assert private.metrics() == {"epsilon": 0.0, "delta": 1e-5}
    spent = [0.0]
    while private.affords():
        private.step()
        spent.append(private.metrics()["epsilon"])
    assert spent == sorted(set(spent))
    assert len(spent) > 1
    assert spent[-1] <= 2.0 < private.epsilon_after(private.steps + 1)


def test_a_restart_forgets_no_round():
    first, second = dp(noise_factor=1.0), dp(noise_factor=1.0)
    for _ in range(3):
        first.step()
    second.load_state(json.loads(json.dumps(first.state())))
    assert second.epsilon == first.epsilon > 0


def test_sampling_makes_a_round_cheaper_and_no_noise_is_no_privacy():
    assert dp(noise_factor=1.0, sampling_rate=0.1).epsilon_after(10) < dp(noise_factor=1.0).epsilon_after(10)
    assert dp(noise_factor=0.0).epsilon_after(1) == math.inf


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"clip_threshold": 0}, "clip_threshold must be above 0, not 0"),
        ({"noise_factor": -1}, "noise_factor must be at least 0"),
        ({"delta": 1}, "delta must be above 0 and below 1"),
        ({"sampling_rate": 1.5}, "sampling_rate must be at most 1"),
        ({"noise": 1}, "takes no argument 'noise'. Did you mean 'noise_factor'?"),
    ],
)
def test_arguments_out_of_range_are_refused(kwargs, says):
    with pytest.raises(SpecError) as caught:
        dp(**kwargs)
    assert says in str(caught.value)
