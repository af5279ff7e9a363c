"""Who may do what: the one place in which it is decided.

The rules are pure functions of three things: who asks (:class:`~flame.spec.people.Principal`), to whom a thing
belongs (:class:`Scope`), and what the route asks for (:class:`Access`). Whoever may not even see a thing is
told that there is none: that it exists is nobody else's business.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

from flame.errors import Forbidden, NotFound
from flame.spec.people import DEFAULT_PROJECT, Principal, UserRole


class Access(enum.Enum):
    """Who may call a route. What a route is about, its scope, is looked at too: see :mod:`flame.apiserver.scopes`.

    A route that names one thing in its path is for those who may see that thing; a list shows what its caller may see.
    """

    OPEN = "anyone"
    SIGNED_IN = "everyone who says who they are"
    READ = "who may read: viewers and users in the thing's project, admins"
    SHARED = "who may read, and the participant whose data it is about"
    WRITE = "users in the thing's project, admins"
    OFFER = "who may give data: users and participants in their projects, admins"
    OWNER = "who has made the thing, admins"
    ADMIN = "admins"
    WORKER = "the task's own worker, with the task's key for that attempt"
    INVITED = "whoever holds an invite to a job, for that job"

    def lets_in(self, role: UserRole) -> bool:
        """Whether somebody of this role may call at all; about which things is another question."""
        return role in _ROLES[self]


_EVERYONE = frozenset(UserRole)
_ROLES: dict[Access, frozenset[UserRole]] = {
    Access.OPEN: _EVERYONE,
    Access.SIGNED_IN: _EVERYONE,
    Access.READ: _EVERYONE - {UserRole.PARTICIPANT},
    Access.SHARED: _EVERYONE,
    Access.WRITE: frozenset({UserRole.ADMIN, UserRole.USER}),
    Access.OFFER: _EVERYONE - {UserRole.VIEWER},
    Access.OWNER: _EVERYONE - {UserRole.VIEWER},
    Access.ADMIN: frozenset({UserRole.ADMIN}),
    Access.WORKER: frozenset(),
    Access.INVITED: frozenset(),
}


class Scope(NamedTuple):
    """To whom a thing belongs.

    :ivar project: whose users may work with it; None: it is the server's, and belongs to no project.
    :ivar owner: who has made it.
    :ivar participants: whose data it is about.
    :ivar public: everyone may see it who may call the route.
    """

    project: str | None = DEFAULT_PROJECT
    owner: str = ""
    participants: frozenset[str] = frozenset()
    public: bool = False


def scope_of(record: Any) -> Scope:
    """The scope of a record that says its ``project`` and ``owner``; the owner of a task is a participant."""
    owner = getattr(record, "owner", "")
    dataset = getattr(record, "dataset", None)
    return Scope(
        project=getattr(record, "project", DEFAULT_PROJECT),
        owner=owner,
        participants=frozenset({owner}) if owner else frozenset(),
        public=bool(getattr(dataset, "is_public", False)),
    )


def may_see(principal: Principal, scope: Scope) -> bool:
    """Whether somebody may know of a thing."""
    if principal.admin or scope.public:
        return True
    if principal.role is UserRole.PARTICIPANT:
        return principal.name in scope.participants
    return scope.project in principal.projects


def check_role(principal: Principal, access: Access) -> None:
    """Refuse who may not call a route, whatever it would be about.

    :raises flame.errors.Forbidden: their role is not among those that may.
    """
    if not access.lets_in(principal.role):
        raise Forbidden(f"This is for {access.value}; {principal.name!r} is a {principal.role.value}.")


def check_scope(principal: Principal, access: Access, scope: Scope, what: str) -> None:
    """Refuse what may not be.

    :param what: the thing, such as ``job '0123'``.
    :raises flame.errors.NotFound: who asks may not see it.
    :raises flame.errors.Forbidden: who asks may see it, and not do this.
    """
    if not may_see(principal, scope):
        raise NotFound(f"There is no {what}.")
    if principal.admin:
        return
    if access is Access.OWNER and principal.name != scope.owner:
        raise Forbidden(f"Only {scope.owner or 'an admin'} and admins may do this to {what}.")
    if access in (Access.WRITE, Access.OFFER) and scope.project not in (None, *principal.projects):
        raise Forbidden(f"Only users of the project {scope.project!r} may do this to {what}.")
