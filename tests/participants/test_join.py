"""People who bring their own worker and data: invited, agreed, there, away, back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from flame.certificates import make_authority
from flame.spec.records import JobState, TaskState


async def accept(place: Any, job: Any) -> tuple[str, ...]:
    return "--accept-digest", (await place.client.jobs.get(job.id)).code


async def test_a_hybrid_job_trains_with_system_workers_and_participants_one_of_whom_leaves_and_comes_back(
    place: Any,
) -> None:
    job = await place.job(system=2, brought=2, rounds=9, held=(2, 5), min_trainers=3)
    agreed = await accept(place, job)
    invite = await place.client.invites.create(job.id, uses=2)
    job = await place.state(job, JobState.DEPLOYING)
    assert "waits for 1 participant" in job.reason
    assert all(task.attempt == 0 for task in await place.tasks(job)), "nobody is started before"
    stays = place.join(2, invite.token, *agreed)
    goes = place.join(3, invite.token, *agreed)
    await place.until(job, lambda tasks: place.running(tasks) == 5)
    await place.round(job, 1)
    goes.interrupt()
    assert await goes.end() == 130
    assert "You have left" in goes.text
    (away,) = [task for task in await place.tasks(job) if task.participant == "owner 3"]
    assert (away.state, away.attempt) == (TaskState.READY, 1)
    assert "may come back" in away.reason
    place.open(2, 3)
    await place.round(job, 4)
    comes = place.join(3, invite.token, *agreed)
    await comes.says("attempt 2")
    await place.until(job, lambda tasks: place.running(tasks) == 5)
    place.open(5, 4)
    job = await place.client.jobs.wait(job.id)
    assert job.state is JobState.COMPLETED, job.failure
    assert [await stays.end(), await comes.end()] == [0, 0], stays.text + comes.text
    assert "Your part has completed" in stays.text
    steps, counts = await place.steps(job)
    assert counts[2:] == [3, 3, 3, 4, 4, 4, 4], "it takes part again"
    whole, without = (1 + 2 + 4 + 8) / 4, (1 + 2 + 4) / 3
    assert steps[2:] == [pytest.approx(whole if count == 4 else without, abs=1e-4) for count in counts[2:]]


async def test_a_participant_whose_machine_dies_is_missed_by_its_lease_and_comes_back_before_or_after(
    place: Any,
) -> None:
    job = await place.job(system=1, brought=2, rounds=5, held=(2,), min_trainers=2)
    agreed = await accept(place, job)
    invite = await place.client.invites.create(job.id, uses=2)
    stays, dies = (place.join(number, invite.token, *agreed) for number in (1, 2))
    await place.until(job, lambda tasks: place.running(tasks) == 4)
    dies.kill()
    await dies.end()
    again = place.join(2, invite.token, *agreed)  # its lease is not over yet: the earlier attempt is fenced off
    await again.says("attempt 2")
    await place.until(job, lambda tasks: place.running(tasks) == 4)
    place.open(2, 3)
    job = await place.client.jobs.wait(job.id)
    assert job.state is JobState.COMPLETED, job.failure
    assert [await stays.end(), await again.end()] == [0, 0], again.text
    assert (await place.steps(job))[1][2:] == [3, 3, 3]


async def test_participants_outlive_a_server_that_is_killed(place: Any) -> None:
    job = await place.job(system=1, brought=1, rounds=6, held=(2,))
    invite = await place.client.invites.create(job.id)
    joined = place.join(1, invite.token, *(await accept(place, job)))
    await place.until(job, lambda tasks: place.running(tasks) == 3)
    place.server.kill()
    await place.server.start()
    place.open(2, 2)
    job = await place.client.jobs.wait(job.id)
    assert job.state is JobState.COMPLETED, job.failure
    assert await joined.end() == 0, joined.text
    assert [task.attempt for task in await place.tasks(job)] == [1, 1, 1]
    assert (await place.steps(job))[1] == [2] * 6


async def test_a_job_of_participants_alone_waits_for_them_and_a_killed_server_waits_on(place: Any) -> None:
    job = await place.job(system=0, brought=2, rounds=3, start=False)
    agreed = await accept(place, job)
    first, second = [await place.client.invites.create(job.id) for _ in range(2)]
    early = place.join(1, first.token, *agreed)
    await early.says("job digits: ready")
    await place.client.jobs.start(job.id)
    await early.says("attempt 1")
    place.server.kill()
    await place.server.start()
    found = await place.client.jobs.get(job.id)
    assert (found.state, "waits for 1 participant" in (found.reason or "")) == (JobState.DEPLOYING, True)
    late = place.join(2, second.token, *agreed)
    job = await place.client.jobs.wait(job.id)
    assert job.state is JobState.COMPLETED, job.failure
    assert [await early.end(), await late.end()] == [0, 0], early.text + late.text
    assert (await place.steps(job))[1] == [2, 2, 2]


async def test_a_stopped_job_sends_its_participants_home_with_the_news(place: Any) -> None:
    job = await place.job(system=1, brought=1, rounds=6, held=(2,))
    invite = await place.client.invites.create(job.id)
    joined = place.join(1, invite.token, *(await accept(place, job)))
    await place.until(job, lambda tasks: place.running(tasks) == 3)
    await place.client.jobs.stop(job.id)
    job = await place.client.jobs.wait(job.id)
    assert job.state is JobState.TERMINATED
    assert await joined.end() == 1
    assert "job digits: terminated" in joined.text


async def test_an_invite_that_is_taken_back_ends_the_worker_and_frees_the_place(place: Any) -> None:
    job = await place.job(system=1, brought=1, rounds=5, held=(2,), min_trainers=2)
    agreed = await accept(place, job)
    invite = await place.client.invites.create(job.id)
    joined = place.join(1, invite.token, *agreed)
    await place.until(job, lambda tasks: place.running(tasks) == 3)
    await place.client.invites.revoke(job.id, invite.id)
    assert await joined.end() == 1
    assert "was taken back" in joined.text
    (task,) = [task for task in await place.tasks(job) if task.config.from_user]
    assert (task.state, task.participant) == (TaskState.READY, None)
    other = place.join(2, (await place.client.invites.create(job.id)).token, *agreed)
    await place.until(job, lambda tasks: place.running(tasks) == 3)
    place.open(2, 2)
    assert (await place.client.jobs.wait(job.id)).state is JobState.COMPLETED
    assert await other.end() == 0
    steps, _ = await place.steps(job)
    assert steps[2:] == [pytest.approx((1 + 4) / 2)] * 3


def give(place: Any, number: int, *files: str) -> Path:
    """Copy certificates into a participant's own folder."""
    folder: Path = place.folder / f"owner{number}"
    folder.mkdir(exist_ok=True)
    for file in files:
        shutil.copy(place.folder / "certs" / file, folder)
    return folder


async def test_over_tls_a_participant_trusts_the_authority_it_was_given_and_shows_its_certificate(secure: Any) -> None:
    """With the files in the folder where the command is run; its worker runs in another one."""
    job = await secure.job(system=1, brought=1, rounds=3)
    agreed = await accept(secure, job)
    invite = await secure.client.invites.create(job.id)
    assert secure.server.url.startswith("https://")
    give(secure, 1, "ca.pem", "site.pem", "site-key.pem")
    shown = {"FLAME_TLS_CERT": "site.pem", "FLAME_TLS_KEY": "site-key.pem"}
    joined = secure.join(1, invite.token, *agreed, "--ca", "ca.pem", env=shown)
    assert await joined.end() == 0, joined.text
    assert "Your part has completed" in joined.text
    job = await secure.client.jobs.wait(job.id)
    assert job.state is JobState.COMPLETED, job.failure
    steps, counts = await secure.steps(job)
    assert (counts, steps) == ([2, 2, 2], [pytest.approx((1 + 2) / 2)] * 3)


async def test_over_tls_who_lacks_a_certificate_is_told_so_in_a_sentence_and_does_not_try_again(secure: Any) -> None:
    job = await secure.job(system=1, brought=1, rounds=1)
    agreed = await accept(secure, job)
    invite = await secure.client.invites.create(job.id)
    other = make_authority("somebody else", 1)
    give(secure, 3)
    (secure.folder / "owner3" / "other.pem").write_text(other.certificate)
    for number, words, sentence in (
        (1, (), "is not trusted"),
        (3, ("--ca", "other.pem"), "is not trusted"),
        (4, ("--ca", "nothing.pem"), "cannot be used"),
        (5, ("--ca", str(secure.folder / "certs" / "ca.pem")), "must show a certificate"),
    ):
        joined = secure.join(number, invite.token, *agreed, *words)
        assert await joined.end() in (1, 2, 3), joined.text
        assert sentence in joined.text
        assert "Traceback" not in joined.text
        assert len(joined.text.splitlines()) <= 2, joined.text
    assert [task.attempt for task in await secure.tasks(job) if task.config.from_user] == [0]


async def test_nothing_runs_before_the_owner_has_agreed_to_the_code(place: Any) -> None:
    job = await place.job(system=1, brought=1, rounds=1)
    invite = await place.client.invites.create(job.id)
    digest = (await place.client.jobs.get(job.id)).code
    looks = place.join(1, invite.token, "--inspect", "--unpack", "code", "-o", "json")
    assert await looks.end() == 0
    assert digest in looks.text
    assert "aggregator" not in looks.text, "only what would run here"
    assert (looks.folder / "code" / "trainer" / "main.py").read_text().startswith("\nimport os")
    silent = place.join(1, invite.token)
    assert await silent.end() == 2
    assert f"--accept-digest {digest}" in silent.text
    other = place.join(1, invite.token, "--accept-digest", "0" * 64)
    assert await other.end() == 2
    assert "nothing was run" in other.text
    nowhere = place.join(1, invite.token, "--accept-digest", digest, "--dataset", "nothing/there")
    assert await nowhere.end() == 2
    assert "no dataset" in nowhere.text
    assert [task.attempt for task in await place.tasks(job) if task.config.from_user] == [0]
    assert not (looks.folder / "work").exists()


async def test_the_server_is_not_told_where_a_participant_s_data_are(place: Any) -> None:
    job = await place.job(system=0, brought=1, rounds=1)
    invite = await place.client.invites.create(job.id)
    joined = place.join(1, invite.token, *(await accept(place, job)), "--realm", "default/attic")
    assert (await place.client.jobs.wait(job.id)).state is JobState.COMPLETED
    assert await joined.end() == 0
    path = str(joined.folder / "data").encode()
    for file in place.server.data_dir.rglob("*"):
        if file.is_file():
            assert path not in file.read_bytes(), file
            assert invite.token.encode() not in file.read_bytes(), file
