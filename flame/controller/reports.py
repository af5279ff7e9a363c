"""What flamelets report, checked: the data of each type of :class:`flame.spec.records.Report`."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import msgspec

from flame.errors import SpecError
from flame.spec.records import Failure, Model, Record, Report

R = TypeVar("R")


class StateData(Record, kw_only=True):
    """``state``: the task's code was started, or has ended."""

    state: Literal["running", "completed", "failed", "terminated"]
    exit_code: int | None = None
    signal: str | None = None
    message: str | None = None
    log: list[str] = []


class MetricsData(Record, kw_only=True):
    """``metrics``, and with ``seconds`` ``round``."""

    round: int
    metrics: dict[str, Any] = {}
    seconds: float = 0.0
    group: str = ""

    def numbers(self) -> dict[str, float]:
        """The metrics that are numbers. (What is not a number, or infinite, arrives as null: JSON has no word for it.)"""
        return {name: float(value) for name, value in self.metrics.items() if isinstance(value, int | float)}


class JoinData(Record, kw_only=True):
    """``join``: the worker can be reached on a channel."""

    channel: str
    group: str
    member: dict[str, Any]


class LeaveData(Record, kw_only=True):
    """``leave``: it no longer can."""

    channel: str
    group: str


class MessageData(Record, kw_only=True):
    """``warning`` and ``waiting``: a sentence."""

    message: str = ""


class OwesData(Record, kw_only=True):
    """``owes``: this worker has something of its own to hand in before it completes."""


_TYPES: dict[str, type[Record]] = {
    "state": StateData,
    "metrics": MetricsData,
    "round": MetricsData,
    "join": JoinData,
    "leave": LeaveData,
    "model": Model,
    "owes": OwesData,
    "warning": MessageData,
    "waiting": MessageData,
}


def read(report: Report) -> Record | None:
    """The data of a report; None for a type that this server does not know (a newer flamelet may say more).

    :raises flame.errors.SpecError: it is not what its type says.
    """
    form = _TYPES.get(report.type)
    if form is None:
        return None
    try:
        return msgspec.convert(report.data, form)
    except msgspec.ValidationError as error:
        raise SpecError(f"{error}.", f"report {report.seq} ({report.type})") from error


def failure_of(data: StateData, task: str, role: str, attempt: int, tail: list[str]) -> Failure:
    """Why a task failed, from its flamelet's last report.

    :param tail: the end of the task's log, for a report that brings none.
    """
    if data.message:
        message = data.message
    elif data.signal:
        message = f"Its process was killed by {data.signal}."
    else:
        message = f"Its process ended with exit code {data.exit_code}."
    return Failure(
        message=message,
        task=task,
        role=role,
        attempt=attempt,
        exit_code=data.exit_code,
        signal=data.signal,
        log=[line[:2000] for line in (data.log or tail)[-50:]],
    )
