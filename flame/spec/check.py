"""What is refused when a job is submitted, each time with one sentence: the place, what is wrong, the mend.

The forms of :mod:`flame.spec.nouns` say what a field may hold; these checks say what fields must be to each
other. Whatever would only show when the workers have started, and hang there, is refused here: a group with
nobody at the other end, a role that nothing connects, code that is not there.

The same checks run where the files are (the places then name the files) and in the server, which knows what
is registered. They only read, and give the form back with the names of algorithms in their usual spelling.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from flame.errors import SpecError
from flame.spec import bundle, known
from flame.spec.nouns import Channel, Dataset, JobForm, ModelSpec, Placement, Role, Schema, Sorted
from flame.spec.places import Places
from flame.spec.quantities import parse_bytes
from flame.spec.shape import describe, listing, suggestion
from flame.spec.topology import association_for, associations, channels_of, groups_of, other_end, uses

#: Hyperparameters that the SDK itself reads: those that count something, and those that are a positive number.
_COUNTS = ("rounds", "epochs", "batchSize", "aggGoal", "concurrency")
_POSITIVE = ("learningRate",)
#: A priority may also be a number, between and beyond those that have names.
_INTEGER = re.compile(r"-?[0-9]{1,9}")


def check_job(
    form: JobForm,
    *,
    schema: Schema | None = None,
    code: Mapping[str, bool] | None = None,
    code_name: str = "the code",
    datasets: Collection[str] = (),
    places: Places | None = None,
) -> JobForm:
    """Check a job with everything that belongs to it.

    :param schema: the design's schema, where the job does not bring one. Where neither is at hand, but the job names a
        registered design, only what the job says for itself is checked.
    :param code: the top-level folders of the code and whether each has a ``main.py`` (:func:`flame.spec.bundle.folders`);
        None when the code is not at hand.
    :param code_name: what to call the code in complaints, such as its file's name.
    :param datasets: the ids of registered datasets, at least of those that the job names.
    :param places: where the job was written.
    :returns: the form with names in their usual spelling.
    :raises flame.errors.SpecError: the first thing that cannot be.
    """
    places = places or Places()
    form = _choices(form, places)
    schema = form.schema or schema
    if schema is None:
        if form.design_id is not None:
            return form
        raise SpecError(
            "the job has no schema: give one, or the designId of a registered design.", places.where() or None
        )
    checked = check_schema(schema, places.under("schema"), data_spec_follows=True)
    if form.schema is not None:
        form = msgspec.structs.replace(form, schema=checked)
    if code is not None:
        bundle.check_roles(dict(code), [role.name for role in checked.roles], code_name)
    for role in form.restart.roles:
        if role not in (names := [one.name for one in checked.roles]):
            where = places.where("restart", "roles", role)
            raise SpecError(f"there is no role {role!r}; {suggestion(role, names, 'the roles')}", where)
    _placement(form, checked, places)
    _data(form, checked, datasets, places)
    _balance(checked, uses(checked, form.data_spec, places.under("schema")), places.under("schema"))
    return form


def check_schema(schema: Schema, places: Places | None = None, *, data_spec_follows: bool = False) -> Schema:
    """Check a schema by itself.

    :param places: where it was written, addressed from the schema's root.
    :param data_spec_follows: leave out whether each group has someone at both ends, because the job's dataSpec decides it.
    :returns: the schema with backends and compressions in their usual spelling.
    :raises flame.errors.SpecError: the first thing that cannot be.
    """
    places = places or Places()
    if not schema.roles:
        raise SpecError("a schema needs at least one role.", places.where("roles"))
    _distinct([role.name for role in schema.roles], "role", places, "roles")
    _distinct([channel.name for channel in schema.channels], "channel", places, "channels")
    roles = {role.name: role for role in schema.roles}
    for index, role in enumerate(schema.roles):
        _role_name(role.name, places.where("roles", index, "name"))
    channels = [_channel(channel, roles, places, index) for index, channel in enumerate(schema.channels)]
    schema = msgspec.structs.replace(schema, channels=channels)
    if not any(role.is_data_consumer for role in schema.roles):
        raise SpecError(
            f"no role consumes data; set isDataConsumer to true for the one that trains ({listing(roles)}).",
            places.where("roles"),
        )
    _connected(schema, places)
    for index, role in enumerate(schema.roles):
        _associations(schema, role, index, places)
    if not data_spec_follows:
        _balance(schema, uses(schema, None, places), places)
    return schema


def _placement(form: JobForm, schema: Schema, places: Places) -> None:
    """Where and with what workers run: of roles that there are, and with amounts of memory."""
    names = [role.name for role in schema.roles]
    for role in form.placement:
        if role not in names:
            where = places.where("placement", role)
            raise SpecError(f"there is no role {role!r}; {suggestion(role, names, 'the roles')}", where)
    said: list[tuple[tuple[str | int, ...], Placement]]
    said = [(("placement", role), placement) for role, placement in form.placement.items()]
    said += [
        (("schema", "roles", at, "placement"), role.placement) for at, role in enumerate(schema.roles) if role.placement
    ]
    for path, placement in said:
        if placement.resources.memory is not None:
            parse_bytes(placement.resources.memory, places.where(*path, "resources", "memory"))


def check_dataset(dataset: Dataset, places: Places | None = None) -> Dataset:
    """Check a dataset by itself: a URL must be there."""
    if not dataset.url.strip():
        raise SpecError("the url of a dataset must not be empty.", (places or Places()).where("url"))
    return dataset


# --- the parts of a schema


def _distinct(names: Sequence[str], noun: str, places: Places, *path: str | int) -> None:
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            raise SpecError(f"two {noun}s are called {name!r}; rename one of them.", places.where(*path, index))
        seen.add(name)


def _role_name(name: str, where: str) -> None:
    # A role's name is the name of its code's folder, here and on every worker.
    if (
        name in (".", "..")
        or name.startswith((".", "-"))
        or any(letter in '/\\:*?"<>|' or letter < " " for letter in name)
    ):
        raise SpecError(
            f"the role's name {name!r} cannot be a folder's name; use letters, digits, dashes and underscores.", where
        )
    if len(name.encode()) > 255:
        raise SpecError("the role's name is too long for a folder's name.", where)


def _channel(channel: Channel, roles: Mapping[str, Role], places: Places, index: int) -> Channel:
    here = ("channels", index)
    if len(channel.pair) != 2:
        raise SpecError(
            f"the pair of channel {channel.name!r} must name two roles (one role twice, for a channel of it with itself); "
            f"it names {len(channel.pair)}.",
            places.where(*here, "pair"),
        )
    for end, role in enumerate(channel.pair):
        if role not in roles:
            raise SpecError(
                f"channel {channel.name!r} names an unknown role {role!r}; {suggestion(role, roles, 'the roles')}",
                places.where(*here, "pair", end),
            )
    if channel.group_by.type not in ("tag", ""):
        raise SpecError(
            f"unknown type {channel.group_by.type!r}; groups are formed by 'tag'.",
            places.where(*here, "groupBy", "type"),
        )
    _distinct(channel.group_by.value, "group", places, *here, "groupBy", "value")
    for role, tags in channel.func_tags.items():
        where = places.where(*here, "funcTags", role)
        if role not in channel.pair:
            raise SpecError(
                f"role {role!r} is not in the pair of channel {channel.name!r}; "
                f"its roles are {listing(dict.fromkeys(channel.pair))}.",
                where,
            )
        for at, tag in enumerate(tags):
            if known.canonical_tag(tag) is None:
                raise SpecError(
                    f"{known.unknown(known.FUNC_TAGS, tag)} A tag of your own begins with {known.OWN_TAG!r}.",
                    places.where(*here, "funcTags", role, at),
                )
    changes: dict[str, Any] = {}
    if channel.backend:
        changes["backend"] = _choice(known.BACKENDS, channel.backend, places.where(*here, "backend"))
    for field, kind in (("selector", known.SELECTORS), ("compression", known.COMPRESSIONS)):
        chosen = getattr(channel, field)
        if chosen is not None:
            name = _choice(kind, chosen.sort, places.where(*here, field, "sort"))
            changes[field] = msgspec.structs.replace(chosen, sort=name)
    return msgspec.structs.replace(channel, **changes) if changes else channel


def _connected(schema: Schema, places: Places) -> None:
    reached: set[str] = set()
    frontier = {schema.roles[0].name}
    while frontier:
        reached |= frontier
        frontier = {other_end(c, role) for role in frontier for c in channels_of(schema, role)} - reached
    apart = [role.name for role in schema.roles if role.name not in reached]
    if apart:
        raise SpecError(
            f"the roles are not connected: no channel leads from {listing(sorted(reached))} to {listing(apart)}; "
            "add a channel with one of each in its pair.",
            places.where("channels"),
        )


def _associations(schema: Schema, role: Role, index: int, places: Places) -> None:
    """Each entry names every channel of the role, none else, with a group that the channel has."""
    channels = {channel.name: channel for channel in channels_of(schema, role.name)}
    everywhere = {channel.name for channel in schema.channels}
    associations(schema, role, places)
    for at, entry in enumerate(role.group_association):
        here = ("roles", index, "groupAssociation", at)
        for name, group in entry.items():
            if name not in channels:
                if name in everywhere:
                    sentence = f"role {role.name!r} is not in the pair of channel {name!r}; remove it here, or add the role there."
                else:
                    sentence = f"unknown channel {name!r}; {suggestion(name, channels, 'the channels of this role')}"
                raise SpecError(sentence, places.where(*here, name))
            groups = groups_of(channels[name])
            if group not in groups:
                raise SpecError(
                    f"channel {name!r} has no group {group!r}; {suggestion(group, groups, 'its groups')}",
                    places.where(*here, name),
                )
        missing = [name for name in channels if name not in entry]
        if missing:
            groups = groups_of(channels[missing[0]])
            choice = f"the group {groups[0]!r}" if len(groups) == 1 else f"one of {listing(groups)}"
            raise SpecError(
                f"role {role.name!r} is in the pair of channel {missing[0]!r}, so the association must name a group of it; "
                f"add {missing[0]!r} with {choice}.",
                places.where(*here),
            )


def _balance(schema: Schema, used: Iterable[tuple[Role, Mapping[str, str], int]], places: Places) -> None:
    """Each group that has workers at one end of a channel has some at the other end."""
    members: dict[tuple[str, str], set[str]] = {}
    for role, association, _ in used:
        for name, group in association.items():
            members.setdefault((name, group), set()).add(role.name)
    data_roles = {role.name for role in schema.roles if role.is_data_consumer}
    for index, channel in enumerate(schema.channels):
        for at, group in enumerate(groups_of(channel)):
            there = members.get((channel.name, group), set())
            alone = [role for role in dict.fromkeys(channel.pair) if role not in there]
            if not there or not alone:
                continue
            if alone[0] in data_roles:
                mend = f"give {alone[0]!r} a dataset in this group, or take the group away from {sorted(there)[0]!r}."
            else:
                mend = f"add a groupAssociation with this group to role {alone[0]!r}."
            raise SpecError(
                f"group {group!r} of channel {channel.name!r} has workers of role {sorted(there)[0]!r} but none of "
                f"role {alone[0]!r} at the other end; {mend}",
                places.where("channels", index, "groupBy", "value", at)
                if channel.group_by.value
                else places.where("channels", index),
            )


# --- the parts of a job


def _data(form: JobForm, schema: Schema, registered: Collection[str], places: Places) -> None:
    brought: dict[str, Dataset] = {}
    for index, dataset in enumerate(form.datasets):
        check_dataset(dataset, places.under("datasets", index))
        if dataset.id is None:
            raise SpecError(
                "a dataset that a job brings needs an id, by which dataSpec refers to it.",
                places.where("datasets", index),
            )
        if dataset.id in brought:
            raise SpecError(
                f"two datasets have the id {dataset.id!r}; rename one of them.", places.where("datasets", index)
            )
        brought[dataset.id] = dataset
    roles = {role.name: role for role in schema.roles}
    _distinct_entries(form, places)
    for index, entry in enumerate(form.data_spec):
        here = ("dataSpec", index)
        role = roles.get(entry.role)
        if role is None:
            raise SpecError(
                f"unknown role {entry.role!r}; {suggestion(entry.role, roles, 'the roles')}",
                places.where(*here, "role"),
            )
        if not role.is_data_consumer:
            raise SpecError(
                f"role {entry.role!r} consumes no data; remove its datasets, or set its isDataConsumer to true.",
                places.where(*here, "role"),
            )
        candidates = associations(schema, role, places.under("schema"))
        named = [("datasetGroups", group) for group in entry.dataset_groups]
        for key, group in [*named, *(("fromUser", group) for group in entry.from_user)]:
            if association_for(candidates, group) is None:
                groups = sorted({value for one in candidates for value in one.values()})
                raise SpecError(
                    f"role {role.name!r} has no groupAssociation with the group {group!r}; "
                    f"{suggestion(group, groups, 'its groups')}",
                    places.where(*here, key, group),
                )
        for group, names in entry.dataset_groups.items():
            for at, name in enumerate(names):
                if name not in brought and name not in registered:
                    raise SpecError(
                        f"unknown dataset {name!r}: it is not registered and the job does not bring it; "
                        f"{suggestion(name, brought, 'the datasets of the job')}",
                        places.where(*here, "datasetGroups", group, at),
                    )
    fed = {entry.role for entry in form.data_spec if entry.groups()}
    for role in schema.roles:
        if role.is_data_consumer and role.name not in fed:
            raise SpecError(
                f"role {role.name!r} consumes data but has no dataset; give it some in dataSpec.",
                places.where("dataSpec"),
            )


def _distinct_entries(form: JobForm, places: Places) -> None:
    named = [entry.role for entry in form.data_spec]
    for index, name in enumerate(named):
        if name in named[:index]:
            raise SpecError(
                f"role {name!r} has two entries; put their groups into one.", places.where("dataSpec", index)
            )


def _choice(kind: known.Kind, name: str, where: str) -> str:
    found = known.canonical(kind, name)
    if found is None:
        raise SpecError(known.unknown(kind, name), where)
    return found


def _choices(form: JobForm, places: Places) -> JobForm:
    """The names that a job chooses, checked and in their usual spelling; the hyperparameters that count something."""
    changes: dict[str, Sorted] = {}
    for field, kind in (
        ("optimizer", known.OPTIMIZERS),
        ("selector", known.SELECTORS),
        ("datasampler", known.DATASAMPLERS),
        ("privacy", known.PRIVACIES),
    ):
        chosen: Sorted = getattr(form.model_spec, field)
        changes[field] = msgspec.structs.replace(
            chosen, sort=_choice(kind, chosen.sort, places.where("modelSpec", field, "sort"))
        )
    model_spec: ModelSpec = msgspec.structs.replace(form.model_spec, **changes)
    for name, value in model_spec.hyperparameters.items():
        where = places.where("modelSpec", "hyperparameters", name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name in _COUNTS and value is not None and not (isinstance(value, int) and number and value >= 1):
            raise SpecError(f"must be a whole number of at least 1, not {describe(value)}.", where)
        if name in _POSITIVE and value is not None and not (number and value > 0):
            raise SpecError(f"must be a number greater than 0, not {describe(value)}.", where)
    brokers = [
        msgspec.structs.replace(
            broker, sort=_choice(known.BACKENDS, broker.sort, places.where("brokers", index, "sort"))
        )
        for index, broker in enumerate(form.brokers)
    ]
    return msgspec.structs.replace(
        form,
        model_spec=model_spec,
        brokers=brokers,
        backend=_choice(known.BACKENDS, form.backend, places.where("backend")),
        priority=form.priority
        if _INTEGER.fullmatch(form.priority)
        else _choice(known.PRIORITIES, form.priority, places.where("priority")),
        registry=msgspec.structs.replace(
            form.registry, sort=_choice(known.REGISTRIES, form.registry.sort, places.where("registry", "sort"))
        ),
    )
