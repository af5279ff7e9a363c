"""The aggregator of hybrid learning: it hears one update of each group, which stands for all of the group.

To it all trainers are alike: it gives the model to each, and each answers. But a trainer that is no delegate answers without weights,
and a delegate's update says for how many trainers it stands, so ``minTrainers`` counts trainers. Along with the model goes who
else has been given it, so that nobody in a group waits for one that was not. When a delegate dies with its group's
update, the round goes on without the group; where it cannot, it is given to the group anew, which then has another delegate.
"""

from __future__ import annotations

from flame.sdk.channel import Channel
from flame.sdk.codec import Message
from flame.sdk.mode.horizontal.syncfl.rounds import Tally
from flame.sdk.mode.horizontal.syncfl.top_aggregator import TAG_AGGREGATE, TAG_DISTRIBUTE
from flame.sdk.mode.horizontal.syncfl.top_aggregator import TopAggregator as SyncTopAggregator
from flame.sdk.mode.message import MessageType

#: Who speaks for a trainer that answers without weights: in its answer, and as its end's property.
TOLD_DELEGATE = PROP_DELEGATE = "delegate"

__all__ = ["TAG_AGGREGATE", "TAG_DISTRIBUTE", "TopAggregator"]


class TopAggregator(SyncTopAggregator):
    """Aggregates the groups' models and ends the job. See :class:`flame.sdk.mode.horizontal.syncfl.top_aggregator.TopAggregator`."""

    def internal_init(self) -> None:
        """See :class:`Role`; also says what a deterministic job cannot have here."""
        super().internal_init()
        if self._strict:
            self.link.warning(
                "A group closes its ring without a trainer that is lost in a round: policy.deterministic makes undisturbed runs of a hybrid "
                "job equal, but not disturbed ones."
            )

    def _may_return(self, channel: Channel) -> bool:
        """See :class:`RoundAggregator`: no, as the group has closed its ring without the one that has left."""
        return False

    def _give(self, channel: Channel, ends: list[str], patience: float = 0.0) -> None:
        members = {end: channel.member(end) for end in ends}
        assert self._outgoing is not None
        self._outgoing[MessageType.COORDINATED_ENDS] = {
            end: member.attempt for end, member in members.items() if member is not None
        }
        super()._give(channel, ends, patience)
        # A group's update may be the last to come: nobody's answer can be done without.
        self._tally.target = self._tally.answered + len(self._tally.pending)

    def _note(self, channel: Channel, end: str, message: Message) -> None:
        super()._note(channel, end, message)
        told = message.get(MessageType.METADATA) or {}
        channel.set_end_property(end, PROP_DELEGATE, told.get(TOLD_DELEGATE))

    def _recruit(self, channel: Channel, tally: Tally, least: int, patience: float) -> bool:
        """Too few updates: first of all those are asked again whose delegate has not answered for them."""
        heard = {*tally.folded, *tally.asked_again}
        orphans = [
            end
            for end in tally.empty
            if channel.has(end) and end not in heard and channel.get_end_property(end, PROP_DELEGATE) not in heard
        ]
        tally.folded += [end for end in tally.empty if end not in orphans]
        tally.empty = []
        if orphans:
            tally.asked_again.update(orphans)
            self._give(channel, orphans)
            return True
        return super()._recruit(channel, tally, least, patience)
