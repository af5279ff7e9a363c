"""Who may do what. Every route of the table is walked by everyone there is, about things of their own and of others."""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

sys.path.insert(0, str(Path(__file__).parent))
import permission_table

from flame.apiserver import app
from flame.apiserver.app import ROUTES
from flame.apiserver.limiter import Limiter
from flame.apiserver.permissions import Access
from flame.apiserver.routes import Query, Route
from flame.client import Client
from flame.controller.keys import Keys
from flame.errors import Conflict, Forbidden, NotFound, SpecError, Unauthorized
from flame.spec import bundle
from flame.spec.nouns import Dataset, DatasetGroups
from flame.spec.people import LOCAL, ProjectForm, TokenForm, UserForm, UserRole
from flame.spec.sessions import Application, SessionForm

#: What stands for each parameter of a path, by resource. A new resource needs a line here: what the test is to ask about.
#: It must belong to the project "red", to uma or, where it may, to pat.
THINGS: dict[str, str] = {
    "bundles": "code",
    "designs": "design",
    "datasets": "dataset",
    "jobs": "job",
    "tasks": "task",
    "users": "user",
    "tokens": "token",
    "projects": "project",
    "computes": "compute",
    "apps": "app",
    "sessions": "session",
    "executors": "task",
}
#: Resources of the server itself: no project hides them. What their handlers look at is tested further down.
OF_ALL = {"bundles", "users", "tokens", "projects", "computes"}
#: Further parameters, which name a part of the thing.
PARTS = {"digest": "0" * 64, "name": "model", "attempt": "1", "round": "1", "invite": "0" * 24}

#: Bodies of routes for workers that take no list; what is wrong with a body is not looked at before the key.
BODIES = {"/v1/tasks/{id}/checkpoints/{round}": {"file": "x", "size": 1}}

YES, NO, HIDDEN, UNKNOWN = 299, 403, 404, 401
#: Who is who: ada is admin; uma (user), vic (viewer), pat and pam (participants) are of "red", ben (user) of "blue". The thing
#: is uma's, or made with the data of pat.
EXPECTED: dict[Access, dict[str, int]] = {
    Access.SIGNED_IN: {"ada": YES, "uma": YES, "vic": YES, "pat": YES, "pam": YES, "ben": YES},
    Access.READ: {"ada": YES, "uma": YES, "vic": YES, "pat": NO, "pam": NO, "ben": HIDDEN},
    Access.SHARED: {"ada": YES, "uma": YES, "vic": YES, "pat": YES, "pam": HIDDEN, "ben": HIDDEN},
    Access.WRITE: {"ada": YES, "uma": YES, "vic": NO, "pat": NO, "pam": NO, "ben": HIDDEN},
    Access.OFFER: {"ada": YES, "uma": YES, "vic": NO, "pat": YES, "pam": YES, "ben": YES},
    Access.OWNER: {"ada": YES, "uma": NO, "vic": NO, "pat": YES, "pam": HIDDEN, "ben": HIDDEN},
    Access.ADMIN: {"ada": YES, "uma": NO, "vic": NO, "pat": NO, "pam": NO, "ben": NO},
}
#: These let in nobody by who they are: what they ask for is a key, or nothing at all.
OTHERWISE = (Access.OPEN, Access.WORKER, Access.INVITED)
STRANGERS = ("nobody", "liar", "revoked", "expired", "worker")
PEOPLE = {
    "ada": (UserRole.ADMIN, "default"),
    "uma": (UserRole.USER, "red"),
    "vic": (UserRole.VIEWER, "red"),
    "pat": (UserRole.PARTICIPANT, "red"),
    "pam": (UserRole.PARTICIPANT, "red"),
    "ben": (UserRole.USER, "blue"),
}


class Anything(Query, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """Whatever the route asks for."""


class World:
    """Two teams on one server, with a job each."""

    def __init__(self, served: Any, make_form: Any) -> None:
        self.served = served
        self.make_form = make_form
        self.tokens: dict[str, str | None] = {"nobody": None, "liar": "flm_" + "x" * 43}
        self.things: dict[str, dict[str, str]] = {}

    async def people(self) -> None:
        accounts = self.served.server.controller.accounts
        self.served.server.api.guard.limiter = Limiter(burst=1_000_000)
        for project in ("red", "blue"):
            await accounts.create_project(ProjectForm(name=project))
        for name, (role, project) in PEOPLE.items():
            made = await accounts.create_user(UserForm(name=name, role=role, projects=[project]))
            self.tokens[name] = made.token.token
        revoked = await accounts.create_token(TokenForm(user="ada"), LOCAL)
        await accounts.revoke(revoked.id, LOCAL)
        expired = await accounts.create_token(TokenForm(user="ada", days=1e-12), LOCAL)
        self.tokens |= {"revoked": revoked.token, "expired": expired.token}

    async def team(self, project: str, code: str, user: str, participant: str) -> None:
        controller = self.served.server.controller
        theirs = await controller.catalog.create_dataset(
            Dataset(name=f"{project} site", url=f"file:///{project}"), project=project, owner=participant
        )
        form = self.make_form(code, trainers=1, name=f"{project} job")
        spec = [DatasetGroups(role="trainer", dataset_groups={"default": [theirs.id, "d0"]})]
        form = msgspec.structs.replace(form, data_spec=spec)
        job = await controller.create_job(form, project=project, owner=user)
        tasks = await controller.tasks(job.id)
        sessions = self.served.server.api.sessions
        application = Application(name=f"{project} app", entry="json:dumps")
        app = await sessions.apps.create(application, project=project, owner=user)
        session = await sessions.register.open(
            SessionForm(application=application), project=project, owner=user, sees=lambda _: True
        )
        self.things[project] = {
            "code": code,
            "dataset": theirs.id,
            "design": job.design_id,
            "job": job.id,
            "task": next(one.id for one in tasks if one.dataset_id == theirs.id),
            "other task": next(one.id for one in tasks if one.owner == user),
            "user": user,
            "token": next(one.id for one in controller.accounts.tokens(LOCAL) if one.user == user),
            "project": project,
            "compute": "local",
            "app": app.id,
            "session": session.id,
        }

    def path(self, route: Route, things: dict[str, str]) -> str:
        names = re.findall(r"{(\w+)}", route.path)
        given = dict(PARTS)
        if route.names_one is not None:
            assert route.tag in THINGS, f"say in THINGS what {route.method} {route.path} is to be asked about"
            given[route.names_one] = things[THINGS[route.tag]]
        assert set(names) <= set(given), f"say in PARTS what is to stand in {route.path}"
        return route.path.format(**{name: given[name] for name in names})

    async def status(self, route: Route, who: str, things: dict[str, str]) -> int:
        headers = {"Authorization": f"Bearer {self.tokens[who]}"} if self.tokens[who] else {}
        url = self.served.url + self.path(route, things)
        known = {field.encode_name for field in msgspec.structs.fields(route.query)}
        query = {name: value for name, value in {"attempt": "1", "offset": "0"}.items() if name in known}
        body = {} if route.body in (None, bytes) else {"json": BODIES.get(route.path, [])}
        async with self.served.http.request(route.method, url, params=query, headers=headers, **body) as response:
            return int(response.status)


async def passed(call: Any) -> web.Response:
    """In place of what a route does, once its caller was let in."""
    return web.Response(status=YES)


@pytest.fixture
async def world(make_server: Any, make_form: Any, make_code: Any) -> AsyncIterator[World]:
    async with make_server() as served:
        one = World(served, make_form)
        digest = await served.client.code.upload(make_code())
        await one.people()
        await one.team("red", digest, "uma", "pat")
        await one.team("blue", digest, "ben", "pat")
        key = Keys.load(served.data_dir / "secret").task(one.things["red"]["task"], 1)
        one.tokens["worker"] = key
        yield one


async def test_every_route_is_for_whom_the_table_says_and_for_nobody_else(
    monkeypatch: pytest.MonkeyPatch, make_server: Any, make_form: Any, make_code: Any
) -> None:
    walked = [
        route
        if route.access in OTHERWISE
        else dataclasses.replace(route, handler=passed, body=None, query=Anything, stream=False)
        for route in ROUTES
    ]
    monkeypatch.setattr(app, "ROUTES", tuple(walked))
    async with make_server() as served:
        one = World(served, make_form)
        data = make_code()
        await served.server.controller.catalog.put_bundle(bundle.digest(data), data)
        await one.people()
        await one.team("red", bundle.digest(data), "uma", "pat")
        one.tokens["worker"] = Keys.load(served.data_dir / "secret").task(one.things["red"]["task"], 1)
        for route in ROUTES:
            await walk(one, route)
        monkeypatch.undo()


async def walk(world: World, route: Route) -> None:
    for who in (*PEOPLE, *STRANGERS):
        status = await world.status(route, who, world.things["red"])
        if route.access is Access.OPEN:
            expected = 200
        elif route.access is Access.WORKER:
            # no user gets in; the worker of a job that was not started knows the key, and is told that it is not its turn
            expected = 403 if who == "worker" else 401
        elif who in STRANGERS or route.access is Access.INVITED:
            expected = UNKNOWN
        else:
            verdict = EXPECTED[route.access][who]
            about_one = route.names_one is not None and route.tag not in OF_ALL
            expected = YES if verdict == HIDDEN and not about_one else verdict
        what = f"{route.method} {route.path} ({route.access.name}) as {who}: {status}, not {expected}"
        assert status == expected, what


def test_a_route_cannot_be_written_without_a_permission() -> None:
    with pytest.raises(TypeError, match="access"):
        Route(method="GET", path="/v1/new", handler=passed, summary="Ask something.")  # type: ignore[call-arg]
    assert {route.access for route in ROUTES} <= {*EXPECTED, *OTHERWISE}


def test_the_page_on_security_says_what_holds() -> None:
    page = permission_table.PAGE.read_text("utf-8")
    hint = "run `python tests/apiserver/permission_table.py`"
    assert permission_table.shown(page) == permission_table.table(), hint


async def test_a_resource_whose_owner_nobody_can_tell_is_not_served(
    monkeypatch: pytest.MonkeyPatch, served: Any
) -> None:
    stray = Route(
        method="GET", path="/v1/strays/{id}", handler=passed, summary="Ask something.", access=Access.READ, answer=bytes
    )
    monkeypatch.setattr(app, "ROUTES", (*ROUTES, stray))
    with pytest.raises(LookupError, match=r"scopes.py to whom strays belong"):
        served.server.api.application()


async def test_lists_show_what_their_reader_may_see(world: World) -> None:
    for who, jobs in (("ada", 2), ("uma", 1), ("vic", 1), ("ben", 1)):
        async with Client(world.served.url, world.tokens[who]) as client:
            found = await client.jobs.list()
            assert len(found) == jobs
            assert len(await client.designs.list()) == jobs
            assert len(await client.datasets.list()) == 2 * jobs
            for noun in ("apps", "sessions"):
                headers = {"Authorization": f"Bearer {world.tokens[who]}"}
                assert len((await world.served.call("GET", f"/v1/{noun}", headers=headers))[1]["items"]) == jobs
            if who != "ada":
                assert {job.project for job in found} == {PEOPLE[who][1]}
    async with Client(world.served.url, world.tokens["pat"]) as pat:
        assert {record.owner for record in await pat.datasets.list()} == {"pat"}
        with pytest.raises(Forbidden, match="'pat' is a participant"):
            await pat.jobs.list()
    async with Client(world.served.url, world.tokens["pam"]) as pam:
        assert await pam.datasets.list() == []


async def test_pages_are_full_however_many_others_things_lie_between(world: World) -> None:
    catalog = world.served.server.controller.catalog
    for i in range(30):
        project = "red" if i % 10 == 0 else "blue"
        await catalog.create_dataset(Dataset(name=f"n{i}", url=f"file:///n{i}"), project=project, owner="uma")
    headers = {"Authorization": f"Bearer {world.tokens['uma']}"}
    seen: list[str] = []
    after = ""
    for _ in itertools.count():
        query = f"?limit=2{after}"
        status, page = await world.served.call("GET", f"/v1/datasets{query}", headers=headers)
        assert status == 200
        seen += [one["id"] for one in page["items"]]
        if page["next"] is None:
            break
        assert len(page["items"]) == 2
        after = f"&after={page['next']}"
    assert len(seen) == len(set(seen)) == 5


async def test_a_participant_sees_the_tasks_on_their_own_data_and_no_others(world: World) -> None:
    things = world.things["red"]
    async with Client(world.served.url, world.tokens["pat"]) as pat:
        assert [task.id for task in await pat.jobs.tasks(things["job"])] == [things["task"]]
        assert (await pat.tasks.get(things["task"])).owner == "pat"
        with pytest.raises(NotFound, match="There is no task"):
            await pat.tasks.get(things["other task"])
        with pytest.raises(Forbidden):
            await pat.jobs.get(things["job"])
    async with Client(world.served.url, world.tokens["pam"]) as pam:
        with pytest.raises(NotFound):
            await pam.jobs.tasks(things["job"])


async def test_code_is_shown_to_who_sees_a_design_or_job_that_has_it(
    world: World, make_code: Any, tmp_path: Path
) -> None:
    async with (
        Client(world.served.url, world.tokens["uma"]) as uma,
        Client(world.served.url, world.tokens["ben"]) as ben,
    ):
        digest = await uma.code.upload(make_code("print('secret recipe')\n"))
        design = await uma.designs.create("recipe")
        await uma._session.call("PUT", f"/v1/designs/{design.id}/code", body={"code": digest})
        assert await uma.code.get(design.id)
        with pytest.raises(NotFound, match="There is no code bundle"):
            await ben._session.call("GET", f"/v1/bundles/{digest}", into=bytes)
        with pytest.raises(NotFound, match="There is no design"):
            await ben.code.get(design.id)


async def test_a_job_uses_what_its_project_has_and_what_is_public(world: World) -> None:
    red, blue = world.things["red"], world.things["blue"]
    form = msgspec.structs.replace(world.make_form(red["code"], trainers=1), datasets=[])
    spec = [DatasetGroups(role="trainer", dataset_groups={"default": [blue["dataset"]]})]
    async with Client(world.served.url, world.tokens["uma"]) as uma:
        with pytest.raises(SpecError, match="unknown dataset"):
            await uma.jobs.create(msgspec.structs.replace(form, data_spec=spec))
        with pytest.raises(SpecError, match="There is no design"):
            inline = {"schema": None, "code": None, "design_id": blue["design"]}
            await uma.jobs.create(msgspec.structs.replace(form, data_spec=spec, **inline))
        catalog = world.served.server.controller.catalog
        record = await catalog.dataset(blue["dataset"])
        await catalog.update_dataset(blue["dataset"], msgspec.structs.replace(record.dataset, is_public=True))
        assert (await uma.jobs.create(msgspec.structs.replace(form, data_spec=spec))).project == "red"


async def test_new_things_go_into_a_project_of_their_maker(world: World) -> None:
    async with Client(world.served.url, world.tokens["uma"], "blue") as stranger:
        with pytest.raises(SpecError, match="no project 'blue' for 'uma'"):
            await stranger.designs.create("mine")
    async with Client(world.served.url, world.tokens["uma"]) as uma:
        made = await uma.designs.create("mine")
        assert (made.project, made.owner) == ("red", "uma")
    async with Client(world.served.url, world.tokens["ada"], "blue") as ada:
        theirs = await ada.designs.create("mine")  # a name is taken in its project alone
        assert (theirs.project, theirs.owner) == ("blue", "ada")
        with pytest.raises(Conflict, match="already"):
            await ada.designs.create("mine")
    async with Client(world.served.url, world.tokens["ada"], "green") as ada:
        with pytest.raises(SpecError, match="no project 'green'"):
            await ada.designs.create("mine")


async def test_the_same_data_of_two_owners_are_two_datasets(world: World) -> None:
    data = Dataset(name="site", url="file:///site")
    ids = []
    for who in ("pat", "pam", "pat"):
        async with Client(world.served.url, world.tokens[who]) as client:
            ids.append((await client.datasets.create(data)).id)
    assert ids[0] == ids[2] != ids[1]
    async with Client(world.served.url, world.tokens["pam"]) as pam:
        with pytest.raises(Conflict, match="belongs to another dataset"):
            await pam.datasets.create(msgspec.structs.replace(data, id=ids[0]))
        with pytest.raises(NotFound):
            await pam.datasets.delete(ids[0])
    async with Client(world.served.url, world.tokens["uma"]) as uma:
        with pytest.raises(Forbidden, match="Only pat and admins"):
            await uma.datasets.delete(ids[0])


async def test_tokens_are_ones_own(world: World) -> None:
    async with (
        Client(world.served.url, world.tokens["uma"]) as uma,
        Client(world.served.url, world.tokens["ada"]) as ada,
    ):
        assert {one.user for one in await uma.tokens.list()} == {"uma"}
        assert {one.user for one in await ada.tokens.list()} == set(PEOPLE)
        with pytest.raises(Forbidden, match="Only an admin"):
            await uma.tokens.create(TokenForm(user="ada"))
        theirs = next(one for one in await ada.tokens.list() if one.user == "ben")
        with pytest.raises(NotFound):
            await uma.tokens.revoke(theirs.id)
        made = await uma.tokens.create(TokenForm(days=1))
        async with Client(world.served.url, made.token) as again:
            assert (await again.whoami()).name == "uma"
            await ada.tokens.revoke(made.id)
            with pytest.raises(Unauthorized, match="was revoked"):
                await again.whoami()


async def test_what_changes_of_a_user_holds_at_once(world: World) -> None:
    async with (
        Client(world.served.url, world.tokens["uma"]) as uma,
        Client(world.served.url, world.tokens["ada"]) as ada,
    ):
        await ada.users.update("uma", role=UserRole.VIEWER)
        with pytest.raises(Forbidden, match="'uma' is a viewer"):
            await uma.designs.create("mine")
        await ada.users.update("uma", projects=["blue"])
        assert {job.project for job in await uma.jobs.list()} == {"blue"}
        await ada.users.delete("uma")
        with pytest.raises(Unauthorized):
            await uma.whoami()


async def test_an_admin_is_left(world: World) -> None:
    async with Client(world.served.url, world.tokens["ada"]) as ada:
        for change in (ada.users.update("ada", role=UserRole.USER), ada.users.delete("ada")):
            with pytest.raises(Conflict, match="last admin"):
                await change
        with pytest.raises(Conflict, match="has 1 jobs, 1 designs, 2 datasets"):
            await ada.projects.delete("blue")
        await ada.projects.create("empty")
        await ada.projects.delete("empty")


async def test_the_first_user_must_be_an_admin_and_closes_the_door(served: Any) -> None:
    with pytest.raises(SpecError, match="must be an admin"):
        await served.client.users.create(UserForm(name="uma"))
    with pytest.raises(SpecError, match="server's own"):
        await served.client.users.create(UserForm(name="operator", role=UserRole.ADMIN))
    made = await served.client.users.create(UserForm(name="ada", role=UserRole.ADMIN))
    with pytest.raises(Unauthorized, match="needs a token"):
        await served.client.users.list()
    async with Client(served.url, made.token.token) as ada:
        assert [user.name for user in await ada.users.list()] == ["ada"]
