"""Waiting until a job's workers are there, for roles that begin with all of them."""

from __future__ import annotations

from flame.errors import RoundFailed
from flame.sdk.channel import Channel
from flame.sdk.mode.role import Role


def await_all(role: Role, channel: Channel, fewest: int | None) -> None:
    """Wait until all that the job has are on a channel, at the longest the policy's ``joinDeadline``.

    :param fewest: how many are enough then, with a warning; None: all are needed.
    :raises flame.errors.RoundFailed: fewer came.
    """
    policy = role.config.policy
    expected = max(role.config.peers.get(channel.name()) or 0, policy.min_trainers)
    here = channel.other_role()
    if role.wait_for_ends(channel, expected, policy.join_deadline):
        return
    there = len(channel.all_ends())
    came = f"{there} of {expected} workers of role {here} came within {policy.join_deadline:g} s (policy.joinDeadline)"
    if there < (expected if fewest is None else fewest):
        raise RoundFailed(f"The work cannot begin: {came}.")
    role.link.warning(f"The work begins without some: {came}.")
