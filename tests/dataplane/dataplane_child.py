"""A trainer in a process of its own: ``dataplane_child.py WHAT END ADDRESS OPTIONS``; started by the tests."""

from __future__ import annotations

import ast
import os
import signal
import sys

import numpy as np

from flame.sdk.backends.base import BackendContext, Member
from flame.sdk.backends.p2p import P2pBackend
from flame.sdk.backends.p2p_stream import Stream
from flame.sdk.backends.rendezvous import TcpRendezvous
from flame.sdk.channel import Channel


def stop_in_mid_message():
    """Have this process stop itself, as SIGSTOP does, once a part of a large message is out."""
    send = Stream.send

    def part(self, buffers, fd=None):
        count = send(self, [memoryview(buffers[0])[:1000], memoryview(buffers[-1])[:1_000_000]], fd)
        os.kill(os.getpid(), signal.SIGSTOP)
        return count

    Stream.send = part


def main():
    what, end, address, options = sys.argv[1:]
    options = ast.literal_eval(options)
    size = options.pop("size", 8)
    rendezvous = TcpRendezvous(address, "job", b"test" * 8, may_host=False)
    me = Member(end=end, role="trainer", dials=True, attempt=options.pop("attempt", 1))
    backend = P2pBackend(BackendContext(job="job", key=b"test" * 8, me=me, rendezvous=rendezvous, options=options))
    channel = Channel("c", backend=backend, job="job", me=me, other_role="aggregator")
    channel.join()
    channel.await_join(60)
    print("joined", flush=True)
    if what == "echo":
        while True:
            message, _ = channel.recv("a", 60)
            if message is None or message.get("end"):
                break
            channel.send("a", dict(message))
            del message
    elif what == "flood":
        for number in range(1000):
            channel.send("a", {"weights": {"w": np.full(size // 8, float(number))}, "n": number})
    elif what == "one":
        channel.send("a", {"weights": {"w": np.ones(size // 8)}})
        print("sent", flush=True)
        sys.stdin.readline()
    elif what == "stall":
        stop_in_mid_message()
        channel.send("a", {"weights": {"w": np.ones(size // 8)}})
    elif what == "fork":
        forked = os.fork()
        if not forked:
            signal.pause()
        print(forked, flush=True)
        signal.pause()
    elif what == "last":
        channel.send("a", {"weights": {"w": np.ones(size // 8)}})
    elif what == "busy":
        # Holds the interpreter's lock in native code: no thread of this process can answer.
        print("busy", flush=True)
        pow(3, options.pop("power", 8_000_000))
        channel.send("a", {"done": True})
    channel.leave()
    backend.close()
    rendezvous.close()


if __name__ == "__main__":
    main()
