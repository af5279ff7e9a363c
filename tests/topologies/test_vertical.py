"""A network that is split over parties learns what the unsplit one learns, and no party sees another's data or ids."""

import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "sdk"))
from runkit import Run
from syncjob import InThread, Job, Recorder

from flame.errors import FlameError, RoundFailed, WorkerError
from flame.sdk.config import Config
from flame.sdk.mode.message import MessageType
from flame.sdk.mode.vertical.active_party import ActiveParty
from flame.sdk.mode.vertical.alignment import common, hashed
from flame.sdk.mode.vertical.feature_party import FeatureParty
from flame.sdk.mode.vertical.split import ANEW, BACK_TO, HAS, KEEP

TAGS = ["align", "forward", "backward"]
CHANNEL = {"name": "split", "pair": ["party", "active"], "funcTags": {"party": TAGS, "active": TAGS}}
RNG = np.random.default_rng(5)
COUNT = 90
IDS = [f"patient {number}" for number in range(COUNT)]
X = RNG.standard_normal((COUNT, 9)).astype(np.float32)
Y = (X[:, 0] * X[:, 4] + X[:, 8] > 0).astype(np.int64) + (X[:, 2] > 0.5)
#: Which columns each party has, and which samples, in an order of its own.
COLUMNS = {"a": [0, 1, 2], "b": [3, 4, 5, 6], "c": [7, 8]}
ROWS = {name: RNG.permutation(COUNT)[: COUNT - 5 * at] for at, name in enumerate(["active", *COLUMNS])}


def bottom(name):
    torch.manual_seed(ord(name))
    return nn.Sequential(nn.Linear(len(COLUMNS[name]), 6), nn.BatchNorm1d(6), nn.Tanh())


def top(width=18):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 3))


class Party(InThread, FeatureParty):
    def __init__(self, config):
        self.config = config
        self.name = config.dataset.rsplit("/", 1)[1]
        self.start = bottom(self.name)  # here, as all threads share one random generator

    def load_data(self):
        rows = ROWS[self.name]
        self.ids = [IDS[row] for row in rows]
        self.x = torch.from_numpy(X[rows][:, COLUMNS[self.name]])

    def initialize(self):
        self.model = self.start
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)


class Active(InThread, ActiveParty):
    def __init__(self, config):
        self.config = config
        self.seen, self.after = [], []
        self.start = top()

    def load_data(self):
        rows = ROWS["active"]
        self.ids = [IDS[row] for row in rows]
        self.y = torch.from_numpy(Y[rows])
        self.held_out = rows % 4 == 0

    def initialize(self):
        self.model = self.start
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)

    def loss(self, scores, labels):
        return F.cross_entropy(scores, labels)

    def batches(self):
        for batch in super().batches():
            self.seen.append(ROWS["active"][batch.numpy()])
            yield batch

    def evaluate(self):
        rows = self.held_out_rows
        self.after.append((ROWS["active"][rows.numpy()], self.predict().clone()))
        self.update_metrics({"held out": self.loss(self.after[-1][1], self.y[rows])})


class Whole(nn.Module):
    """The same network in one piece."""

    def __init__(self):
        super().__init__()
        self.bottoms = nn.ModuleList(bottom(name) for name in COLUMNS)
        self.top = top()

    def forward(self, x):
        parts = [each(x[:, columns]) for each, columns in zip(self.bottoms, COLUMNS.values(), strict=True)]
        return self.top(torch.cat(parts, 1))


def configured(job, role, number, parties=3, *, dataset, **more):
    raw = {
        "taskid": f"{role}-{number}-{job.id}",
        "role": role,
        "job": {"id": job.id, "name": "test"},
        "backend": "inproc",
        "channels": [CHANNEL],
        "dataset": f"file:///{dataset}",
        "hyperparameters": {"rounds": 4, "epochs": 2, "batchSize": 16, "seed": 3},
        "registry": {"sort": "dummy"},
        "peers": {"split": parties if role == "active" else 1},
        **more,
    }
    return Config(raw)


def started(tmp_path, party=Party, active=Active, names=("c", "a", "b"), **more):
    job = Job(tmp_path)
    roles = [active(configured(job, "active", 0, len(names), dataset="labels", **more))]
    roles += [party(configured(job, "party", number, dataset=name, **more)) for number, name in enumerate(names)]
    for number, role in enumerate(roles):
        role.link_for_test = Recorder(tmp_path / str(number))
        job.roles.append(role)
    return job, roles[0], {role.name: role for role in roles[1:]}


def test_the_split_network_learns_what_the_unsplit_one_does(tmp_path):
    job, active, parties = started(tmp_path)
    job.run()
    assert active.parties == ["a", "b", "c"]
    everywhere = set.intersection(*(set(rows.tolist()) for rows in ROWS.values()))
    assert set(np.concatenate(active.seen)) == {row for row in everywhere if row % 4}

    whole = Whole()
    optimizer = torch.optim.Adam(whole.parameters(), lr=0.01)
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    batches = iter(active.seen)
    each = len(active.seen) // 4
    for held_out, scores in active.after:
        whole.train()
        for _ in range(each):
            rows = next(batches)
            optimizer.zero_grad()
            F.cross_entropy(whole(x[rows]), y[rows]).backward()
            optimizer.step()
        whole.eval()
        assert set(held_out) == {row for row in everywhere if row % 4 == 0}
        assert torch.allclose(scores, whole(x[held_out]), atol=1e-5)
    # The last batch's gradients have arrived as well.
    for name, expected in zip(COLUMNS, whole.bottoms, strict=True):
        for key, value in expected.state_dict().items():
            assert torch.allclose(parties[name].model.state_dict()[key].double(), value.double(), atol=1e-5), (
                name,
                key,
            )
    said = active.link_for_test.of("round")
    assert [number for number, _ in said] == [1, 2, 3, 4]
    assert all({"loss", "held out"} == metrics.keys() for _, metrics in said)
    assert said[-1][1]["loss"] < said[0][1]["loss"]


def test_neither_features_nor_ids_nor_labels_travel(tmp_path, monkeypatch):
    """What is sent is looked at as bytes, with ids and values that would be found if they were there."""
    from flame.sdk.channel import Channel

    sent = []
    encode = Channel.encode

    def listened(self, message, **more):
        frames = encode(self, message, **more)
        sent.append((self._me.role, message, b"".join(bytes(part) for part in (frames.head, *frames.buffers))))
        return frames

    monkeypatch.setattr(Channel, "encode", listened)
    job, _, parties = started(tmp_path)
    job.run()
    wire = b"".join(data for _, _, data in sent)
    assert len(wire) > 10_000
    assert b"patient" not in wire
    for party in parties.values():
        assert not any(row.numpy().tobytes() in wire for row in party.x if len(row) > 2)
    # From a party come hashes, then outputs and nothing else; to a party rows, gradients and the end.
    kinds = {
        role: {key.name for one, message, _ in sent for key in message if one == role} for role in ("party", "active")
    }
    assert kinds["party"] == {"IDS", "NAME", "ACTIVATIONS", "STEP", "METADATA"}
    assert kinds["active"] <= {"ROWS", "STEP", "ROUND", "TRAINING", "GRADIENTS", "EOT", "METADATA"}
    # Beside them, for whoever takes somebody's place: which rounds are kept, and from which to go on.
    for _, message, _ in sent:
        for what, said in (message.get(MessageType.METADATA) or {}).items():
            assert what in (HAS, BACK_TO, ANEW, KEEP)
            assert all(type(one) in (bool, int) for one in (said if isinstance(said, list) else [said]))


@given(st.lists(st.sets(st.integers(0, 40)), min_size=1, max_size=4), st.binary(min_size=1, max_size=32))
def test_alignment_finds_what_all_have_in_one_order(parties, key):
    owned = [sorted(party, key=lambda number: hash((number, at))) for at, party in enumerate(parties)]
    rows = common([hashed(ids, key) for ids in owned])
    found = [[ids[row] for row in each] for ids, each in zip(owned, rows, strict=True)]
    assert all(each == found[0] for each in found)
    assert set(found[0]) == set.intersection(*parties)
    assert len(found[0]) == len(set(found[0]))


def test_hashes_depend_on_the_jobs_secret_and_on_the_id_alone():
    assert (hashed([17, "b"], b"k") == hashed(["17", b"b"], b"k")).all()
    assert not (hashed(["17"], b"k") == hashed(["17"], b"l")).all()
    with pytest.raises(WorkerError, match="The samples 0 and 2 have the same id"):
        hashed([1, 2, "1"], b"k")
    with pytest.raises(WorkerError, match="are bytes"):
        common([np.zeros((2, 3), np.uint8)])


class Held(Party):
    """Waits in its tenth forward pass for the test."""

    def __init__(self, config):
        super().__init__(config)
        self.calls, self.dies = 0, False
        self.reached, self.go = threading.Event(), threading.Event()

    def forward(self, rows):
        self.calls += 1
        if self.name == "b" and self.calls == 10:
            self.reached.set()
            assert self.go.wait(30)
            if self.dies:
                raise RuntimeError("killed")
        return super().forward(rows)


def ended(job):
    for thread in job.threads:
        thread.join(30)
        assert not thread.is_alive(), "a role did not end"


@pytest.mark.parametrize("policy", [{}, {"minTrainers": 2}, {"minTrainers": 3}], ids=str)
def test_a_party_that_leaves_ends_the_work_unless_the_policy_does_without_it(tmp_path, policy):
    job, active, parties = started(tmp_path, party=Held, policy=policy)
    for role in job.roles:
        job.start(role)
    assert parties["b"].reached.wait(30)
    parties["b"].dies = True
    parties["b"].go.set()
    ended(job)
    if policy == {"minTrainers": 2}:
        assert list(job.errors) == [parties["b"]]
        assert [number for number, _ in active.link_for_test.of("round")] == [1, 2, 3, 4]
        (warning,) = active.link_for_test.of("warning")
        assert "goes on without the features of b: it left" in warning
        return
    assert isinstance(job.errors[active], RoundFailed)
    assert "has the features of 2 parties" in job.errors[active].message
    assert "b left" in job.errors[active].message
    # Nobody waits for an active party that will not come back.
    assert all("The active party left" in job.errors[parties[name]].message for name in "ac")


def test_a_slow_party_is_left_out_for_the_round_only(tmp_path):
    class Noticing(Active):
        late = threading.Event()

        def _lose(self, end, reason, **more):
            super()._lose(end, reason, **more)
            self.late.set()

    policy = {"roundDeadline": 1.0, "minTrainers": 2}
    job, active, parties = started(tmp_path, party=Held, active=Noticing, policy=policy)
    for role in job.roles:
        job.start(role)
    assert parties["b"].reached.wait(30)
    assert active.late.wait(30)
    parties["b"].go.set()
    ended(job)
    assert job.errors == {}
    assert "it was too slow" in active.link_for_test.of("warning")[0]
    assert parties["b"].calls > 10


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"load_data": lambda self: None}, "set self.ids in load_data"),
        ({"initialize": lambda self: setattr(self, "model", {"w": 1})}, "set it in initialize to a torch.nn.Module"),
        ({"forward": lambda self, rows: torch.full((len(rows), 2), float("nan"))}, "sent values that are not finite"),
        ({"forward": lambda self, rows: torch.zeros(3, 2)}, r"sent outputs \[3, 2\] for 16 samples"),
        ({"forward": lambda self, rows: torch.zeros(len(rows))}, "where a matrix"),
    ],
)
def test_what_a_party_does_wrong_is_said_in_words(tmp_path, change, sentence):
    wrong = type("Wrong", (Party,), change)
    job, _, _ = started(tmp_path, party=wrong, names=("a",), policy={"joinDeadline": 0.5})
    for role in job.roles:
        job.start(role)
    ended(job)
    with pytest.raises(FlameError, match=sentence):
        raise next(error for error in job.errors.values() if "left" not in str(error))


def test_parties_without_a_common_sample_are_told_so(tmp_path):
    class Stranger(Party):
        def load_data(self):
            super().load_data()
            self.ids = [f"{each}!" for each in self.ids]

    job, active, _ = started(tmp_path, party=Stranger, names=("a", "b"))
    for role in job.roles:
        job.start(role)
    ended(job)
    assert "No sample is known to all of a, b and this party" in job.errors[active].message


# Through the whole system, as processes over p2p.


def test_the_example_learns_to_tell_benign_from_malignant(tmp_path):
    with Run(tmp_path, "vertical") as run:
        result = run.result()
    assert result.state == "completed", result.text
    assert result.rounds == list(range(1, 9))
    assert float(re.findall(r"accuracy ([\d.]+)", result.text)[-1]) >= 0.95
    assert result.models.keys() == {
        "model.safetensors",
        *(f"bottom-{name}.safetensors" for name in ("mean", "error", "worst")),
    }


@pytest.mark.parametrize("enough", [False, True])
def test_a_killed_laboratory_ends_the_job_unless_the_policy_does_without_it(tmp_path, enough):
    settings = ["hyperparameters.epochs=8", "hyperparameters.rounds=3", *(["policy.minTrainers=2"] if enough else [])]
    with Run(tmp_path, "vertical", *settings) as run:
        run.wait_for("round 1/")
        run.kill_one("laboratory")
        result = run.result()
    assert result.state == ("completed" if enough else "failed"), result.text
    assert "SIGKILL" in result.text
    if enough:
        assert "goes on without the features of" in result.text
        assert result.rounds == [1, 2, 3]


def test_a_killed_clinic_ends_the_job_and_no_laboratory_waits_for_it(tmp_path):
    with Run(tmp_path, "vertical", "hyperparameters.epochs=20", "policy.minTrainers=2") as run:
        run.wait_for("round 1/")
        run.kill_one("clinic")
        result = run.result()
    assert result.state == "failed", result.text
    assert "SIGKILL" in result.text
