"""Sessions from their client's side, with real executors."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from waiting import until

import flame.sessions
from flame.errors import Conflict, NotFound, SpecError, TaskCancelled, TaskFailed, UsageError

sys.path.insert(0, str(Path(__file__).parent))
import sessionkit


async def test_tasks_are_answered_in_whatever_way_they_are_handed_in(served: Any) -> None:
    async with served.open(sessionkit.square, max_instances=2) as session:
        assert await session.invoke(12) == 144
        future = session.submit(3)
        assert await future == 9
        assert future.id == 2
        assert await asyncio.gather(*session.submit_many(range(500))) == [n * n for n in range(500)]
        assert [answer async for answer in session.map(range(50))] == [n * n for n in range(50)]
        assert sorted([answer async for answer in session.map(range(50), ordered=False)]) == [n * n for n in range(50)]
        futures = session.submit_many(range(20))
        done = [future async for future in session.as_completed(futures)]
        assert {id(future) for future in done} == {id(future) for future in futures}
    record = await served.manager.register.get(session.id)
    assert record.state == "closed"
    assert (record.counts.total, record.counts.succeed) == (622, 622)


async def test_a_failed_task_says_type_message_and_trace_and_the_session_goes_on(served: Any) -> None:
    async with served.open(sessionkit.fail, max_instances=1) as session:
        with pytest.raises(TaskFailed, match="ValueError: no 7") as caught:
            await session.invoke(7)
        assert (caught.value.type, caught.value.reason, caught.value.task) == ("ValueError", "no 7", 1)
        assert "sessionkit.py" in caught.value.trace
        with pytest.raises(TaskFailed, match="no 8"):
            await session.invoke(8)
        (first, second) = await served.manager.tasks.find(session.id, 0, 10)
        assert (first.state, first.failure.message, second.id) == ("failed", "no 7", 2)


async def test_an_application_is_told_when_it_is_bound_and_unbound(served: Any, tmp_path: Path) -> None:
    async with served.open(
        sessionkit.Told, common_data={"x": 1}, arguments={"folder": str(tmp_path), "offset": 5}, max_instances=1
    ) as session:
        answers = await asyncio.gather(*session.submit_many("abc"))
    assert answers == [[n, 1, letter, {"x": 1}, 5] for n, letter in enumerate("abc", 1)]
    told = next(tmp_path.glob("*.told"))
    await until(lambda: told.read_text().splitlines() == ["enter", "task 1", "task 2", "task 3", "leave"])


async def test_arrays_travel_both_ways_and_are_shared_unchanged(served: Any) -> None:
    base = np.arange(100_000, dtype=np.float32)
    async with served.open(sessionkit.Sums, common_data={"base": base}, max_instances=1) as session:
        answer = await session.invoke({"more": np.ones(100_000, np.float32)})
    np.testing.assert_array_equal(answer["sum"], base + 1)
    assert answer["sum"].dtype == np.float32
    assert answer["writeable"] is False


async def test_what_cannot_travel_is_said_when_it_is_handed_in(served: Any) -> None:
    async with served.open(sessionkit.square) as session:
        with pytest.raises(UsageError, match="object"):
            session.submit(object())
    with pytest.raises(UsageError, match="top of a module"):
        served.open(lambda x: x)
    with pytest.raises(UsageError, match="no_such_option"):
        served.open(sessionkit.square, no_such_option=1)
    with pytest.raises(NotFound, match="'nobody'"):
        async with served.open("nobody"):
            pass


async def test_a_failing_task_is_tried_again_as_often_as_it_may(served: Any, tmp_path: Path) -> None:
    async with served.open(sessionkit.fail_until, max_instances=1, retry_budget=3) as session:
        assert await session.invoke(str(tmp_path / "a"), retries=2) == 3
        with pytest.raises(TaskFailed, match="try 2"):  # the budget had one left
            await session.invoke(str(tmp_path / "b"), retries=2)


async def test_a_task_that_runs_too_long_fails_and_the_next_one_runs(served: Any, tmp_path: Path) -> None:
    async with served.open(sessionkit.wait_for, max_instances=1) as session:
        slow = session.submit(str(tmp_path / "never"), timeout=0.3)
        quick = session.submit(str(tmp_path))
        with pytest.raises(TaskFailed, match=r"TimeoutError: The task ran for more than 0\.3 s"):
            await slow
        assert await quick == str(tmp_path)


async def test_what_an_executor_takes_to_be_bound_is_not_counted_as_its_first_tasks_time(served: Any) -> None:
    async with served.open(
        sessionkit.EntersSlowly, arguments={"seconds": 1.0}, max_instances=1, timeout=0.5
    ) as session:
        assert await session.invoke(0.0) == 0.0
        with pytest.raises(TaskFailed, match=r"TimeoutError: The task ran for more than 0\.5 s"):
            await session.invoke(60.0)


async def test_waiting_tasks_can_be_cancelled_and_the_running_one_only_by_force(served: Any, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    async with served.open(sessionkit.wait_for, max_instances=1) as session:
        first, second, third = session.submit_many([str(gate), str(tmp_path), str(tmp_path)])
        await until(lambda: served.manager.register.live(session.id).counts.running == 1)
        assert await session.cancel(first, second) == [second]
        with pytest.raises(TaskCancelled):
            await second
        gate.touch()
        assert await asyncio.gather(first, third) == [str(gate), str(tmp_path)]
        stuck = session.submit(str(tmp_path / "never"))
        await until(lambda: served.manager.register.live(session.id).counts.running == 1)
        assert await session.cancel(stuck, force=True) == [stuck]
        with pytest.raises(TaskCancelled):
            await stuck
        assert await session.invoke(str(tmp_path)) == str(tmp_path)


async def test_a_monitor_sees_how_many_sessions_tasks_and_executors_there_are(served: Any, tmp_path: Path) -> None:
    async def numbers() -> set[str]:
        text = await served.connection.http.call("GET", "/metrics", into=bytes)
        return set(text.decode().splitlines())

    assert {"flame_sessions 0", 'flame_session_tasks{state="running"} 0'} <= await numbers()
    gate = tmp_path / "gate"
    async with served.open(sessionkit.wait_for, max_instances=1) as session:
        assert await session.invoke(str(tmp_path)) == str(tmp_path)
        waiting = session.submit_many([str(gate)] * 3)
        await until(lambda: served.manager.register.live(session.id).counts.running == 1)
        assert {
            "flame_sessions 1",
            'flame_session_tasks{state="succeed"} 1',
            'flame_session_tasks{state="running"} 1',
            'flame_session_tasks{state="pending"} 2',
            'flame_executors{state="bound"} 1',
        } <= await numbers()
        gate.touch()
        await asyncio.gather(*waiting)
    assert {"flame_sessions 0", 'flame_session_tasks{state="succeed"} 0'} <= await numbers()
    await until(lambda: served.manager.numbers().executors["bound"] == 0)


async def test_closing_is_refused_while_a_task_runs_and_cancels_what_waits(served: Any, tmp_path: Path) -> None:
    async with served.open(sessionkit.wait_for, max_instances=1) as session:
        first, second = session.submit_many([str(tmp_path / "gate"), str(tmp_path)])
        await until(lambda: served.manager.register.live(session.id).counts.running == 1)
        with pytest.raises(Conflict, match="runs a task"):
            await session.close()
        await session.close(force=True)
        for future in (first, second):
            with pytest.raises(TaskCancelled):
                await future
        await session.close(force=True)
    assert (await served.manager.register.get(session.id)).counts.cancelled == 2


async def test_opening_an_id_again_gives_the_same_session_or_says_what_differs(served: Any) -> None:
    async with served.open(sessionkit.square, id="mine", weight=2.0, max_instances=1) as session:
        assert await session.invoke(2) == 4
        again = served.open(sessionkit.square, id="mine", weight=2.0, max_instances=1)
        await again.__aenter__()
        assert again.id == "mine"
        future = again.submit(3)
        assert await future == 9
        assert future.id == 2
        await again.leave()
        with pytest.raises(Conflict, match=r"weight is 2\.0, not 3\.0"):
            async with served.open(sessionkit.square, id="mine", weight=3.0, max_instances=1):
                pass
    with pytest.raises(Conflict, match="mine is closed"):
        async with served.open(sessionkit.square, id="mine", weight=2.0, max_instances=1):
            pass
    with pytest.raises(SpecError, match="maxInstances"):
        async with served.open(sessionkit.square, min_instances=3, max_instances=2):
            pass


async def test_a_session_whose_executors_cannot_be_bound_says_why(served: Any) -> None:
    async with served.open(sessionkit.NeverEnters, max_instances=1) as session:
        with pytest.raises(TaskFailed, match="on_session_enter failed: ConnectionError: the database is away"):
            await session.invoke(1)
        record = await served.manager.register.get(session.id)
        assert record.reason is not None
        assert "5 times in a row" in record.reason
        with pytest.raises(TaskFailed, match="SessionFailed"):
            await session.invoke(2)


async def test_an_executor_serves_the_next_session_of_the_same_application(served: Any) -> None:
    async with served.open(sessionkit.pid, max_instances=1) as session:
        first = await session.invoke(0)
    async with served.open(sessionkit.pid, max_instances=1) as session:
        assert await session.invoke(0) == first
    async with served.open(sessionkit.pid, max_instances=1, environment={"X": "1"}) as session:
        assert await session.invoke(0) != first


async def test_an_idle_executor_is_kept_for_the_delay_and_then_let_go(served: Any, find_executors: Any) -> None:
    async with served.open(sessionkit.pid, max_instances=1, delay_release=0.5) as session:
        first = await session.invoke(0)
        assert await session.invoke(0) == first
        await until(lambda: not find_executors())
        assert await session.invoke(0) != first


async def test_the_least_number_of_executors_is_there_without_tasks_and_stays(served: Any) -> None:
    async with served.open(sessionkit.pid, min_instances=2, max_instances=3, delay_release=0.05) as session:
        live = served.manager.register.live(session.id)
        await until(lambda: [one.state for one in live.executors.values()] == ["bound", "bound"])
        pids = {await session.invoke(0) for _ in range(10)}
        await asyncio.sleep(0.2)  # longer than the delay: what should not happen has had its time
        assert len(live.executors) >= 2
        assert pids


async def test_a_lost_executor_loses_no_task_and_one_that_kills_all_is_given_up(served: Any, tmp_path: Path) -> None:
    async with served.open(sessionkit.die, max_instances=1) as session:
        assert await session.invoke(str(tmp_path / "once")) == "alive"
        assert (await served.manager.tasks.find(session.id, 0, 10))[0].attempt == 2
    async with served.open(sessionkit.die_always, max_instances=1) as session:
        with pytest.raises(TaskFailed, match=r"ExecutorLost.*SIGKILL"):
            await session.invoke(0)


async def test_a_group_works_together_or_not_at_all(served: Any, tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")
    async with served.open(sessionkit.wait_for, batch_size=2, max_instances=2) as session:
        live = served.manager.register.live(session.id)
        futures = session.submit_many([gate, gate])
        await until(lambda: live.counts.running == 2)
        Path(gate).touch()
        await asyncio.gather(*futures)
    async with served.open(sessionkit.square, batch_size=5) as session:  # there are four slots
        future = session.submit(1)
        await session.accepted()
        await asyncio.sleep(0.2)  # long enough for it to start what it should not
        assert not served.manager.register.live(session.id).executors
        assert await session.cancel(future) == [future]


async def test_counts_can_be_watched(served: Any) -> None:
    async with served.open(sessionkit.square, max_instances=1) as session:
        futures = session.submit_many(range(100))
        seen = []
        async for counts in session.watch():
            seen.append(counts)
            if counts.succeed == 100:
                break
        assert seen[-1].total == 100
        assert all(one.pending + one.running + one.succeed == one.total for one in seen)
        await asyncio.gather(*futures)


async def test_a_registered_application_is_used_by_its_name(served: Any) -> None:
    _, bundles, _ = flame.sessions.client.describe(sessionkit.square)
    ((digest, data),) = bundles.items()
    await served.client.code.upload(data)
    app = await served.manager.apps.create(
        flame.spec.sessions.Application(name="squares", entry="sessionkit:square", code=digest),
        project="default",
        owner="local",
    )
    async with served.open("squares", max_instances=1) as session:
        assert await session.invoke(5) == 25
    async with served.open(app.id, max_instances=1) as session:
        assert await session.invoke(6) == 36


async def test_a_closed_session_can_be_removed_and_its_code_goes_with_the_last_that_needs_it(served: Any) -> None:
    manager = served.manager
    async with served.open(sessionkit.square, max_instances=1) as session:
        assert await session.invoke(2) == 4
        with pytest.raises(Conflict, match="is open"):
            await manager.register.delete(session.id)
    code = (await manager.register.get(session.id)).code
    app = await manager.apps.create(
        flame.spec.sessions.Application(name="squares", entry="sessionkit:square", code=code),
        project="default",
        owner="local",
    )
    assert await manager.register.sweep(0.0) == []
    assert await manager.register.sweep(1e12) == [session.id]
    with pytest.raises(NotFound):
        await manager.register.get(session.id)
    assert await manager.context.store.recall(f"session/{session.id}") == []
    assert await manager.context.bundles.get(code) is not None
    await manager.register.delete_app(app.id)
    assert await manager.context.bundles.get(code) is None


async def test_a_long_task_among_short_ones_holds_nothing_up(served: Any, tmp_path: Path) -> None:
    here, gate = str(tmp_path), str(tmp_path / "gate")
    async with served.open(sessionkit.wait_for, max_instances=2) as session:
        await asyncio.gather(*session.submit_many([here] * 500))  # short ones: many are given ahead
        long = session.submit(gate)
        short = session.submit_many([here] * 400)
        async with asyncio.timeout(20):
            await asyncio.gather(*short)
        assert not long.done()
        assert served.manager.register.live(session.id).counts.running == 1
        Path(gate).touch()
        assert await long == gate


async def test_sessions_share_by_weight_and_a_late_one_gets_its_share_between_two_tasks(served: Any) -> None:
    async with (
        served.open(sessionkit.nap, weight=1.0) as one,
        served.open(sessionkit.nap, weight=3.0) as three,
        served.open(sessionkit.nap, weight=4.0, priority=1, max_instances=2) as urgent,
    ):

        def held() -> list[int]:
            return [served.manager.register.live(session.id).held for session in (one, three, urgent)]

        futures = one.submit_many([0.01] * 600)
        await until(lambda: held() == [4, 0, 0])
        futures += three.submit_many([0.01] * 600)
        await until(lambda: held() == [1, 3, 0])
        quick = urgent.submit_many([0.01] * 60)
        await until(lambda: held()[2] == 2)
        await asyncio.gather(*quick)
        assert not all(future.done() for future in futures)
        await until(lambda: held()[:2] == [1, 3])
        await asyncio.gather(*futures)
    for session in (one, three, urgent):
        assert (await served.manager.register.get(session.id)).counts.failed == 0
