"""Messages of 100 MB between processes of one host, beside blocking sockets that do nothing else.

A message counts from the call of ``send`` to the receiver's word that it has all of it and has looked at each page:
for ours, in the arrays that its code gets; for the blocking sockets, in one buffer. The two take turns, so that both see the same machine.
"""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import time
from collections.abc import Iterable
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
REPEATS = 15
MANY = 10
KEY = b"benchmark" * 4
GO, BARE, END = "go", "bare", "end"


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


def receive(index: int, port: int, same_host: bool, bare_port: int, orders: Connection) -> None:
    """A receiver: takes messages, and blocking sends, as it is told."""
    worker = Worker(f"r{index}", "receiver", "sender", port, same_host=same_host)
    worker.channel.await_join(30)
    buffer = memoryview(bytearray(SIZE))
    with socket.create_connection(("127.0.0.1", bare_port)) as bare:
        orders.send("ready")
        while (order := orders.recv()) != END:
            if order == GO:
                message: Any = worker.channel.recv("s", 60)[0]
                assert len(message["weights"]) == TENSORS
                touch(message["weights"].values())
                del message
                worker.channel.send("s", {})
            else:
                view = buffer
                while view:
                    view = view[bare.recv_into(view) :]
                touch([np.frombuffer(buffer, np.float32)])
                bare.sendall(b"k")
    worker.close()


def run(receivers: int, *, same_host: bool) -> tuple[float, float]:
    """Median seconds until all receivers have a message; and of blocking sockets, one after the other."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    weights = {f"layer{i}.weight": np.random.rand(SIZE // TENSORS // 4).astype(np.float32) for i in range(TENSORS)}
    plain = memoryview(bytes(SIZE))
    ours, bare = [], []
    with socket.create_server(("127.0.0.1", 0)) as server:
        orders, processes, sockets = [], [], []
        for index in range(receivers):
            mine, theirs = context.Pipe()
            arguments = (index, port, same_host, server.getsockname()[1], theirs)
            processes.append(context.Process(target=receive, args=arguments))
            processes[-1].start()
            orders.append(mine)
        worker = Worker("s", "sender", "receiver", port, same_host=same_host)
        for order in orders:
            sockets.append(server.accept()[0])
            order.recv()
        worker.channel.wait_until(lambda: len(worker.channel.all_ends()) == receivers, 30)
        for repeat in range(REPEATS + 2):
            for order in orders:
                order.send(GO)
            began = time.perf_counter()
            failed = worker.channel.broadcast({"weights": weights}, timeout=60)
            assert not failed, failed
            for message, _ in worker.channel.recv_fifo(worker.channel.ends(), timeout=60):
                assert message is not None
            if repeat >= 2:  # memory is fresh in the first ones
                ours.append(time.perf_counter() - began)
            for order in orders:
                order.send(BARE)
            began = time.perf_counter()
            for each in sockets:
                each.sendall(plain)
            for each in sockets:
                each.recv(1)
            if repeat >= 2:
                bare.append(time.perf_counter() - began)
        for order in orders:
            order.send(END)
        worker.close()
        for process, each in zip(processes, sockets, strict=True):
            process.join()
            each.close()
    return statistics.median(ours), statistics.median(bare)


def main() -> None:
    """Measure one receiver and many, over TCP and on the same host."""
    tcp, blocking = run(1, same_host=False)
    shared, _ = run(1, same_host=True)
    tcp_many, _ = run(MANY, same_host=False)
    shared_many, _ = run(MANY, same_host=True)
    report(
        [
            Figure("p2p over TCP, 100 MB", blocking / tcp, "x of blocking sockets", ">= 0.6"),
            Figure("same host, 100 MB", tcp / shared, "x of p2p over TCP", ">= 2"),
            Figure(f"same host, 100 MB to {MANY}", tcp_many / shared_many, "x of p2p over TCP"),
            Figure("blocking sockets", SIZE / blocking / 1e9, "GB/s"),
            Figure("p2p over TCP", SIZE / tcp / 1e9, "GB/s"),
            Figure("same host", SIZE / shared / 1e9, "GB/s"),
            Figure(f"same host, to {MANY}", MANY * SIZE / shared_many / 1e9, "GB/s in all"),
        ]
    )


if __name__ == "__main__":
    main()
