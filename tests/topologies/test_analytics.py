"""What an analyst is told of data that stay with their sites is what it would compute with all of them in one place."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "sdk"))
from runkit import ROOT, Run
from syncjob import InThread, Job, Recorder

from flame.errors import RoundFailed, WorkerError
from flame.sdk import MessageType
from flame.sdk.config import Config
from flame.sdk.mode.analytics.analyst import Analyst
from flame.sdk.mode.analytics.respondent import Respondent
from flame.sdk.mode.analytics.statistics import Bracket, Summary, closed, present, tally

CHANNEL = {"name": "questions", "pair": ["site", "analyst"], "funcTags": {"site": ["answer"], "analyst": ["query"]}}
QS = [0, 0.05, 0.5, 0.9, 1]


def data(number):
    rng = np.random.default_rng(number)
    table = {
        "age": np.round(rng.normal(50 + 5 * number, 12, 40 + 30 * number)),
        "dose": rng.lognormal(0, 3, 50) * 10.0 ** rng.integers(-9, 9, 50),
    }
    table["age"][::7] = np.nan
    if number == 1:
        table["rare"] = np.array([1.0, 2.0])
    return table


class Site(InThread, Respondent):
    def __init__(self, config):
        self.config = config
        self.number = int(config.dataset.rsplit("/", 1)[1])

    def load_data(self):
        self.table = data(self.number)


class Asking(InThread, Analyst):
    def __init__(self, config):
        self.config = config

    def analyse(self):
        found = {"summary": self.summary()}
        self.update_metrics({"age": found["summary"]["age"].mean})
        found["histogram"] = self.histogram("age", [20, 40, 50, 80])
        found["exact"] = self.quantiles(["age", "dose"], QS)
        found["near"] = self.quantiles("age", QS, error=0.5)
        return found


def job_of(tmp_path, count=4, site=Site, analyst=Asking, **more):
    job = Job(tmp_path)
    for role, number in [("analyst", 0), *(("site", number) for number in range(count))]:
        raw = {
            "taskid": f"{role}-{number}-{job.id}",
            "role": role,
            "job": {"id": job.id, "name": "test"},
            "backend": "inproc",
            "channels": [CHANNEL],
            "dataset": f"file:///{number}" if role == "site" else "",
            "registry": {"sort": "dummy"},
            "peers": {"questions": count if role == "analyst" else 1},
            **more,
        }
        made = (site if role == "site" else analyst)(Config(raw))
        made.link_for_test = Recorder(tmp_path / f"{role}-{number}")
        job.roles.append(made)
    return job, job.roles[0]


def pooled(column, count=4):
    return np.concatenate([present(data(number)[column]) for number in range(count)])


@pytest.mark.parametrize("deterministic", [False, True])
def test_all_sites_together_give_what_one_place_would(tmp_path, deterministic):
    job, analyst = job_of(tmp_path, policy={"deterministic": deterministic})
    job.run()
    age, dose = pooled("age"), pooled("dose")
    found = analyst.results
    assert list(found["summary"]) == ["age", "dose", "rare"]
    for name, values in (("age", age), ("dose", dose)):
        one = found["summary"][name]
        assert (one.count, one.least, one.greatest) == (len(values), values.min(), values.max())
        assert one.mean == pytest.approx(values.mean(), rel=1e-12)
        assert one.variance == pytest.approx(values.var(), rel=1e-12)
        exact = {q: estimate.value for q, estimate in found["exact"][name].items()}
        assert exact == {q: np.quantile(values, q, method="inverted_cdf") for q in QS}
        assert all(estimate.error == 0 for estimate in found["exact"][name].values())
    assert found["histogram"].tolist() == np.histogram(age, [20, 40, 50, 80])[0].tolist()
    for q, estimate in found["near"]["age"].items():
        assert estimate.error <= 0.5
        assert abs(estimate.value - np.quantile(age, q, method="inverted_cdf")) <= estimate.error
    said = analyst.link_for_test.of("round")
    assert [number for number, _ in said] == list(range(1, len(said) + 1))
    assert said[0][1] == {"age": pytest.approx(age.mean())}
    # To the last bit takes eleven rounds at most, besides the one for the ranges.
    assert len(said) <= 2 + (1 + 11) + (1 + 2)
    kept = json.loads((tmp_path / "analyst-0" / "results.json").read_text())
    assert kept["summary"]["age"]["count"] == len(age)
    assert kept["exact"]["age"]["0.5"] == {"value": np.quantile(age, 0.5, method="inverted_cdf"), "error": 0.0}


@given(st.lists(st.lists(st.floats(-1e150, 1e150), max_size=20), min_size=1, max_size=5))
def test_summaries_add_up_to_the_summary_of_all(parts):
    values = np.concatenate([np.array(part, float) for part in parts])
    merged = sum((Summary.of(np.array(part)) for part in parts), Summary())
    whole = Summary.of(values)
    assert (merged.count, merged.least, merged.greatest) == (whole.count, whole.least, whole.greatest)
    scale = float(np.abs(values).max(initial=0))
    assert merged.mean == pytest.approx(whole.mean, rel=1e-9, abs=1e-12 * scale)
    assert merged.squares == pytest.approx(whole.squares, rel=1e-9, abs=1e-12 * scale * scale)


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=64), min_size=1, max_size=30),
    st.floats(0, 1),
    st.integers(2, 64),
)
def test_a_bracket_closes_in_on_the_very_value(values, q, bins):
    values = np.array(values)
    bracket = Bracket(q, 0.0, values.min(), values.max())
    rounds = 0
    while not bracket.done:
        edges = bracket.edges(bins)
        assert bracket.narrow(edges, tally(values, edges))
        rounds += 1
        assert rounds <= math.ceil(64 / math.log2(bins)) + 1
    expected = np.sort(values)[max(1, math.ceil(round(q * len(values), 9))) - 1]
    assert bracket.estimate == (expected, 0.0)


def test_a_bracket_notices_that_the_values_have_changed():
    bracket = Bracket(0.5, 0.0, 0.0, 1.0)
    edges = bracket.edges(4)
    assert not bracket.narrow(edges, tally(np.array([5.0, 6.0]), edges))
    with pytest.raises(ValueError, match="increase"):
        closed([1, 1])


class Leaving(Site):
    """Site 3 leaves in the fourth round."""

    def put(self, tag):
        if self.number == 3 and self._question[MessageType.ROUND] == 4:
            raise RuntimeError("killed")
        super().put(tag)


@pytest.mark.parametrize("least", [1, 4])
def test_a_site_that_leaves_is_not_waited_for(tmp_path, least):
    class Quantiles(Asking):
        def analyse(self):
            return self.quantiles("age", QS)

    job, analyst = job_of(tmp_path, site=Leaving, analyst=Quantiles, policy={"minTrainers": least, "joinDeadline": 1.0})
    for role in job.roles:
        job.start(role)
    for thread in job.threads:
        thread.join(30)
        assert not thread.is_alive()
    if least == 4:
        assert isinstance(job.errors[analyst], RoundFailed)
        assert "Round 4 has 3 of at least 4 answers (policy.minTrainers)" in job.errors[analyst].message
        return
    assert [type(error) for error in job.errors.values()] == [RuntimeError]
    age = pooled("age", 3)
    # What is found is true of the sites that are left.
    found = {q: estimate.value for q, estimate in analyst.results["age"].items()}
    assert found == {q: np.quantile(age, q, method="inverted_cdf") for q in QS}


def test_a_site_does_not_answer_for_few_values(tmp_path):
    class Rare(Asking):
        def analyse(self):
            return self.summary(["rare"])

    job, _ = job_of(tmp_path, analyst=Rare, hyperparameters={"leastCount": 3}, policy={"joinDeadline": 0.5})
    with pytest.raises(WorkerError, match="No site answers for rare"):
        job.run()


# Through the whole system, as processes over p2p.


def test_the_example_describes_patients_of_three_hospitals(tmp_path):
    with Run(tmp_path, "analytics") as run:
        result = run.result()
    assert result.state == "completed", result.text
    (path,) = run.data.glob("artifacts/*/results.json")
    found = json.loads(path.read_text())
    tables = [
        np.genfromtxt(each, delimiter=",", names=True) for each in (ROOT / "examples/analytics/data").glob("*.csv")
    ]
    bmi = np.concatenate([table["bmi"] for table in tables])
    assert found["summary"]["bmi"]["mean"] == pytest.approx(bmi.mean(), rel=1e-12)
    for q, estimate in found["quantiles"]["bmi"].items():
        assert abs(estimate["value"] - np.quantile(bmi, float(q), method="inverted_cdf")) <= estimate["error"] <= 0.01


def test_a_killed_hospital_is_not_waited_for_where_the_policy_does_without_it(tmp_path):
    example = shutil.copytree(ROOT / "examples" / "analytics", tmp_path / "example")
    script = example / "analyst" / "main.py"
    once = "summary = self.summary()"
    assert once in script.read_text()
    script.write_text(script.read_text().replace(once, f"{once}\n        for _ in range(400): self.summary()"))
    with Run(tmp_path, example, "policy.minTrainers=2") as run:
        run.wait_for("round 1")
        run.kill_one("hospital")
        result = run.result()
    assert "SIGKILL" in result.text
    assert result.state == "completed", result.text
