"""Who cannot be reached is said in a sentence, and only when that is sure."""

import json

import pytest

from flame.chaos.reach import Reach
from flame.errors import UsageError
from flame.spec.records import ComputeStatus, Task, TaskState


def compute(name, kind, **config):
    return ComputeStatus(id=name, name=name, kind=kind, config=config, state="ready", created_at=0.0)


@pytest.fixture
async def reach(tmp_path):
    kubeconfig = tmp_path / "kubeconfig"
    there = {"name": "there", "cluster": {"server": "http://127.0.0.1:9"}}
    context = {"name": "there", "context": {"cluster": "there", "user": "me"}}
    users = [{"name": "me", "user": {"token": "of-the-test"}}]
    text = {"clusters": [there], "contexts": [context], "users": users, "current-context": "there"}
    kubeconfig.write_text(json.dumps(text))
    computes = [
        compute("here", "local"),
        compute("engine", "docker"),
        compute("far", "docker", host="tcp://203.0.113.1:2375"),
        compute("cluster", "kubernetes", kubeconfig=str(kubeconfig)),
        compute("lost", "kubernetes", kubeconfig=str(tmp_path / "nothing")),
        compute("closed", "kubernetes", credentials="***"),
        compute("theirs", "batch"),
    ]
    async with Reach(computes) as made:
        yield made


def tasks(*computes):
    return [
        Task(
            id=str(number),
            job_id="job",
            role="trainer",
            index=number,
            state=TaskState.RUNNING,
            config=None,
            compute=name,
        )
        for number, name in enumerate(computes)
    ]


@pytest.mark.parametrize(
    ("computes", "says"),
    [
        (["theirs"], r"the compute theirs \(batch\), which flame chaos does not reach"),
        (["lost"], r"the compute lost \(kubernetes: The cluster's credentials cannot be read: .*nothing'\), which"),
        (["closed", "theirs"], r"closed \(kubernetes: its credentials are known to the server alone; .* and .* theirs"),
    ],
)
async def test_workers_where_nothing_can_be_done_cannot_be_hit(reach, computes, says):
    with pytest.raises(UsageError, match=f"The trainer cannot be hit: it runs on .*{says}"):
        reach.check_target("trainer", tasks(*computes))


@pytest.mark.parametrize(
    "computes", [["here"], ["engine"], ["far"], ["cluster"], ["theirs", "here"], ["cluster", None], []]
)
async def test_where_one_may_be_reached_nothing_is_said(reach, computes):
    reach.check_target("trainer", tasks(*computes))


@pytest.mark.parametrize(
    ("computes", "says"), [(["far"], r"compute far \(docker\)"), (["lost", "far"], "far .* and .* lost")]
)
async def test_a_moment_that_no_worker_can_be_held_at_is_said(reach, computes, says):
    with pytest.raises(UsageError, match=f"Nobody can be held at upload: .*{says}"):
        reach.check_moment("upload", tasks(*computes))


@pytest.mark.parametrize("computes", [["here"], ["engine", "theirs"], ["far", "cluster"], ["far", None]])
async def test_a_moment_to_which_one_may_come_is_none(reach, computes):
    reach.check_moment("upload", tasks(*computes))
