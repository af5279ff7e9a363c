"""The last word to those who wait for more work: that it is done.

Who does not hear it waits for a successor that never comes, and fails the job in the end. So those whose connection was lost a moment
ago, and who are about to dial again, are waited for; and whom it did not reach is told once more when he is back.
"""

from __future__ import annotations

import logging

from flame.sdk.channel import Channel
from flame.sdk.mode.message import MessageType

log = logging.getLogger(__name__)

#: How long an end may take the word that the work is done, in seconds.
FAREWELL_SECONDS = 10.0
#: How long those are waited for who are not there at this moment, in seconds: longer than the pause before a lost peer is dialled again.
LATE_SECONDS = 4.0


def say_done(channel: Channel, expected: int = 0) -> None:
    """Tell all on a channel that the work is done.

    :param expected: how many there should be; one who does not come in time has heard it already, or is given up.
    """
    channel.wait_until(lambda: len(channel.all_ends()) >= expected and not channel.strayed(LATE_SECONDS), LATE_SECONDS)
    before, here = channel.visits(), channel.all_ends()
    failed = _tell(channel, here)
    now = channel.visits()
    lost = {*failed, *channel.strayed(LATE_SECONDS), *(end for end in here if now[end] != before[end])}
    if lost:
        # Come anew: a broken connection may still look whole at this moment.
        channel.wait_until(lambda: not (lost - _come_anew(channel, before)), LATE_SECONDS)
        failed |= dict.fromkeys(lost, "lost its connection")
        again = lost & _come_anew(channel, before)
        failed = {end: why for end, why in failed.items() if end not in again} | _tell(channel, sorted(again))
    for end, reason in failed.items():
        log.info("%s was not told that the work is done: it %s.", end, reason)


def _come_anew(channel: Channel, before: dict[str, int]) -> set[str]:
    return {end for end, number in channel.visits().items() if number > before.get(end, 0) and channel.has(end)}


def _tell(channel: Channel, ends: list[str]) -> dict[str, str]:
    return channel.broadcast({MessageType.EOT: True}, ends, FAREWELL_SECONDS, kind="eot")
