"""Who uses a server: users with a role, their tokens, and the projects that keep teams' things apart.

A *principal* is who makes a request, once that is known. Nothing else is asked when it is decided what a request may do: not
how somebody has shown who they are, nor from where.
"""

from __future__ import annotations

import enum
import math
from typing import Annotated, NamedTuple

from msgspec import Meta, field

from flame.spec.nouns import Form
from flame.spec.records import Record

#: The project of whatever says none.
DEFAULT_PROJECT = "default"

#: Names of users and projects: they stand in paths, logs and tables, so they are plain. (``$`` would let a line end pass.)
Plain = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,62}(?![\s\S])")]
Days = Annotated[float, Meta(gt=0, le=3650)]


class UserRole(str, enum.Enum):
    """What somebody is to a server. Each may do less than the one before it.

    * ``admin``: everything, in every project
    * ``user``: everything with the things of their projects
    * ``participant``: give data, and see what becomes of them: their own datasets, and the tasks that use these
    * ``viewer``: look at the things of their projects
    """

    ADMIN = "admin"
    USER = "user"
    PARTICIPANT = "participant"
    VIEWER = "viewer"


class Principal(NamedTuple):
    """Who makes a request.

    :ivar name: the user's name; ``local`` on a server without users, ``operator`` with the token of ``flame serve``.
    :ivar role: what they may do.
    :ivar projects: where; an admin may everywhere. The first one is where new things go that say no project.
    :ivar token: the id of the token that was shown, where there was one.
    :ivar until: when that token expires, in seconds since the epoch.
    """

    name: str
    role: UserRole
    projects: tuple[str, ...] = (DEFAULT_PROJECT,)
    token: str = ""
    until: float = math.inf

    @property
    def admin(self) -> bool:
        """Whether this one may do everything."""
        return self.role is UserRole.ADMIN


#: Who has not said who they are.
NOBODY = Principal("anyone", UserRole.VIEWER, ())
#: On this machine, while no users are defined.
LOCAL = Principal("local", UserRole.ADMIN)
#: With the token that ``flame serve`` was started with.
OPERATOR = Principal("operator", UserRole.ADMIN)


class UserForm(Form, frozen=True, kw_only=True):
    """A new user."""

    name: Plain
    role: UserRole = UserRole.USER
    projects: list[Plain] = field(default_factory=lambda: [DEFAULT_PROJECT])


class UserChange(Form, frozen=True, kw_only=True):
    """What is to be different of a user; what is left out stays."""

    role: UserRole | None = None
    projects: list[Plain] | None = None


class User(Record, kw_only=True):
    """Somebody who may use the server."""

    name: str
    role: UserRole
    projects: list[str] = field(default_factory=lambda: [DEFAULT_PROJECT])
    created_at: float = 0.0


class TokenForm(Form, frozen=True, kw_only=True):
    """A new token. ``user``: whose (an admin may say another than themselves); ``days``: how long it is good for."""

    user: Plain | None = None
    description: Annotated[str, Meta(max_length=200)] = ""
    days: Days = 90.0


class Token(Record, kw_only=True):
    """What is shown of a token: everything but itself. ``id`` is not secret, and is enough to revoke it.

    :ivar made_by: the id of the token with which it was made; empty: with none of the store's.
    """

    id: str
    user: str
    made_by: str = ""
    description: str = ""
    created_at: float = 0.0
    expires_at: float = 0.0


class NewToken(Token, kw_only=True):
    """A token with the secret itself. This is the only time that it is shown: the server keeps its SHA-256 alone."""

    token: str


class NewUser(Record, kw_only=True):
    """A new user with their first token."""

    user: User
    token: NewToken


class ProjectForm(Form, frozen=True, kw_only=True):
    """A new project."""

    name: Plain
    description: Annotated[str, Meta(max_length=2000)] = ""


class Project(Record, kw_only=True):
    """What keeps one team's designs, datasets, jobs and computes apart from another's."""

    name: str
    description: str = ""
    created_at: float = 0.0


class Known(Record, kw_only=True):
    """Who the server takes you for."""

    name: str
    role: UserRole
    projects: list[str]


class StoredToken(Record, kw_only=True):
    """A token as it is kept."""

    token: Token
    hash: str
