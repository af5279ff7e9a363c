"""Who cannot be reached is said in a sentence, and only when that is sure."""

import pytest

from flame.chaos.reach import Reach
from flame.errors import UsageError
from flame.spec.records import ComputeStatus, Task, TaskState


def compute(name, kind, **config):
    return ComputeStatus(id=name, name=name, kind=kind, config=config, state="ready", created_at=0.0)


@pytest.fixture
def reach():
    computes = [
        compute("here", "local"),
        compute("engine", "docker"),
        compute("far", "docker", host="tcp://203.0.113.1:2375"),
        compute("cluster", "kubernetes"),
    ]
    with Reach(computes) as made:
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


def test_workers_in_pods_cannot_be_hit(reach):
    with pytest.raises(
        UsageError, match=r"The trainer cannot be hit: it runs on the compute cluster \(kubernetes\), which"
    ):
        reach.check_target("trainer", tasks("cluster", "cluster"))


@pytest.mark.parametrize("computes", [["here"], ["engine"], ["far"], ["cluster", "here"], ["cluster", None], []])
def test_where_one_may_be_reached_nothing_is_said(reach, computes):
    reach.check_target("trainer", tasks(*computes))


@pytest.mark.parametrize(
    ("computes", "says"), [(["far"], r"compute far \(docker\)"), (["cluster", "far"], "cluster .* and .* far")]
)
def test_a_moment_that_no_worker_can_be_held_at_is_said(reach, computes, says):
    with pytest.raises(UsageError, match=f"Nobody can be held at upload: .*{says}"):
        reach.check_moment("upload", tasks(*computes))


@pytest.mark.parametrize("computes", [["here"], ["engine", "cluster"], ["far", None]])
def test_a_moment_to_which_one_may_come_is_none(reach, computes):
    reach.check_moment("upload", tasks(*computes))
