"""What can happen to a job (events), and what is to be done about it (actions): the words of :mod:`flame.controller.lifecycle`."""

from __future__ import annotations

import msgspec

from flame.spec.records import Failure, JobState


class Start(msgspec.Struct, frozen=True):
    """A user starts the job."""


class Admit(msgspec.Struct, frozen=True):
    """There is room for all of the job's workers."""


class Stop(msgspec.Struct, frozen=True):
    """A user stops the job."""


class Pause(msgspec.Struct, frozen=True):
    """A user pauses the job: its workers are ended, what they have reached is kept."""


class Resume(msgspec.Struct, frozen=True):
    """A user lets a paused job go on."""


class Restart(msgspec.Struct, frozen=True):
    """A user sets a job that is under way back behind a round: its workers are ended, then it goes on from there."""

    behind: int


class Rewound(msgspec.Struct, frozen=True):
    """Nothing is kept any more of the rounds after the one that the job was to be set back behind."""


class TimeUp(msgspec.Struct, frozen=True):
    """The job has run for as long as it may."""

    seconds: float


class Kill(msgspec.Struct, frozen=True):
    """A user ends one task's worker."""

    task: str


class Delivered(msgspec.Struct, frozen=True):
    """The worker has handed in the job's model, or its group's."""

    task: str
    attempt: int


class Owes(msgspec.Struct, frozen=True):
    """The worker has something of its own to hand in, which nobody else has: it is needed until it has completed."""

    task: str
    attempt: int


class Steady(msgspec.Struct, frozen=True):
    """The worker has run for so long that the losses before it no longer count."""

    task: str
    attempt: int


class Claim(msgspec.Struct, frozen=True):
    """A participant takes a task whose worker is its own, for the first time or anew."""

    task: str


class Connected(msgspec.Struct, frozen=True):
    """A flamelet follows its events."""

    task: str
    attempt: int


class Running(msgspec.Struct, frozen=True):
    """The task's code was started."""

    task: str
    attempt: int


class Completed(msgspec.Struct, frozen=True):
    """The task's code ended with status 0."""

    task: str
    attempt: int


class Failed(msgspec.Struct, frozen=True):
    """The flamelet says that the task failed."""

    task: str
    attempt: int
    failure: Failure


class Terminated(msgspec.Struct, frozen=True):
    """The flamelet was told to end the task's code, and did. Nobody of ours need have told it."""

    task: str
    attempt: int
    failure: Failure


class Silent(msgspec.Struct, frozen=True):
    """The worker's lease is lost: its machine may be unreachable, and the worker still be there."""

    task: str
    attempt: int
    failure: Failure


class Gone(msgspec.Struct, frozen=True):
    """Nothing is left of the worker. ``failure`` is the cause where the task had not ended before."""

    task: str
    attempt: int
    failure: Failure


class Missing(msgspec.Struct, frozen=True):
    """A restarted server had asked for this worker, or was about to when it was killed; it is not there."""

    task: str
    attempt: int
    failure: Failure


Event = (
    Start
    | Admit
    | Stop
    | Pause
    | Resume
    | Restart
    | Rewound
    | TimeUp
    | Kill
    | Steady
    | Delivered
    | Owes
    | Claim
    | Connected
    | Running
    | Completed
    | Failed
    | Terminated
    | Silent
    | Gone
    | Missing
)


class Enter(msgspec.Struct, frozen=True):
    """The job entered a state; a step may go through several."""

    state: JobState


class Ask(msgspec.Struct, frozen=True):
    """Start a worker for this attempt, after ``delay`` seconds."""

    task: str
    attempt: int
    delay: float = 0.0


class Expect(msgspec.Struct, frozen=True):
    """A participant starts a worker for this attempt: let it in."""

    task: str
    attempt: int


class Release(msgspec.Struct, frozen=True):
    """A participant's worker has left, or another one has taken its place: let it in no more."""

    task: str
    attempt: int


class Begin(msgspec.Struct, frozen=True):
    """Tell the flamelet to run the task's code."""

    task: str
    attempt: int


class End(msgspec.Struct, frozen=True):
    """See to it that nothing is left of this worker.

    :ivar parting: its task has ended and it is about to leave by itself; it gets a moment for that.
    """

    task: str
    attempt: int
    reason: str
    parting: bool = False


class Rewind(msgspec.Struct, frozen=True):
    """Forget what is kept of the rounds after one, and say :class:`Rewound`. Repeating it changes nothing."""

    behind: int


class Dismiss(msgspec.Struct, frozen=True):
    """Tell a worker that the others have done the work: whoever it waits for will not come."""

    task: str
    attempt: int


class Clock(msgspec.Struct, frozen=True):
    """The first worker runs: the time limit begins to count."""


class Warn(msgspec.Struct, frozen=True):
    """Something went wrong that the job can do without."""

    message: str


Action = Enter | Ask | Expect | Release | Begin | End | Rewind | Dismiss | Clock | Warn
