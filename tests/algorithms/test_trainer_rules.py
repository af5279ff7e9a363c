"""FedProx, FedDyn, SCAFFOLD and FedGFT: trainers and server together, against their papers, over several rounds.

The trainers' losses are quadratic, F_k(w) = 1/2 ||A_k w - b_k||^2, with plain gradient steps.
"""

import numpy as np
import pytest

from flame.errors import SpecError, WorkerError
from flame.sdk import optimizers
from flame.sdk.optimizers import Update

SITES, DIMENSION, STEPS, RATE, ROUNDS = 4, 6, 5, 0.02, 8


class Site:
    def __init__(self, rng):
        self.a = rng.normal(size=(8, DIMENSION))
        self.b = rng.normal(size=8) * 3

    def gradient(self, w):
        return self.a.T @ (self.a @ w - self.b)


def split(vector):
    """A vector as a model of two tensors."""
    return {"fc.weight": vector[:4].reshape(2, 2).astype("f8"), "fc.bias": vector[4:].astype("f8")}


def join(weights):
    return np.concatenate([np.ravel(weights["fc.weight"]), weights["fc.bias"]])


def train(site, regularizer, weights, extra, number, end, count=10.0):
    """A numpy trainer: local gradient steps with the algorithm's term."""
    regularizer.begin(weights, extra)
    w = join(weights)
    for _ in range(STEPS):
        term = regularizer.gradient(split(w))
        w = w - RATE * (site.gradient(w) + (join(term) if term else 0))
    sent = regularizer.finish(split(w), STEPS, RATE)
    return Update(end=end, weights=split(w), count=count, version=number, extra=sent)


def run(optimizer, sites, x, chosen, regularizers, number):
    optimizer.begin(split(x), number)
    extra = optimizer.extra()
    for k in chosen:
        optimizer.fold(train(sites[k], regularizers[k], split(x), extra, number, f"t{k}"))
    return join(optimizer.finish())


@pytest.fixture
def sites():
    rng = np.random.default_rng(11)
    return [Site(rng) for _ in range(SITES)]


def participants(number, everybody):
    return list(range(SITES)) if everybody else [number % SITES, (number + 1) % SITES]


def test_fedprox_pulls_each_step_towards_the_global_model(sites):
    optimizer = optimizers.make("fedprox", {"mu": 0.7})
    regularizers = [optimizer.regularizer() for _ in sites]
    x = paper = np.zeros(DIMENSION)
    for number in range(ROUNDS):
        x = run(optimizer, sites, x, range(SITES), regularizers, number)
        ends = []
        for site in sites:
            w = paper.copy()
            for _ in range(STEPS):
                w = w - RATE * (site.gradient(w) + 0.7 * (w - paper))
            ends.append(w)
        paper = np.mean(ends, axis=0)
        np.testing.assert_allclose(x, paper, atol=1e-5)


@pytest.mark.parametrize("everybody", [True, False])
def test_feddyn_follows_its_algorithm(sites, everybody):
    alpha = 0.5
    optimizer = optimizers.make("feddyn", {"alpha": alpha, "num_trainers": SITES})
    regularizers = [optimizer.regularizer() for _ in sites]
    x = paper = np.ones(DIMENSION)
    h, g = np.zeros(DIMENSION), np.zeros((SITES, DIMENSION))
    for number in range(ROUNDS):
        chosen = participants(number, everybody)
        x = run(optimizer, sites, x, chosen, regularizers, number)
        ends = []
        for k in chosen:
            w = paper.copy()
            for _ in range(STEPS):
                w = w - RATE * (sites[k].gradient(w) - g[k] + alpha * (w - paper))
            g[k] = g[k] - alpha * (w - paper)
            ends.append(w)
        h = h - alpha / SITES * sum(w - paper for w in ends)
        paper = np.mean(ends, axis=0) - h / alpha
        np.testing.assert_allclose(x, paper, atol=1e-5)


@pytest.mark.parametrize("everybody", [True, False])
def test_scaffold_follows_its_algorithm_with_option_two(sites, everybody):
    optimizer = optimizers.make("scaffold", {"eta": 0.9, "num_trainers": SITES})
    regularizers = [optimizer.regularizer() for _ in sites]
    x = paper = np.ones(DIMENSION)
    c, local = np.zeros(DIMENSION), np.zeros((SITES, DIMENSION))
    for number in range(ROUNDS):
        chosen = participants(number, everybody)
        x = run(optimizer, sites, x, chosen, regularizers, number)
        moves, changes = [], []
        for k in chosen:
            y = paper.copy()
            for _ in range(STEPS):
                y = y - RATE * (sites[k].gradient(y) - local[k] + c)
            new = local[k] - c + (paper - y) / (STEPS * RATE)
            moves.append(y - paper)
            changes.append(new - local[k])
            local[k] = new
        paper = paper + 0.9 * np.mean(moves, axis=0)
        c = c + len(chosen) / SITES * np.mean(changes, axis=0)
        np.testing.assert_allclose(x, paper, atol=1e-5)
        np.testing.assert_allclose(join(optimizer.extra()), c, atol=1e-5)


@pytest.mark.parametrize(("sort", "kwargs"), [("scaffold", {}), ("feddyn", {"alpha": 1.0})])
def test_drift_correction_reaches_the_optimum_that_averaging_misses(sites, sort, kwargs):
    best = np.linalg.solve(sum(s.a.T @ s.a for s in sites), sum(s.a.T @ s.b for s in sites))
    distance = {}
    for name, arguments in (("fedavg", {}), (sort, kwargs)):
        optimizer = optimizers.make(name, arguments)
        regularizers = [optimizer.regularizer() for _ in sites]
        x = np.zeros(DIMENSION)
        for number in range(600):
            x = run(optimizer, sites, x, range(SITES), regularizers, number)
        distance[name] = np.linalg.norm(x - best)
    assert distance["fedavg"] > 0.05
    assert distance[sort] < 1e-4


def test_the_number_of_trainers_is_learnt_from_those_who_come(sites):
    told = optimizers.make("feddyn", {"alpha": 0.5, "num_trainers": SITES})
    learnt = optimizers.make("feddyn", {"alpha": 0.5})
    for optimizer in (told, learnt):
        regularizers = [optimizer.regularizer() for _ in sites]
        x = np.zeros(DIMENSION)
        for number in range(3):
            x = run(optimizer, sites, x, range(SITES), regularizers, number)
    np.testing.assert_array_equal(join(told.named("h")), join(learnt.named("h")))


def test_scaffold_refuses_an_update_without_a_variate(sites):
    optimizer = optimizers.make("scaffold")
    optimizer.begin(split(np.zeros(DIMENSION)), 0)
    with pytest.raises(WorkerError, match="t1 brings no control variate"):
        optimizer.fold(Update(end="t1", weights=split(np.zeros(DIMENSION)), count=1, version=0))
    with pytest.raises(WorkerError, match="local steps and the learning rate"):
        optimizer.regularizer().finish({}, 0, 0.1)


def linear_module():
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).double()
    return torch, module, {name: value.numpy().copy() for name, value in module.state_dict().items()}


def shifted(weights, by):
    return {name: np.asarray(array + np.asarray(by, array.dtype)) for name, array in weights.items()}


@pytest.mark.parametrize(
    ("sort", "kwargs"), [("fedprox", {"mu": 0.3}), ("feddyn", {"alpha": 0.2}), ("scaffold", {}), ("fedavg", {})]
)
def test_the_pytorch_term_has_the_gradient_that_numpy_gives(sort, kwargs):
    _, module, start = linear_module()
    optimizer = optimizers.make(sort, kwargs)
    regularizer = optimizer.regularizer()
    extra = {name: shifted(start, 1.5)[name] for name in start if "running" not in name and "num" not in name}
    regularizer.begin(start, extra)
    regularizer.finish(shifted(start, 0.25), 3, 0.1)
    regularizer.begin(shifted(start, 0.5), extra)
    term = regularizer.get_term(curr_model=module)
    slopes = regularizer.gradient({name: value.detach().numpy() for name, value in module.state_dict().items()})
    if sort == "fedavg":
        assert (term, slopes) == (0.0, {})
        return
    term.backward()
    for name, parameter in module.named_parameters():
        assert np.abs(slopes[name]).max() > 0
        np.testing.assert_allclose(parameter.grad.numpy(), slopes[name], atol=1e-12)
    assert "1.running_mean" not in slopes


def test_the_term_takes_the_forms_in_which_flame_scripts_call_it():
    torch, module, start = linear_module()
    regularizer = optimizers.make("fedprox", {"mu": 0.3}).regularizer()
    regularizer.begin(shifted(start, 1), {})
    before = [parameter.detach() + 1 for parameter in module.parameters()]
    expected = 0.15 * sum(parameter.numel() for parameter in module.parameters())
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).double()
    other.load_state_dict({name: torch.from_numpy(value) for name, value in shifted(start, 1).items()})
    for kwargs in (
        {"w": module.parameters(), "w_t": before},
        {"curr_model": module, "prev_model": other},
        {"curr_model": module},
        {"curr_model_params": dict(module.named_parameters()), "prev_model_params": dict(other.named_parameters())},
        {"curr_model_params": module.parameters(), "prev_model_params": before},
    ):
        assert regularizer.get_term(**kwargs).item() == pytest.approx(expected)
    with pytest.raises(WorkerError, match="curr_model"):
        regularizer.get_term()
    with pytest.raises(WorkerError, match="which parameter is which"):
        regularizer.get_term(w=before[:2])


@pytest.mark.parametrize("fair", ["SP", "EOP", "CAL"])
@pytest.mark.parametrize("reg", ["l2", "id"])
def test_fedgft_pushes_along_the_gradient_of_the_global_bias(fair, reg):
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(5)
    data = [
        (
            torch.randn(30, 2, generator=generator, dtype=torch.float64),
            torch.randint(0, 2, (30,), generator=generator),
            torch.randint(0, 2, (30,), generator=generator),
        )
        for _ in range(3)
    ]
    weight = torch.randn(2, 2, generator=generator, dtype=torch.float64)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(weight.clone())

        def forward(self, x):
            return torch.log_softmax(x @ self.weight, dim=1)

    def global_bias(w):
        x, y, g = (torch.cat([part[i] for part in data]) for i in range(3))
        p = torch.softmax(x @ w, dim=1)[:, 1]
        ratio = []
        for group in (0, 1):
            member = g == group
            if fair == "SP":
                ratio.append(p[member].mean())
            elif fair == "EOP":
                ratio.append(p[member & (y == 1)].mean())
            else:
                ratio.append(p[member & (y == 1)].sum() / p[member].sum())
        return ratio[0] - ratio[1]

    optimizer = optimizers.make("fedgft", {"fair": fair, "gamma": 0.6, "reg": reg})
    optimizer.begin({"weight": weight.numpy()}, 0)
    for k, batch in enumerate(data):
        regularizer = optimizer.regularizer()
        regularizer.begin({"weight": weight.numpy()}, optimizer.extra())
        regularizer.update_local_bias_params(Model(), [batch])
        assert regularizer.get_term(output=Model()(batch[0]), target=batch[1], group=batch[2]) == 0.0
        sent = regularizer.finish({}, 1, 0.1)
        optimizer.fold(Update(end=f"t{k}", weights={"weight": weight.numpy()}, count=30, version=0, extra=sent))
    model = optimizer.finish()
    assert optimizer.bias == pytest.approx(float(global_bias(weight)))

    # In the next round, the terms' gradients over all trainers add up to the gradient of gamma J(F).
    slopes = torch.zeros(2, 2, dtype=torch.float64)
    for batch in data:
        regularizer = optimizer.regularizer()
        regularizer.begin(model, optimizer.extra())
        local = Model()
        regularizer.get_term(output=local(batch[0]), target=batch[1], group=batch[2]).backward()
        slopes += local.weight.grad / len(data)
    free = weight.clone().requires_grad_()
    value = global_bias(free)
    (0.6 * (value**2 / 2 if reg == "l2" else value.abs())).backward()
    np.testing.assert_allclose(slopes.numpy(), free.grad.numpy(), atol=1e-10)


def test_fedgft_says_what_is_wrong_with_its_arguments():
    with pytest.raises(SpecError, match="fair must be one of SP, EOP, CAL, not 'DP'"):
        optimizers.make("fedgft", {"fair": "DP", "gamma": 1})
    with pytest.raises(SpecError, match="reg must be"):
        optimizers.make("fedgft", {"fair": "SP", "gamma": 1, "reg": "l1"})
    optimizer = optimizers.make("fedgft", {"fair": "SP", "gamma": "auto"})
    optimizer.begin({"w": np.zeros(1)}, 0)
    with pytest.raises(WorkerError, match="brings no sums"):
        optimizer.fold(Update(end="t", weights={"w": np.zeros(1)}, count=1, version=0))
