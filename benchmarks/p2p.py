"""Messages of 100 MB between processes of one host, beside blocking sockets that do nothing else.

A message counts from the call of ``send`` to the receiver's word that it has all of it and has looked at each page:
for ours, in the arrays that its code gets; for the blocking sockets, in one buffer. The kinds take turns in the same
processes, and what is compared is one with the next, so that all see the same machine.
"""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import time
from collections.abc import Iterable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.report import Figure, report
from flame.sdk.backends.base import BackendContext, Member
from flame.sdk.backends.p2p import P2pBackend
from flame.sdk.backends.rendezvous import TcpRendezvous
from flame.sdk.channel import Channel

SIZE = 100_000_000
TENSORS = 162
REPEATS = 24
MANY = 10
KEY = b"benchmark" * 4
TCP, SHARED, BARE, END = "tcp", "shared", "bare", "end"


class Worker:
    """A worker with one channel, met at ``port``."""

    def __init__(self, end: str, role: str, other: str, port: int, *, same_host: bool) -> None:
        self.rendezvous = TcpRendezvous(f"127.0.0.1:{port}", "benchmark", KEY)
        me = Member(end=end, role=role, dials=role == "receiver")
        self.backend = P2pBackend(
            BackendContext(
                job="benchmark", key=KEY, me=me, rendezvous=self.rendezvous, options={"same_host": same_host}
            )
        )
        self.channel = Channel("c", backend=self.backend, job="benchmark", me=me, other_role=other)
        self.channel.join()

    def close(self) -> None:
        """Leave."""
        self.channel.leave()
        self.backend.close()
        self.rendezvous.close()


def touch(arrays: Iterable[npt.NDArray[np.float32]]) -> float:
    """Look at each page, so that memory that is only promised does not count as delivered."""
    return float(sum(array[::1024].sum() for array in arrays))


def receive(index: int, ports: tuple[int, int], bare_port: int, orders: Connection) -> None:
    """A receiver: takes messages over TCP, through shared memory and from a blocking socket, as it is told."""
    workers = {
        TCP: Worker(f"r{index}", "receiver", "sender", ports[0], same_host=False),
        SHARED: Worker(f"r{index}", "receiver", "sender", ports[1], same_host=True),
    }
    for worker in workers.values():
        worker.channel.await_join(30)
    buffer = memoryview(bytearray(SIZE))
    with socket.create_connection(("127.0.0.1", bare_port)) as bare:
        orders.send("ready")
        while (order := orders.recv()) != END:
            if order == BARE:
                view = buffer
                while view:
                    view = view[bare.recv_into(view) :]
                touch([np.frombuffer(buffer, np.float32)])
                bare.sendall(b"k")
            else:
                channel = workers[order].channel
                message: Any = channel.recv("s", 60)[0]
                assert len(message["weights"]) == TENSORS
                touch(message["weights"].values())
                del message
                channel.send("s", {})
    for worker in workers.values():
        worker.close()


def free_port() -> int:
    """A port on which nobody listens now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def send(channel: Channel, weights: Mapping[str, Any]) -> None:
    """To all receivers; returns when all have it."""
    failed = channel.broadcast({"weights": weights}, timeout=60)
    assert not failed, failed
    for message, _ in channel.recv_fifo(channel.ends(), timeout=60):
        assert message is not None


def send_bare(sockets: list[socket.socket], data: memoryview) -> None:
    """The same with blocking sockets, one after the other."""
    for each in sockets:
        each.sendall(data)
    for each in sockets:
        each.recv(1)


def run(receivers: int, repeats: int) -> dict[str, list[float]]:
    """Seconds until all receivers have a message, by kind, in the order of the repeats."""
    context = multiprocessing.get_context("spawn")
    weights = {f"layer{i}.weight": np.random.rand(SIZE // TENSORS // 4).astype(np.float32) for i in range(TENSORS)}
    plain = memoryview(bytes(SIZE))
    times: dict[str, list[float]] = {BARE: [], TCP: [], SHARED: []}
    ports = free_port(), free_port()
    orders, processes, sockets = [], [], []
    with socket.create_server(("127.0.0.1", 0)) as server:
        for index in range(receivers):
            mine, theirs = context.Pipe()
            processes.append(context.Process(target=receive, args=(index, ports, server.getsockname()[1], theirs)))
            processes[-1].start()
            orders.append(mine)
        workers = {
            TCP: Worker("s", "sender", "receiver", ports[0], same_host=False),
            SHARED: Worker("s", "sender", "receiver", ports[1], same_host=True),
        }
        for order in orders:
            sockets.append(server.accept()[0])
            order.recv()
    channels = {kind: worker.channel for kind, worker in workers.items()}
    for channel in channels.values():
        channel.wait_until(lambda channel=channel: len(channel.all_ends()) == receivers, 30)
    for repeat in range(repeats + 2):
        for kind, taken in times.items():
            for order in orders:
                order.send(kind)
            began = time.perf_counter()
            if kind == BARE:
                send_bare(sockets, plain)
            else:
                send(channels[kind], weights)
            if repeat >= 2:  # memory is fresh in the first ones
                taken.append(time.perf_counter() - began)
    for order in orders:
        order.send(END)
    for worker in workers.values():
        worker.close()
    for process, each in zip(processes, sockets, strict=True):
        process.join()
        each.close()
    return times


def paired(times: dict[str, list[float]], slow: str, quick: str) -> float:
    """Median of how many times longer ``slow`` took than ``quick`` right after or before it."""
    return statistics.median(a / b for a, b in zip(times[slow], times[quick], strict=True))


def main() -> None:
    """Measure one receiver and many."""
    one, many = run(1, REPEATS), run(MANY, REPEATS // 4)
    rate = {kind: SIZE / statistics.median(taken) / 1e9 for kind, taken in one.items()}
    report(
        [
            Figure("p2p over TCP, 100 MB", paired(one, BARE, TCP), "x of blocking sockets", ">= 0.6"),
            Figure("same host, 100 MB", paired(one, TCP, SHARED), "x of p2p over TCP", ">= 2"),
            Figure(f"same host, 100 MB to {MANY}", paired(many, TCP, SHARED), "x of p2p over TCP"),
            Figure("blocking sockets", rate[BARE], "GB/s"),
            Figure("p2p over TCP", rate[TCP], "GB/s"),
            Figure("same host", rate[SHARED], "GB/s"),
            Figure(f"same host, to {MANY}", MANY * SIZE / statistics.median(many[SHARED]) / 1e9, "GB/s in all"),
        ]
    )


if __name__ == "__main__":
    main()
