"""A connection that breaks at a bad moment costs a deterministic round nobody, and no round waits for what was lost with it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from syncjob import Job
from test_syncfl import NumpyAggregator, NumpyTrainer, closed_form

STRICT = {"deterministic": True}
RESTART = {"attempts": 1}


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def come_anew(channel, end):
    """The connection of an end ends, and the end is there again at once."""
    member = channel.member(end)
    channel._inbox.on_leave(end, "has broken off")
    channel._inbox.on_join(member)


class LooksWhole(NumpyAggregator):
    """From round 2 on the connection with the last trainer is broken. That shows only when it has been tried twice; then the trainer comes anew."""

    def initialize(self):
        super().initialize()
        self.tried = 0

    def put(self, tag):
        if self._round == 2:
            channel = self.channel(tag)
            self.served, channel._backend.send = channel._backend.send, self.send
        super().put(tag)

    def send(self, channel, group, ends, frames, timeout):
        last = max(self.channel("distribute").all_ends())
        if last not in ends or self.tried == 2:
            return self.served(channel, group, ends, frames, timeout)
        self.tried += 1
        if self.tried == 2:
            come_anew(self.channel("distribute"), last)
        rest = [end for end in ends if end != last]
        return {**self.served(channel, group, rest, frames, timeout), last: "has broken off"}


def test_a_deterministic_round_is_given_again_to_one_whose_broken_connection_looked_whole(job):
    aggregator = job.add(LooksWhole, "aggregator", rounds=3, trainers=3, policy=STRICT, restart=RESTART)
    trainers = [job.add(NumpyTrainer, "trainer", number, policy=STRICT, restart=RESTART) for number in range(3)]
    job.run(30)
    assert aggregator.tried == 2
    assert aggregator.after == pytest.approx(closed_form(range(3), 3))
    assert [number for number, _ in trainers[2].seen] == [1, 2, 3]


class LosesAnUpdate(NumpyAggregator):
    """In round 2 the update of the last trainer is lost with its connection before anybody waits for it, and the trainer is there again."""

    def get(self, tag):
        channel = self.channel(tag)
        if self._round == 2:
            assert channel.wait_until(lambda: len(channel.heard()) == 3, 30)
            last = max(channel.all_ends())
            channel.drain([last])
            come_anew(channel, last)
        super().get(tag)


def test_a_deterministic_round_is_given_again_to_one_whose_update_was_lost_with_its_connection(job):
    aggregator = job.add(LosesAnUpdate, "aggregator", rounds=3, trainers=3, policy=STRICT, restart=RESTART)
    trainers = [job.add(NumpyTrainer, "trainer", number, policy=STRICT, restart=RESTART) for number in range(3)]
    job.run(30)
    assert aggregator.after == pytest.approx(closed_form(range(3), 3))
    assert [number for number, _ in trainers[2].seen] == [1, 2, 2, 3]


def test_any_other_round_goes_on_without_an_update_that_was_lost_with_its_connection(job):
    aggregator = job.add(LosesAnUpdate, "aggregator", rounds=3, trainers=3)
    trainers = [job.add(NumpyTrainer, "trainer", number) for number in range(3)]
    job.run(30)
    first, without = closed_form(range(3), 1)[0], closed_form(range(2), 1)[0]
    assert aggregator.after == pytest.approx([first, first + without, 2 * first + without])
    assert [number for number, _ in trainers[2].seen] == [1, 2, 3]
