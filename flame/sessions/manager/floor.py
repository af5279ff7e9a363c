"""What the parts of the manager share: the open sessions, the executors, and where both are written."""

from __future__ import annotations

from flame.controller.context import Context
from flame.controller.shelf import Shelf
from flame.sessions.link import Link
from flame.sessions.manager.committer import Committer
from flame.sessions.manager.executors import Executor
from flame.sessions.manager.ground import Ground
from flame.sessions.manager.live import Live
from flame.spec.sessions import ExecutorRecord, SessionRecord


class Floor:
    """The floor on which sessions and executors meet. It decides nothing.

    :ivar context: what sessions share with jobs.
    :ivar sessions: the records of sessions, closed ones included.
    :ivar records: those of executors.
    :ivar lives: the open sessions, by their ids.
    :ivar executors: all executors, by theirs.
    :ivar links: the connections that are there.
    :ivar open: whether the server is at work; before and after that nobody is given anything.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.sessions: Shelf[SessionRecord] = Shelf(context.store, "sessions", SessionRecord)
        self.records: Shelf[ExecutorRecord] = Shelf(context.store, "executors", ExecutorRecord)
        self.ground = Ground(context.computes)
        self.committer = Committer(context.store, Live.changed)
        self.lives: dict[str, Live] = {}
        self.executors: dict[str, Executor] = {}
        self.links: set[Link] = set()
        self.open = False
