"""The client of elastic sessions: tasks in, answers out, over one connection for all sessions of a server."""

from flame.sessions.client.connection import PATIENCE, Connection, connect, open  # noqa: A004 - it opens
from flame.sessions.client.describing import describe
from flame.sessions.client.session import Future, Session

__all__ = ["PATIENCE", "Connection", "Future", "Session", "connect", "describe", "open"]
