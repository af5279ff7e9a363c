"""Users, their tokens, projects: what an admin looks after, and what all have of their own."""

from __future__ import annotations

from collections.abc import Sequence

from flame.client.resources import Noun, Page
from flame.spec.people import (
    NewToken,
    NewUser,
    Project,
    Token,
    TokenForm,
    User,
    UserChange,
    UserForm,
    UserRole,
)
from flame.spec.records import Record


class Deed(Record, kw_only=True):
    """One line of the log of who did what."""

    time: float
    who: str
    role: str = ""
    address: str = ""
    what: str = ""
    path: str = ""
    status: int = 0
    token: str = ""
    reason: str = ""


class Users(Noun):
    """Who may use the server. For admins."""

    async def create(self, form: UserForm) -> NewUser:
        """Make a user; the answer holds their first token, which is shown this once."""
        return await self._session.call("POST", "/v1/users", body=form, into=NewUser)

    async def list(self) -> list[User]:
        """All users."""
        return (await self._session.call("GET", "/v1/users", into=Page[User])).items

    async def get(self, name: str) -> User:
        """One user."""
        return await self._session.call("GET", f"/v1/users/{name}", into=User)

    async def update(self, name: str, *, role: UserRole | None = None, projects: Sequence[str] | None = None) -> User:
        """Give a user another role or other projects; what is None stays."""
        body = UserChange(role=role, projects=None if projects is None else [*projects])
        return await self._session.call("PUT", f"/v1/users/{name}", body=body, into=User)

    async def delete(self, name: str) -> None:
        """Remove a user with all their tokens."""
        await self._session.call("DELETE", f"/v1/users/{name}")


class Tokens(Noun):
    """Tokens: one's own; an admin looks after everyone's."""

    async def create(self, form: TokenForm) -> NewToken:
        """Make a token, which is shown this once."""
        return await self._session.call("POST", "/v1/tokens", body=form, into=NewToken)

    async def list(self) -> list[Token]:
        """The tokens."""
        return (await self._session.call("GET", "/v1/tokens", into=Page[Token])).items

    async def revoke(self, id: str, *, descendants: bool = False) -> None:
        """Make a token worthless, at once.

        :param descendants: also those that were made with it, and with those.
        """
        await self._session.call("DELETE", f"/v1/tokens/{id}", query={"descendants": "true" if descendants else None})


class Projects(Noun):
    """What keeps teams' things apart."""

    async def create(self, name: str, description: str = "") -> Project:
        """Make a project."""
        body = {"name": name, "description": description}
        return await self._session.call("POST", "/v1/projects", body=body, into=Project)

    async def list(self) -> list[Project]:
        """One's own projects; an admin's are all."""
        return (await self._session.call("GET", "/v1/projects", into=Page[Project])).items

    async def delete(self, name: str) -> None:
        """Remove a project that has neither users nor things."""
        await self._session.call("DELETE", f"/v1/projects/{name}")
