"""The tree of exceptions. Everything that Flame raises on purpose is a :class:`FlameError`.

* FlameError
  + UsageError            a command line or an argument of the Python API is wrong
  + SpecError             a file, or a field of one, says something that cannot be
  + NotFound              no such job, design, dataset, task ...
  + Conflict              the thing exists already, or its state does not allow the request
  + Unauthorized          who you are is not known (no token, or a wrong one)
  + Forbidden             who you are may not do this; also: a report of an older attempt
  + TooManyRequests       too many requests were refused; wait a moment
  + ServerError           the server answered with a fault of its own, or something that is no answer
  + ServerUnreachable     nothing answers at the server's address
  + MissingExtra          an optional dependency is not installed; names the extra that brings it
  + StoreError            the state's database cannot be opened, read or written
  + RunnerError           a worker could not be started, listed or ended
  + JobFailed             a job that was waited for did not complete
  + TaskFailed            a task of a session failed; has the exception's type, message and trace as text
  + TaskCancelled         a task of a session was cancelled
  + ActorLost             an actor's process is gone, and its state with it
  + WorkerError           the data plane, see below
    - CodecError          a frame is malformed, truncated, oversized, or of another version
    - ChannelError        a channel is used wrongly (not joined, unknown end, unknown function tag)
    - EndLeft             the peer that is waited for or sent to has left
    - DeadlineExceeded    a wait on a channel took longer than its deadline
    - BackendError        the transport failed for good (broker refuses, credentials wrong)
    - DatasetError        a dataset cannot be had: it is not there, is refused, or has another digest than promised
    - RoundFailed         a round's policy cannot be kept (too few trainers by the deadline)

An error's text is for a user: one or two sentences that say what was wrong, where, and what to do.
A lower library's exception never passes through an interface of Flame: it is wrapped, as ``__cause__``.
"""

from __future__ import annotations


class FlameError(Exception):
    """Base of all errors that Flame raises on purpose.

    :param message: one or two sentences for a user: what was wrong, where, what to do.
    """

    #: The HTTP status with which the apiserver answers when this error ends a request.
    status: int = 500

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class UsageError(FlameError):
    """A command line or an argument of the Python API is wrong."""

    status = 400


class SpecError(FlameError):
    """A file, or a field of one, says something that cannot be.

    :param message: what is wrong and the mend.
    :param where: file and place, such as ``schema.json: roles[1].name``; None where there is none.
    """

    status = 422

    def __init__(self, message: str, where: str | None = None) -> None:
        super().__init__(f"{where}: {message}" if where else message)
        self.where = where


class NotFound(FlameError):
    """No such job, design, dataset, task ..."""

    status = 404


class Conflict(FlameError):
    """The thing exists already, or its state does not allow the request."""

    status = 409


class Unauthorized(FlameError):
    """Who asks is not known: no token, or a wrong one."""

    status = 401


class Forbidden(FlameError):
    """Who asks is known and may not do this. Also: a report of an older attempt of a task."""

    status = 403


class TooManyRequests(FlameError):
    """Too many requests from one address were refused; it has to wait.

    :param retry_after: seconds to wait.
    """

    status = 429

    def __init__(self, message: str, retry_after: int = 10) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ServerError(FlameError):
    """The server answered with a fault of its own, or with something that is no answer of a Flame server."""

    status = 502


class ServerUnreachable(FlameError):
    """Nothing answers at the server's address."""

    status = 503


class MissingExtra(FlameError):
    """An optional dependency is not installed.

    :param package: the module that could not be imported, such as ``mlflow``.
    :param extra: the extra of the ``flame`` distribution that brings it.
    :param purpose: what it is needed for, as the beginning of a sentence.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'flame[{extra}]'.")
        self.package = package
        self.extra = extra


class StoreError(FlameError):
    """The state's database cannot be opened, read or written."""


class RunnerError(FlameError):
    """A worker could not be started, listed or ended."""


class JobFailed(FlameError):
    """A job that was waited for did not complete."""


class TaskFailed(FlameError):
    """A task of a session failed, as often as it was tried.

    :param type: the class of the exception that ended it, or what else did: ``TimeoutError``, ``ExecutorLost``, ``SessionFailed``.
    :param reason: the exception's message.
    :param trace: where it was raised, as Python prints it.
    :param task: the task's id in its session.
    """

    def __init__(self, type: str, reason: str, trace: str = "", task: int | None = None) -> None:
        which = "The task" if task is None else f"Task {task}"
        super().__init__(f"{which} failed: {type}: {reason}")
        self.type = type
        self.reason = reason
        self.trace = trace
        self.task = task


class TaskCancelled(FlameError):
    """A task of a session was cancelled, by itself or with its session."""


class ActorLost(FlameError):
    """An actor's process is gone, and its state with it: it can answer no more."""


class WorkerError(FlameError):
    """Base of the data plane's errors."""


class CodecError(WorkerError):
    """A frame is malformed, truncated, oversized, or of another version."""


class ChannelError(WorkerError):
    """A channel is used wrongly: not joined, an unknown end, an unknown function tag."""


class EndLeft(WorkerError):
    """The peer that is waited for or sent to has left.

    :param end: the peer's id.
    :param message: what to tell the user.
    """

    def __init__(self, end: str, message: str) -> None:
        super().__init__(message)
        self.end = end


class DeadlineExceeded(WorkerError):
    """A wait on a channel took longer than its deadline."""


class BackendError(WorkerError):
    """The transport failed for good: the broker refuses, the credentials are wrong."""


class DatasetError(WorkerError):
    """A dataset cannot be had: it is not there, is refused, or has another digest than promised."""


class RoundFailed(WorkerError):
    """A round's policy cannot be kept: too few trainers by the deadline."""
