"""No-op rounds of a deployed job (1 KB model) with 2, 10 and 40 trainer processes, beside bare blocking sockets.

The bare round: one process sends 1 KB to each of N others over connected loopback sockets, then receives 1 KB from each.
"""

from __future__ import annotations

import multiprocessing
import pathlib
import socket
import statistics
import tempfile
import time

from benchmarks.jobs import flame_run, no_op_job
from benchmarks.report import Figure, report

BARS = {2: 2, 10: 6, 40: 25}
ROUNDS = 300


def receive(connection: socket.socket, view: memoryview) -> None:
    """Fill ``view`` from a blocking socket."""
    while view:
        view = view[connection.recv_into(view) :]


def echo(port: int) -> None:
    """A bare trainer: receive 1 KB, send 1 KB."""
    buffer = bytearray(1024)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(ROUNDS):
            receive(connection, memoryview(buffer))
            connection.sendall(buffer)


def bare_round(trainers: int) -> float:
    """Median milliseconds of a round over bare blocking sockets."""
    buffer, times = bytearray(1024), []
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        processes = [multiprocessing.Process(target=echo, args=(server.getsockname()[1],)) for _ in range(trainers)]
        for process in processes:
            process.start()
        connections = [server.accept()[0] for _ in processes]
        for connection in connections:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(ROUNDS):
            began = time.perf_counter()
            for connection in connections:
                connection.sendall(buffer)
            for connection in connections:
                receive(connection, memoryview(buffer))
            times.append(1000 * (time.perf_counter() - began))
        for process, connection in zip(processes, connections, strict=True):
            process.join()
            connection.close()
    return statistics.median(times)


def main() -> None:
    """Measure each number of trainers, ours and bare in turn."""
    figures = []
    for trainers, bar in BARS.items():
        with tempfile.TemporaryDirectory() as scratch:
            job = no_op_job(pathlib.Path(scratch) / "job", trainers=trainers, rounds=ROUNDS)
            document = flame_run(job, pathlib.Path(scratch) / "data")
        ours = statistics.median(1000 * entry["seconds"] for entry in document["rounds"][1:])
        bare = bare_round(trainers)
        figures.append(Figure(f"no-op round, {trainers} trainers", ours, "ms", f"<= {bar}"))
        figures.append(Figure(f"no-op round, {trainers} trainers, against bare sockets", ours / bare, "x"))
    report(figures)


if __name__ == "__main__":
    main()
