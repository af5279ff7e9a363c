"""Users, their tokens, and projects.

All of them are held in memory, since every request asks; they are few, and this server is the only one that writes them. A
change is in the store before it holds here.

A token is 256 random bits, shown once. What is kept is its SHA-256: a hash that is slow on purpose protects secrets that people
think up, which can be guessed; nobody guesses 256 bits. It is also what makes it safe to look a token up
in a table: the time that takes says something about the hash, from which nothing follows about a token.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterable

import msgspec

from flame.controller.shelf import Saved, Shelf
from flame.controller.standing import Standing
from flame.errors import Conflict, Forbidden, NotFound, ServerUnreachable, SpecError, Unauthorized
from flame.spec.people import (
    DEFAULT_PROJECT,
    LOCAL,
    NewToken,
    NewUser,
    Principal,
    Project,
    ProjectForm,
    StoredToken,
    Token,
    TokenForm,
    User,
    UserChange,
    UserForm,
    UserRole,
)
from flame.store import Store

#: What every token begins with, so that people, and programs that look for secrets in the wrong place, know one.
PREFIX = "flm_"
#: Names that the server itself goes by in its log of who did what.
_RESERVED = frozenset({"local", "operator", "anyone", "worker"})
_DAY = 86_400.0


class Accounts:
    """Who may use a server.

    :param store: the state.
    :param standing: what is open by a token or a user's rights, and ends with them.
    """

    def __init__(self, store: Store, standing: Standing) -> None:
        self._standing = standing
        self._users: Shelf[User] = Shelf(store, "users", User)
        self._tokens: Shelf[StoredToken] = Shelf(store, "tokens", StoredToken)
        self._projects: Shelf[Project] = Shelf(store, "projects", Project)
        self._known: dict[str, Saved[User]] = {}
        self._shown: dict[str, Saved[StoredToken]] = {}
        self._by_hash: dict[str, StoredToken] = {}
        self._teams: dict[str, Saved[Project]] = {}

    async def open(self) -> None:
        """Read them."""
        self._known = {saved.id: saved for saved in await self._users.all()}
        self._teams = {saved.id: saved for saved in await self._projects.all()}
        self._shown = {saved.id: saved for saved in await self._tokens.all()}
        self._by_hash = {saved.record.hash: saved.record for saved in self._shown.values()}

    @property
    def any(self) -> bool:
        """Whether there are users, so that everyone has to say who they are."""
        return bool(self._known)

    def principal(self, secret: str) -> Principal | None:
        """Who shows this token; None: nobody, or it is no longer good."""
        stored = self._by_hash.get(_hash(secret))
        if stored is None or stored.token.expires_at <= time.time():
            return None
        saved = self._known.get(stored.token.user)
        if saved is None:
            return None
        user, token = saved.record, stored.token
        return Principal(user.name, user.role, tuple(user.projects), token.id, token.expires_at)

    # ------------------------------------------------------------------------------------------------- users

    async def create_user(self, form: UserForm, by: Principal = LOCAL) -> NewUser:
        """Make a user and their first token.

        :param by: who asks.
        :raises flame.errors.Conflict: there is one of that name.
        :raises flame.errors.SpecError: the first user must be an admin, as nobody else could make the next.
        """
        if form.name.lower() in _RESERVED:
            raise SpecError(f"the name {form.name!r} is the server's own; take another one.", "name")
        if not self._known and form.role is not UserRole.ADMIN:
            raise SpecError(
                "the first user must be an admin: once there are users, only an admin makes others.", "role"
            )
        self._check_projects(form.projects)
        user = User(name=form.name, role=form.role, projects=list(dict.fromkeys(form.projects)), created_at=time.time())
        try:
            saved = await self._users.insert(user.name, user)
        except Conflict:
            raise Conflict(f"There is a user {user.name!r} already.") from None
        await self._forget_all(user.name)  # of somebody who had this name before, and was removed in the same instant
        # The token is there before the user counts: from the first user on nobody gets in without one.
        try:
            token = await self._issue(user.name, TokenForm(description="the first one"), by)
        except Unauthorized:
            await self._users.delete(user.name)
            raise
        self._known[user.name] = saved
        if len(self._known) == 1:
            self._standing.end(("user", LOCAL.name), Unauthorized("This server has users now: it needs a token."))
        return NewUser(user=user, token=token)

    def users(self) -> list[User]:
        """All users, by name."""
        return [self._known[name].record for name in sorted(self._known)]

    def user(self, name: str) -> User:
        """A user."""
        return self._user(name).record

    async def update_user(self, name: str, change: UserChange) -> User:
        """Give a user another role or other projects. It holds at once: what they have open ends; what they still may, they open again."""
        saved = self._user(name)
        if change.role not in (None, UserRole.ADMIN):
            self._keep_an_admin(name)
        if change.projects is not None:
            self._check_projects(change.projects)
        given = {key: value for key, value in msgspec.structs.asdict(change).items() if value is not None}
        await self._users.put(saved, msgspec.structs.replace(saved.record, **given))
        changed = ServerUnreachable(f"What {name!r} may do here has changed, so the connection was ended.")
        self._standing.end(("user", name), changed)
        return saved.record

    async def delete_user(self, name: str) -> None:
        """Remove a user, and with them all their tokens. What they own stays."""
        self._user(name)
        self._keep_an_admin(name)
        await self._forget_all(name)
        await self._users.delete(name)
        del self._known[name]
        self._standing.end(("user", name), Unauthorized(f"The user {name!r} was removed."))

    def _user(self, name: str) -> Saved[User]:
        if name not in self._known:
            raise NotFound(f"There is no user {name!r}.")
        return self._known[name]

    def _keep_an_admin(self, but: str) -> None:
        if not any(one.record.role is UserRole.ADMIN and name != but for name, one in self._known.items()):
            raise Conflict(f"{but!r} is the last admin; make another one first.")

    def _check_projects(self, names: Iterable[str]) -> None:
        if not names:
            raise SpecError("a user belongs to one project at least.", "projects")
        for name in names:
            if not self.has_project(name):
                raise SpecError(f"there is no project {name!r}; an admin makes it.", "projects")

    # ------------------------------------------------------------------------------------------------ tokens

    async def create_token(self, form: TokenForm, by: Principal) -> NewToken:
        """Make a token.

        :param by: who asks; only an admin makes tokens for others.
        :raises flame.errors.Forbidden: it is for somebody else.
        """
        name = form.user or by.name
        if name != by.name and not by.admin:
            raise Forbidden(f"Only an admin makes tokens for others; {by.name!r} is none.")
        self._user(name)
        return await self._issue(name, form, by)

    def tokens(self, by: Principal) -> list[Token]:
        """The tokens: one's own, or for an admin all; the oldest first."""
        found = [one.record.token for one in self._shown.values() if by.admin or one.record.token.user == by.name]
        return sorted(found, key=lambda token: (token.created_at, token.id))

    async def revoke(self, id: str, by: Principal, *, descendants: bool = False) -> None:
        """Make a token worthless, at once.

        :param descendants: also those that were made with it, and with those, as far as they are one's own or one is an admin; also
            when it is gone itself.
        :raises flame.errors.NotFound: there is none of this id, or it is somebody else's.
        """

        family = {id}

        def doomed() -> list[Saved[StoredToken]]:
            mine = [one for one in self._shown.values() if by.admin or one.record.token.user == by.name]
            return [one for one in mine if one.id in family or (descendants and one.record.token.made_by in family)]

        if not doomed():
            raise NotFound(f"There is no token {id!r}.")
        while found := doomed():
            for one in found:
                await self._forget(one)
                family.add(one.id)

    async def _issue(self, user: str, form: TokenForm, by: Principal) -> NewToken:
        await self._forget_expired()
        now = time.time()
        secret = PREFIX + secrets.token_urlsafe(32)
        token = Token(
            id=secrets.token_hex(6),
            user=user,
            made_by=by.token,
            description=form.description,
            created_at=now,
            expires_at=now + form.days * _DAY,
        )
        stored = StoredToken(token=token, hash=_hash(secret))
        saved = self._shown[token.id] = await self._tokens.insert(token.id, stored)
        if by.token and by.token not in self._shown:
            await self._forget(saved)
            raise Unauthorized("This token is no longer valid: it was revoked.")
        self._by_hash[stored.hash] = stored
        return NewToken(**msgspec.structs.asdict(token), token=secret)

    async def _forget(self, saved: Saved[StoredToken]) -> None:
        await self._tokens.delete(saved.id)
        self._by_hash.pop(saved.record.hash, None)
        self._shown.pop(saved.id, None)
        self._standing.end(("token", saved.id), Unauthorized("This token is no longer valid: it was revoked."))

    async def _forget_all(self, user: str) -> None:
        for token in [one for one in self._shown.values() if one.record.token.user == user]:
            await self._forget(token)

    async def _forget_expired(self) -> None:
        """Tokens that are long past their time need not be kept; for a month they are shown, as people wonder."""
        past = time.time() - 30 * _DAY
        for saved in [one for one in self._shown.values() if one.record.token.expires_at < past]:
            await self._forget(saved)

    # ---------------------------------------------------------------------------------------------- projects

    async def create_project(self, form: ProjectForm) -> Project:
        """Make a project.

        :raises flame.errors.Conflict: there is one of that name.
        """
        if self.has_project(form.name):
            raise Conflict(f"There is a project {form.name!r} already.")
        project = Project(name=form.name, description=form.description, created_at=time.time())
        self._teams[form.name] = await self._projects.insert(form.name, project)
        return project

    def projects(self, by: Principal) -> list[Project]:
        """The projects that somebody belongs to, by name; for an admin all. ``default`` is always there."""
        every = {DEFAULT_PROJECT: Project(name=DEFAULT_PROJECT, description="Where things go that say no project.")}
        every |= {name: saved.record for name, saved in self._teams.items()}
        return [every[name] for name in sorted(every) if by.admin or name in by.projects]

    def has_project(self, name: str) -> bool:
        """Whether there is a project of this name."""
        return name == DEFAULT_PROJECT or name in self._teams

    async def delete_project(self, name: str) -> None:
        """Remove a project that has no users. Whoever calls has seen to it that nothing is in it.

        :raises flame.errors.Conflict: users belong to it, or it is ``default``.
        """
        if name == DEFAULT_PROJECT:
            raise Conflict("The project 'default' is always there.")
        if name not in self._teams:
            raise NotFound(f"There is no project {name!r}.")
        members = [user.name for user in self.users() if name in user.projects]
        if members:
            raise Conflict(f"Project {name!r} has users: {', '.join(members[:5])}. Take them out of it first.")
        await self._projects.delete(name)
        del self._teams[name]


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()
