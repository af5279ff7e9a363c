"""What a schema means: which channels a role has, and which groups of them its workers belong to. Pure.

The expansion, the checks and the drawing all ask the same few questions; the answers are here, once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from flame.errors import SpecError
from flame.spec.nouns import Channel, DatasetGroups, Role, Schema
from flame.spec.places import Places
from flame.spec.shape import listing


def channels_of(schema: Schema, role: str) -> list[Channel]:
    """The channels that a role takes part in, in the schema's order."""
    return [channel for channel in schema.channels if role in channel.pair]


def groups_of(channel: Channel) -> list[str]:
    """The groups of a channel; one that names none has the group ``default``."""
    return channel.group_by.value or ["default"]


def other_end(channel: Channel, role: str) -> str:
    """The role at the other end; a channel of a role with itself has that role at both."""
    return channel.pair[1] if channel.pair[0] == role else channel.pair[0]


def associations(schema: Schema, role: Role, places: Places | None = None) -> list[dict[str, str]]:
    """The places in the topology that a role's workers take: each a mapping of channel to group.

    A role that names none gets the natural one: every channel of it with its only group.

    :param places: where the schema was written, addressed from the schema's root.
    :raises flame.errors.SpecError: it names none, and a channel of it has several groups.
    """
    if role.group_association:
        return role.group_association
    natural: dict[str, str] = {}
    for channel in channels_of(schema, role.name):
        groups = groups_of(channel)
        if len(groups) > 1:
            where = (places or Places()).where("roles", schema.roles.index(role))
            raise SpecError(
                f"role {role.name!r} needs a groupAssociation, because its channel {channel.name!r} "
                f"has several groups: {listing(groups)}.",
                where or None,
            )
        natural[channel.name] = groups[0]
    return [natural]


def association_for(candidates: list[dict[str, str]], group: str) -> dict[str, str] | None:
    """The first association in which any channel has that group as its value; None if there is none."""
    return next((one for one in candidates if group in one.values()), None)


def uses(
    schema: Schema, data_spec: list[DatasetGroups] | None, places: Places | None = None
) -> Iterator[tuple[Role, Mapping[str, str], int]]:
    """Which places are taken by how many workers: ``(role, association, workers)``.

    :param data_spec: which datasets the job uses; None when only the schema is known: then a data-consuming role
        counts as one worker in each of its places.
    """
    for role in sorted(schema.roles, key=lambda one: one.name):
        candidates = associations(schema, role, places)
        if not role.is_data_consumer:
            for association in candidates:
                yield role, association, role.replica
        elif data_spec is None:
            for association in candidates:
                yield role, association, 1
        else:
            for entry in data_spec:
                if entry.role != role.name:
                    continue
                for group in entry.groups():
                    found = association_for(candidates, group)
                    if found is not None:
                        yield role, found, entry.workers(group)
