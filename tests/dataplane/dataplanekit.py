"""Workers for the tests of the data plane: in this process, and in processes of their own."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading

from flame.sdk.backends.base import BackendContext, Member
from flame.sdk.backends.p2p import P2pBackend
from flame.sdk.channel import Channel

KEY = b"test" * 8
CHILD = pathlib.Path(__file__).with_name("dataplane_child.py")


class Meeting:
    """A rendezvous in memory; one seat per worker."""

    def __init__(self):
        self.lock = threading.RLock()
        self.rooms = {}

    def seat(self):
        return Seat(self)


class Seat:
    def __init__(self, meeting):
        self.meeting = meeting
        self.mine = {}

    def join(self, channel, group, me, on_change):
        with self.meeting.lock:
            room = self.meeting.rooms.setdefault((channel, group), {})
            room[me.end] = (me, on_change)
            self.mine[channel, group] = me
            on_change([member for end, (member, _) in room.items() if end != me.end], [])
            for end, (_, tell) in list(room.items()):
                if end != me.end:
                    tell([me], [])

    def leave(self, channel, group):
        with self.meeting.lock:
            me = self.mine.pop((channel, group), None)
            room = self.meeting.rooms.get((channel, group), {})
            if me is None or room.get(me.end, (None,))[0] is not me:
                return
            del room[me.end]
            for _, tell in list(room.values()):
                tell([], [me.end])

    def close(self):
        for channel, group in list(self.mine):
            self.leave(channel, group)


class Worker:
    """A worker with one channel over p2p."""

    def __init__(self, end, role, other, rendezvous, *, dials, attempt=1, key=KEY, job="job", window=None, **options):
        self.rendezvous = rendezvous
        me = Member(end=end, role=role, dials=dials, attempt=attempt)
        context = BackendContext(job=job, key=key, me=me, rendezvous=rendezvous, options=options)
        self.backend = P2pBackend(context)
        more = {} if window is None else {"window": window}
        self.channel = Channel("c", backend=self.backend, job=job, me=me, other_role=other, **more)
        self.channel.join()

    @property
    def room(self):
        return self.backend._rooms["c", "default"]

    def connection(self, end):
        return self.room.connections[end]

    def tcp_port(self):
        return int(self.backend.me.addresses[-1].rpartition(":")[2])

    def close(self):
        self.channel.leave()
        self.backend.close()
        self.rendezvous.close()


class Child:
    """A worker in a process of its own, see dataplane_child.py."""

    def __init__(self, what, end, address, **options):
        self.process = subprocess.Popen(
            [*options.pop("prefix", ()), sys.executable, str(CHILD), what, end, address, repr(options)],
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
        )

    def says(self, word):
        assert self.process.stdout.readline().strip() == word

    def signal(self, number):
        self.process.send_signal(number)

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGCONT)
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.process.stdin.close()
