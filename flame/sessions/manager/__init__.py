"""The server's side of elastic sessions: who is open, what waits, and which executors serve it."""

from flame.sessions.manager.manager import Manager

__all__ = ["Manager"]
