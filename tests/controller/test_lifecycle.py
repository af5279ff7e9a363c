"""What the life of a job promises, whatever the order of events."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from flame.controller.events import (
    Action,
    Admit,
    Ask,
    Begin,
    Claim,
    Clock,
    Completed,
    Connected,
    Delivered,
    Dismiss,
    End,
    Enter,
    Event,
    Expect,
    Failed,
    Gone,
    Kill,
    Missing,
    Owes,
    Pause,
    Release,
    Restart,
    Resume,
    Rewind,
    Rewound,
    Running,
    Silent,
    Start,
    Steady,
    Stop,
    Terminated,
    TimeUp,
    Warn,
)
from flame.controller.job_life import JobLife, TaskLife, gathered, missing, quorums
from flame.controller.lifecycle import TRANSITIONS, settle, step
from flame.errors import Conflict
from flame.spec.nouns import Restart as RestartPolicy
from flame.spec.records import Failure, JobState, TaskState

NEVER = RestartPolicy(attempts=0)


def new(
    trainers: int = 2,
    fewest: int | None = None,
    restart: RestartPolicy = NEVER,
    *,
    pauses: bool = False,
    brought: int = 0,
) -> JobLife:
    """An aggregator and trainers; participants bring the last ones."""
    roles = [("aggregator", False)] + [("trainer", True)] * trainers
    tasks = {f"t{i}": TaskLife(f"t{i}", role, brought=i > trainers - brought) for i, (role, _) in enumerate(roles)}
    each = {role: restart for role, _ in roles}
    return JobLife(
        "job",
        JobState.READY,
        tasks,
        quorums(roles, fewest),
        restart=each,
        pauses=pauses,
        consumers=frozenset({"trainer"}),
    )


def drive(job: JobLife, *events: Event) -> tuple[JobLife, list[Action]]:
    actions: list[Action] = []
    for event in events:
        job, more = step(job, event)
        actions += more
    return job, actions


def cause(task: str = "t0", signal: str | None = None) -> Failure:
    return Failure(message="it broke", task=task, signal=signal)


def all_of(job: JobLife, kind: type, attempt: int = 1) -> list[Event]:
    return [kind(task, attempt) for task in job.tasks]


def test_a_job_goes_through_its_states_in_order() -> None:
    job = new()
    job, actions = drive(job, Start(), Admit(), *all_of(job, Connected), *all_of(job, Running))
    assert job.state is JobState.RUNNING
    assert [a for a in actions if isinstance(a, Ask)] == [Ask(task, 1) for task in job.tasks]
    assert [a for a in actions if isinstance(a, Begin)] == [Begin(task, 1) for task in job.tasks]
    assert sum(isinstance(a, Clock) for a in actions) == 1
    job, actions = drive(job, *all_of(job, Completed))
    assert job.state is JobState.RUNNING, "workers are still there"
    assert all(a.parting for a in actions if isinstance(a, End))
    job, _ = drive(job, *[Gone(task, 1, cause(task)) for task in job.tasks])
    assert job.state is JobState.COMPLETED
    assert job.failure is None


def test_running_means_that_every_task_was_started() -> None:
    job = new()
    job, _ = drive(job, Start(), Admit(), Running("t0", 1), Completed("t0", 1), Running("t1", 1))
    assert job.state is JobState.DEPLOYING
    job, _ = drive(job, Running("t2", 1))
    assert job.state is JobState.RUNNING


def test_a_failed_task_fails_the_job_with_its_cause_once_every_worker_is_gone() -> None:
    job = new()
    job, actions = drive(job, Start(), Admit(), *all_of(job, Running), Failed("t1", 1, cause("t1")))
    assert job.state is JobState.STOPPING
    assert {(a.task, a.parting) for a in actions if isinstance(a, End)} == {("t0", False), ("t1", True), ("t2", False)}
    job, _ = drive(job, Gone("t0", 1, cause()), Terminated("t2", 1, cause("t2")), Gone("t2", 1, cause("t2")))
    assert job.state is JobState.STOPPING
    job, _ = drive(job, Gone("t1", 1, cause("t1")))
    assert job.state is JobState.FAILED
    assert job.failure is not None
    assert job.failure.task == "t1"
    assert [t.state for t in job.tasks.values()] == [TaskState.TERMINATED, TaskState.FAILED, TaskState.TERMINATED]


def test_a_job_goes_on_without_a_trainer_while_the_quorum_is_made() -> None:
    job = new(trainers=3, fewest=2)
    job, actions = drive(job, Start(), Admit(), *all_of(job, Running), Failed("t1", 1, cause("t1")))
    assert job.state is JobState.RUNNING
    assert sum(isinstance(a, Warn) for a in actions) == 1
    lost, _ = drive(job, Failed("t2", 1, cause("t2")))
    assert lost.state is JobState.STOPPING
    events = [Completed("t0", 1), Completed("t2", 1), Completed("t3", 1)]
    job, _ = drive(job, *events, *[Gone(task, 1, cause(task)) for task in job.tasks])
    assert job.state is JobState.COMPLETED


def test_an_aggregator_has_no_quorum_to_hide_behind() -> None:
    job = new(trainers=3, fewest=1)
    job, _ = drive(job, Start(), Admit(), *all_of(job, Running), Failed("t0", 1, cause("t0")))
    assert job.state is JobState.STOPPING


@pytest.mark.parametrize("lost", [Silent, Gone])
def test_a_worker_lost_before_it_ran_the_code_is_replaced_once(lost: type) -> None:
    job = new()
    job, actions = drive(job, Start(), Admit(), lost("t1", 1, cause("t1")))
    assert actions[-1] == Ask("t1", 2)
    assert (End("t1", 1, "its worker is lost") in actions) == (lost is Silent)
    assert job.state is JobState.DEPLOYING
    job, _ = drive(job, Running("t1", 1))
    assert job.tasks["t1"].state is TaskState.DEPLOYING, "a report of the old attempt counts for nothing"
    job, _ = drive(job, lost("t1", 2, cause("t1")))
    assert job.state is JobState.STOPPING


@pytest.mark.parametrize("lost", [Silent, Gone, Terminated, Missing])
def test_a_worker_lost_while_it_ran_the_code_is_replaced_as_often_as_the_policy_says(lost: type) -> None:
    job = new(restart=RestartPolicy(attempts=3, backoff=2.0))
    job, _ = drive(job, Start(), Admit(), *all_of(job, Running))
    delays = []
    for attempt in (1, 2, 3):
        job, actions = drive(job, lost("t1", attempt, cause("t1")), Running("t1", attempt + 1))
        (ask,) = (a for a in actions if isinstance(a, Ask))
        assert (ask.task, ask.attempt) == ("t1", attempt + 1)
        delays.append(ask.delay)
        assert any(isinstance(a, Warn) and "it broke" in a.message for a in actions), "the user is told"
        assert job.state is JobState.RUNNING
    assert delays == [0.0, 2.0, 4.0], "the first one comes at once"
    job, _ = drive(job, lost("t1", 4, cause("t1")))
    assert job.state is JobState.STOPPING


def test_who_has_run_for_long_is_replaced_as_if_it_had_never_been_lost() -> None:
    job = new(restart=RestartPolicy(attempts=1, backoff=2.0))
    job, _ = drive(job, Start(), Admit(), *all_of(job, Running))
    for attempt in range(1, 6):
        job, actions = drive(job, Steady("t1", attempt), Gone("t1", attempt, cause("t1")), Running("t1", attempt + 1))
        assert Ask("t1", attempt + 1, 0.0) in actions
    job, _ = drive(job, Gone("t1", 6, cause("t1")))
    assert job.state is JobState.STOPPING


def test_code_that_is_killed_by_a_signal_runs_again_and_code_that_fails_by_itself_does_not() -> None:
    job = new(restart=RestartPolicy())
    job, _ = drive(job, Start(), Admit(), *all_of(job, Running))
    killed, actions = drive(job, Failed("t0", 1, cause("t0", "SIGKILL")))
    assert Ask("t0", 2) in actions
    assert next(a for a in actions if isinstance(a, End)).parting, "its flamelet is about to leave by itself"
    assert killed.state is JobState.RUNNING
    failed, _ = drive(job, Failed("t0", 1, cause("t0")))
    assert failed.state is JobState.STOPPING
    stubborn = new(restart=RestartPolicy(on_error=True))
    stubborn, actions = drive(stubborn, Start(), Admit(), *all_of(stubborn, Running), Failed("t0", 1, cause("t0")))
    assert Ask("t0", 2) in actions


def test_a_trainer_that_comes_back_when_the_work_is_done_need_not_do_any() -> None:
    job = new(restart=RestartPolicy())
    job, _ = drive(job, Start(), Admit(), *all_of(job, Running), Gone("t1", 1, cause("t1")), Completed("t2", 1))
    assert job.tasks["t1"].state is TaskState.DEPLOYING
    job, actions = drive(job, Completed("t0", 1))
    assert job.tasks["t1"].state is TaskState.COMPLETED
    assert End("t1", 2, "its task is done without it", parting=False) in actions, (
        "it has not begun, so nobody waits for it"
    )
    job, _ = drive(job, Gone("t0", 1, cause()), Gone("t1", 2, cause("t1")), Gone("t2", 1, cause("t2")))
    assert job.state is JobState.COMPLETED


def test_an_aggregator_that_comes_back_when_the_trainers_are_done_has_its_own_part_to_do() -> None:
    job = new(restart=RestartPolicy())
    job, _ = drive(
        job, Start(), Admit(), *all_of(job, Running), Completed("t1", 1), Completed("t2", 1), Gone("t0", 1, cause())
    )
    assert job.tasks["t0"].state is TaskState.DEPLOYING


def test_whoever_comes_back_when_the_models_are_there_need_not_do_anything() -> None:
    job = new(restart=RestartPolicy())
    job, _ = drive(job, Start(), Admit(), *all_of(job, Running), Gone("t1", 1, cause("t1")), Gone("t2", 1, cause("t2")))
    members = replace(job, consumers=frozenset({"trainer", "aggregator"}))
    done, _ = drive(members, Completed("t0", 1))
    assert done.tasks["t1"].state is TaskState.DEPLOYING, "nobody has seen a model"
    done, _ = drive(members, Delivered("t0", 1))
    assert done.tasks["t1"].state is TaskState.DEPLOYING
    done, _ = drive(done, Completed("t0", 1))
    assert [task.state for task in done.tasks.values()] == [TaskState.COMPLETED] * 3


def test_who_gives_up_because_the_others_have_done_the_work_does_not_fail_the_job() -> None:
    job = new(restart=RestartPolicy())
    job, _ = drive(job, Start(), Admit(), *all_of(job, Running), Gone("t0", 1, cause()), Running("t0", 2))
    lost, _ = drive(job, Failed("t1", 1, cause("t1")))
    assert lost.state is JobState.STOPPING, "its own fault"
    job, actions = drive(job, Completed("t2", 1), Completed("t0", 2), Failed("t1", 1, cause("t1")))
    assert job.tasks["t1"].state is TaskState.COMPLETED
    assert any(isinstance(a, Warn) and "when the work was done" in a.message for a in actions)


def test_those_who_wait_for_an_aggregator_that_comes_back_when_the_work_is_done_are_let_go() -> None:
    job = new(restart=RestartPolicy())
    tree = replace(
        job,
        tasks={**job.tasks, "t1": replace(job.tasks["t1"], role="middle")},
        quorum={**job.quorum, "trainer": 1, "middle": 1},
    )
    tree, _ = drive(tree, Start(), Admit(), *all_of(tree, Running), Delivered("t0", 1), Gone("t1", 1, cause("t1")))
    assert tree.tasks["t2"].state is TaskState.RUNNING
    tree, actions = drive(tree, Completed("t0", 1))
    assert [task.state.value for task in tree.tasks.values()] == ["completed", "completed", "running"]
    assert Dismiss("t2", 1) in actions, "it ends by itself"
    tree, actions = drive(tree, Connected("t2", 1), Completed("t2", 1))
    assert not any(isinstance(action, Dismiss) for action in actions), "it was told once"


def test_who_waits_for_others_that_have_done_the_work_is_told_though_nobody_was_replaced() -> None:
    job = new()
    job, actions = drive(job, Start(), Admit(), *all_of(job, Running), Completed("t1", 1))
    assert not any(isinstance(action, Dismiss) for action in actions)
    job, actions = drive(job, Completed("t0", 1))
    assert Dismiss("t2", 1) in actions
    assert Dismiss("t1", 1) not in actions, "it has ended"
    assert job.tasks["t2"].state is TaskState.RUNNING


def test_the_work_of_one_part_is_done_though_another_goes_on() -> None:
    job = new(trainers=3)
    roles = {"t0": "aggregator", "t1": "trainer", "t2": "aggregator", "t3": "trainer"}
    tasks = {name: replace(job.tasks[name], role=role, part="ab"[int(name[1]) // 2]) for name, role in roles.items()}
    job = replace(job, tasks=tasks, quorum={"aggregator": 2, "trainer": 2})
    job, actions = drive(job, Start(), Admit(), *all_of(job, Running), Delivered("t0", 1), Completed("t0", 1))
    assert [action for action in actions if isinstance(action, Dismiss)] == [Dismiss("t1", 1)]
    job, actions = drive(job, Delivered("t2", 1), Completed("t2", 1))
    assert [action for action in actions if isinstance(action, Dismiss)] == [Dismiss("t3", 1)]


def test_who_owes_something_that_nobody_else_has_is_needed_until_it_has_handed_it_in() -> None:
    job = new(restart=RestartPolicy())
    job, _ = drive(job, Start(), Admit(), *all_of(job, Running), Owes("t1", 1), Completed("t2", 1))
    job, actions = drive(job, Completed("t0", 1), Gone("t1", 1, cause("t1")))
    assert job.tasks["t1"].state is TaskState.DEPLOYING
    assert Dismiss("t1", 2) in actions
    failed, _ = drive(job, Running("t1", 2), Failed("t1", 2, cause("t1")))
    assert failed.state is JobState.STOPPING, "it is not excused"
    job, _ = drive(job, Completed("t1", 2), Gone("t0", 1, cause()), Gone("t1", 2, cause()), Gone("t2", 1, cause()))
    assert job.state is JobState.COMPLETED


def test_a_paused_job_has_no_worker_and_goes_on_under_new_attempts() -> None:
    job = new()
    job, actions = drive(job, Start(), Admit(), *all_of(job, Running), Completed("t1", 1), Pause())
    assert {a.task for a in actions if isinstance(a, End)} == {"t0", "t1", "t2"}
    assert job.state is JobState.PAUSING
    job, _ = drive(job, Terminated("t0", 1, cause()), *[Gone(task, 1, cause(task)) for task in job.tasks])
    assert job.state is JobState.PAUSED
    assert [t.state for t in job.tasks.values()] == [TaskState.READY, TaskState.COMPLETED, TaskState.READY]
    with pytest.raises(Conflict, match="nothing to pause"):
        step(job, Pause())
    job, actions = drive(job, Resume(), Admit())
    assert [a for a in actions if isinstance(a, Ask)] == [Ask("t0", 2), Ask("t2", 2)]
    job, actions = drive(job, Running("t0", 2), Running("t2", 2))
    assert job.state is JobState.RUNNING
    assert sum(isinstance(a, Clock) for a in actions) == 1, "the time that it was paused does not count"


def test_a_restarted_job_ends_its_workers_then_forgets_then_runs_all_of_its_tasks_again() -> None:
    job = new()
    job, actions = drive(job, Start(), Admit(), *all_of(job, Running), Completed("t1", 1), Restart(2))
    assert job.state is JobState.PAUSING
    assert not any(isinstance(a, Rewind) for a in actions), "workers may still write"
    job, actions = drive(job, *[Gone(task, 1, cause(task)) for task in job.tasks])
    assert job.state is JobState.PAUSED
    assert [a for a in actions if isinstance(a, Rewind)] == [Rewind(2)]
    assert Rewind(2) in settle(job)[1], "a server that was killed here takes it up again"
    job, _ = drive(job, Resume())
    assert job.state is JobState.PAUSED, "not before it is forgotten"
    job, actions = drive(job, Rewound(), Rewound(), Admit())
    assert {a.task for a in actions if isinstance(a, Ask)} == {"t0", "t1", "t2"}
    assert job.behind is None


def test_a_restart_is_taken_back_by_a_pause_and_by_a_stop() -> None:
    job = new()
    job, _ = drive(job, Start(), Admit(), *all_of(job, Running), Restart(2))
    gone = [Gone(task, 1, cause(task)) for task in job.tasks]
    paused, actions = drive(job, Pause(), *gone, Rewound())
    assert paused.state is JobState.PAUSED
    assert not any(isinstance(a, Rewind) for a in actions)
    stopped, actions = drive(job, Stop(), *gone, Rewound())
    assert stopped.state is JobState.TERMINATED
    assert not any(isinstance(a, Rewind) for a in actions)
    paused, actions = drive(paused, Restart(1))
    assert Rewind(1) in actions, "a paused job can be restarted, too"
    with pytest.raises(Conflict, match="cannot be restarted"):
        step(stopped, Restart(1))


def test_a_job_that_pauses_on_failure_keeps_the_cause_until_it_is_resumed() -> None:
    job = new(pauses=True)
    job, _ = drive(job, Start(), Admit(), *all_of(job, Running), Failed("t0", 1, cause()))
    assert job.state is JobState.PAUSING
    job, _ = drive(job, *[Gone(task, 1, cause(task)) for task in job.tasks])
    assert job.state is JobState.PAUSED
    assert job.failure is not None
    resumed, actions = drive(job, Resume(), Admit())
    assert resumed.failure is None
    assert Ask("t0", 2) in actions
    stopped, _ = drive(job, Stop())
    assert stopped.state is JobState.FAILED


def test_a_job_may_be_paused_in_the_queue_and_stopped_while_it_is_paused() -> None:
    _, actions = drive(new(), Start(), Pause(), Stop())
    assert [a.state for a in actions if isinstance(a, Enter)][1:] == [
        JobState.PAUSING,
        JobState.PAUSED,
        JobState.STOPPING,
        JobState.TERMINATED,
    ]


def test_a_worker_lost_while_it_ran_the_code_is_not_replaced_where_nobody_may_be() -> None:
    job = new()
    job, actions = drive(job, Start(), Admit(), Running("t1", 1), Gone("t1", 1, cause("t1")))
    assert job.state is JobState.STOPPING
    assert Ask("t1", 2) not in actions


def test_a_worker_that_somebody_else_terminated_fails_its_task() -> None:
    job = new()
    job, _ = drive(job, Start(), Admit(), *all_of(job, Running), Terminated("t1", 1, cause("t1")))
    assert job.state is JobState.STOPPING
    assert job.failure is not None


def test_stopping_a_queued_job_terminates_it_at_once() -> None:
    job, actions = drive(new(), Start(), Stop())
    assert [a.state for a in actions if isinstance(a, Enter)] == [
        JobState.STARTING,
        JobState.STOPPING,
        JobState.TERMINATED,
    ]
    assert {t.state for t in job.tasks.values()} == {TaskState.TERMINATED}


def test_stopping_ends_every_worker_and_then_terminates() -> None:
    job = new()
    job, actions = drive(job, Start(), Admit(), *all_of(job, Running), Stop(), Stop())
    assert sum(isinstance(a, End) for a in actions) == 3
    assert job.state is JobState.STOPPING
    job, _ = drive(job, *[Gone(task, 1, cause(task)) for task in job.tasks])
    assert job.state is JobState.TERMINATED


def test_stopping_a_job_whose_work_is_done_does_not_undo_it() -> None:
    job = new()
    job, _ = drive(job, Start(), Admit(), *all_of(job, Completed), Stop())
    job, _ = drive(job, *[Gone(task, 1, cause(task)) for task in job.tasks])
    assert job.state is JobState.COMPLETED


def test_a_job_that_runs_too_long_fails_and_says_so() -> None:
    job = new()
    job, _ = drive(job, Start(), Admit(), *all_of(job, Running), TimeUp(2.0))
    job, _ = drive(job, *[Gone(task, 1, cause(task)) for task in job.tasks])
    assert job.state is JobState.FAILED
    assert job.failure is not None
    assert "maxRunTime of 2 s" in job.failure.message


def test_a_worker_that_a_killed_server_never_started_is_started_under_a_new_attempt() -> None:
    job = new()
    job, _ = drive(job, Start(), Admit())
    for attempt in (1, 2, 3):
        job, actions = drive(job, Missing("t1", attempt, cause("t1")))
        assert actions == [Ask("t1", attempt + 1)]
    assert job.tasks["t1"].replaced == 0
    assert job.tasks["t1"].live == {4}


@pytest.mark.parametrize(
    ("events", "request_", "words"),
    [
        ([Start()], Start(), "is starting"),
        ([Start(), Stop()], Start(), "has ended (terminated)"),
        ([], Stop(), "is ready"),
        ([Start(), Stop()], Stop(), "has ended (terminated)"),
        ([Start()], Kill("t0"), "no worker to end: it is ready"),
    ],
)
def test_an_illegal_request_is_refused_with_a_sentence_that_names_the_state(
    events: list[Event], request_: Event, words: str
) -> None:
    job, _ = drive(new(), *events)
    with pytest.raises(Conflict) as error:
        step(job, request_)
    assert words in str(error.value)


def test_ending_a_task_fails_it_and_ends_its_worker_without_delay() -> None:
    job = new()
    job, actions = drive(job, Start(), Admit(), *all_of(job, Running), Kill("t2"))
    assert job.tasks["t2"].state is TaskState.FAILED
    assert next(a for a in actions if isinstance(a, End) and a.task == "t2").parting is False
    assert job.failure is not None
    assert job.failure.role == "trainer"


def test_nobody_is_started_before_the_participants_are_there() -> None:
    job, actions = drive(new(trainers=3, brought=2), Start(), Admit())
    assert job.state is JobState.DEPLOYING
    assert not [a for a in actions if isinstance(a, Ask)]
    assert missing(job) == 2
    job, actions = drive(job, Claim("t2"), Connected("t2", 1))
    assert actions == [Expect("t2", 1)]
    assert missing(job) == 1
    job, actions = drive(job, Claim("t3"))
    assert actions == [Expect("t3", 1), Begin("t2", 1), Ask("t0", 1), Ask("t1", 1)]
    job, actions = drive(job, Connected("t3", 1), Connected("t0", 1))
    assert actions == [Begin("t3", 1), Begin("t0", 1)]
    assert job.state is JobState.DEPLOYING
    job, _ = drive(job, *all_of(job, Running))
    assert job.state is JobState.RUNNING


def test_a_quorum_begins_without_the_late_and_they_may_come_later() -> None:
    job, actions = drive(new(trainers=3, fewest=2, brought=2), Start(), Admit())
    assert missing(job) == 1
    job, actions = drive(job, Claim("t2"))
    assert [a for a in actions if isinstance(a, Ask)] == [Ask("t0", 1), Ask("t1", 1)]
    job, _ = drive(job, Running("t0", 1), Running("t1", 1), Running("t2", 1))
    assert job.state is JobState.RUNNING
    job, actions = drive(job, Claim("t3"), Connected("t3", 1))
    assert actions == [Expect("t3", 1), Begin("t3", 1)]


@pytest.mark.parametrize("how", [Terminated, Silent])
def test_a_participant_may_leave_and_come_back_as_a_new_attempt(how: type) -> None:
    job = new(trainers=2, brought=1)
    job, _ = drive(job, Start(), Admit(), Claim("t2"), *all_of(job, Running))
    job, actions = drive(job, how("t2", 1, cause("t2")))
    assert actions == [Release("t2", 1)]
    assert (job.state, job.tasks["t2"].state, job.tasks["t2"].live) == (JobState.RUNNING, TaskState.READY, set())
    job, actions = drive(job, Claim("t2"), Running("t2", 1), Connected("t2", 2))
    assert actions == [Expect("t2", 2), Begin("t2", 2)]
    assert job.tasks["t2"].state is TaskState.DEPLOYING, "the earlier attempt counts for nothing"
    job, actions = drive(job, Running("t2", 2), Claim("t2"))
    assert actions == [Release("t2", 2), Expect("t2", 3)], "it may come back before its silence was noticed"


def test_a_job_completes_without_a_participant_who_has_left() -> None:
    job = new(trainers=3, brought=2)
    job, _ = drive(job, Start(), Admit(), Claim("t2"), Claim("t3"), *all_of(job, Running))
    job, _ = drive(job, Terminated("t3", 1, cause("t3")), *[Completed(task, 1) for task in ("t0", "t1", "t2")])
    with pytest.raises(Conflict, match="last round"):
        step(job, Claim("t3"))
    job, _ = drive(job, *[Gone(task, 1, cause(task)) for task in ("t0", "t1", "t2")])
    assert job.state is JobState.COMPLETED
    assert job.tasks["t3"].state is TaskState.TERMINATED


def test_a_participant_s_code_that_fails_counts_as_any_other() -> None:
    job = new(trainers=3, brought=2)
    job, _ = drive(job, Start(), Admit(), Claim("t2"), Claim("t3"), *all_of(job, Running))
    failed, _ = drive(job, Failed("t3", 1, cause("t3")))
    assert failed.state is JobState.STOPPING
    with pytest.raises(Conflict, match="nothing to take part in"):
        step(failed, Claim("t2"))


TASKS = [f"t{i}" for i in range(4)]
tasks = st.sampled_from(TASKS)
attempts = st.integers(1, 3)


@st.composite
def events(draw: st.DrawFn) -> Event:
    task, attempt = draw(tasks), draw(attempts)
    failure = Failure(message="it broke", task=task, attempt=attempt)
    return draw(
        st.sampled_from(
            [
                Start(),
                Admit(),
                Stop(),
                Pause(),
                Resume(),
                Resume(),
                Restart(attempt),
                Rewound(),
                TimeUp(1.0),
                Steady(task, attempt),
                Delivered(task, attempt),
                Kill(task),
                Claim(task),
                Claim(task),
                Connected(task, attempt),
                Running(task, attempt),
                Running(task, attempt),
                Completed(task, attempt),
                Completed(task, attempt),
                Failed(task, attempt, failure),
                Failed(task, attempt, replace(failure, signal="SIGKILL")),
                Terminated(task, attempt, failure),
                Silent(task, attempt, failure),
                Gone(task, attempt, failure),
                Gone(task, attempt, failure),
                Missing(task, attempt, failure),
            ]
        )
    )


@settings(max_examples=400, deadline=None)
@given(
    st.lists(events(), max_size=60),
    st.sampled_from([None, 1, 2]),
    st.integers(0, 2),
    st.booleans(),
    st.sampled_from([NEVER, RestartPolicy(), RestartPolicy(attempts=1, on_error=True)]),
    st.booleans(),
    st.integers(0, 3),
)
def test_any_order_of_events_keeps_the_promises(
    history: list[Event],
    fewest: int | None,
    head: int,
    restarts: bool,
    restart: RestartPolicy,
    pauses: bool,
    brought: int,
) -> None:
    job = new(trainers=3, fewest=fewest, restart=restart, pauses=pauses, brought=brought)
    states = [job.state]
    asked: set[tuple[str, int]] = set()
    gone: set[tuple[str, int]] = set()
    ended: set[tuple[str, int]] = set()
    begun: set[tuple[str, int]] = set()
    clocks = 0
    for event in [Start(), Admit()][:head] + history:
        if isinstance(event, Gone | Missing):
            if (event.task, event.attempt) not in asked or (event.task, event.attempt) in gone:
                continue  # nothing that was never started can end
            gone.add((event.task, event.attempt))
        elif (
            not isinstance(event, Start | Admit | Stop | Pause | Resume | Restart | Rewound | TimeUp | Kill | Claim)
            and (event.task, event.attempt) not in asked
        ):
            continue  # the shell knows no such worker: it holds no key
        before = job
        try:
            job, actions = step(job, event)
        except Conflict:
            assert job == before
            continue
        for action in actions:
            match action:
                case Enter(state=state):
                    assert state in TRANSITIONS[states[-1]], "only legal transitions"
                    states.append(state)
                case Release(task=task, attempt=attempt):
                    assert job.tasks[task].brought
                    gone.add((task, attempt))
                case Ask(task=task, attempt=attempt) | Expect(task=task, attempt=attempt):
                    assert job.tasks[task].brought is isinstance(action, Expect)
                    assert (task, attempt) not in asked, "no worker is asked for twice"
                    assert attempt == job.tasks[task].attempt
                    assert not job.state.ended
                    asked.add((task, attempt))
                case End(task=task, attempt=attempt):
                    assert (task, attempt) not in ended, "no worker is ended twice"
                    ended.add((task, attempt))
                case Begin(task=task, attempt=attempt):
                    assert (task, attempt) in asked - gone
                    assert (task, attempt) not in begun, "no worker is told to begin twice"
                    begun.add((task, attempt))
                case Clock():
                    clocks += 1
                case _:
                    pass
        assert states[-1] is job.state
        check(before, job, asked, gone, ended)
        if restarts:  # a server that reads this state finds nothing that it would decide differently
            forgotten = {key: replace(task, ending=frozenset()) for key, task in job.tasks.items()}
            again, _ = settle(replace(job, tasks=forgotten))
            assert again.state is job.state
            assert {t.state for t in again.tasks.values()} == {t.state for t in job.tasks.values()}
    assert clocks <= 1 + states.count(JobState.PAUSED)
    assert sum(state.ended for state in states) <= 1, "a job ends once"
    assert all(a is not b for a, b in pairwise(states))


def check(
    before: JobLife,
    job: JobLife,
    asked: set[tuple[str, int]],
    gone: set[tuple[str, int]],
    ended: set[tuple[str, int]],
) -> None:
    live = {(t.id, attempt) for t in job.tasks.values() for attempt in t.live}
    assert live == asked - gone, "the state knows exactly the workers that may be there"
    if any(not task.brought and task.live for task in job.tasks.values()) and before.state is not JobState.PAUSED:
        assert gathered(job), "nothing is started before there are enough participants, and what was stays so"
    assert (missing(job) == 0) is gathered(job)
    for old, new_ in zip(before.tasks.values(), job.tasks.values(), strict=True):
        assert new_.attempt >= old.attempt
        if old.state.ended and JobState.PAUSED not in (before.state, job.state):
            assert new_.state is old.state, "a task ends once, but for a job that is paused"
        if new_.state is TaskState.FAILED:
            assert new_.failure is not None, "every failure says why"
    if before.state.ended:
        assert job.state is before.state
    if job.state.ended:
        assert not live, "an ended job has no worker left"
        assert all(t.state.ended for t in job.tasks.values())
    if job.state is JobState.PAUSED:
        assert not live, "a paused job has no worker"
        assert {t.state for t in job.tasks.values()} <= {TaskState.READY, TaskState.COMPLETED}
    if job.state in (JobState.STOPPING, JobState.PAUSING):
        assert live <= ended, "every worker of a stopping job was asked to end"
    for task in job.tasks.values():
        if task.state.ended:
            assert {(task.id, a) for a in task.live} <= ended, "every worker of an ended task was asked to end"
    done = dict.fromkeys(job.quorum, 0)
    for task in job.tasks.values():
        left = task.brought and task.failure is None and task.state is TaskState.TERMINATED
        done[task.role] += left or task.state is TaskState.COMPLETED
    enough = (
        any(t.state is TaskState.COMPLETED for t in job.tasks.values())
        and all(t.state.ended for t in job.tasks.values())
        and all(done[r] >= n for r, n in job.quorum.items())
    )
    if job.state is JobState.COMPLETED:
        assert enough
    if enough and not live and job.state is not JobState.COMPLETED:
        assert JobState.STOPPING is before.state or job.state in (JobState.FAILED, JobState.TERMINATED)
    if job.state is JobState.FAILED:
        assert job.failure is not None
