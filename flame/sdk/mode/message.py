"""The keys of the messages that roles exchange."""

from __future__ import annotations

from enum import Enum


class MessageType(Enum):
    """What an entry of a message is. On the wire a key is its name in lower case.

    The names are those of Flame's library. Entries that only one algorithm or topology uses are said so.
    """

    WEIGHTS = 1  #: the model: named arrays
    EOT = 2  #: end of training: True when the work is done
    DATASET_SIZE = 3  #: how many samples an update stands for
    ROUND = 4  #: the round that a message belongs to
    MEMBER_DIGEST = 5  #: distributed: a digest of all members
    RING_WEIGHTS = 6  #: distributed: a part of the model on its way round the ring
    NEW_TRAINER = 7  #: distributed: a member has arrived
    IS_COMMITTER = 8  #: distributed: who gives the model to a new member
    MODEL_VERSION = 9  #: the round of the global model that an update started from
    STAT_UTILITY = 10  #: Oort: how useful a trainer's data are
    COORDINATED_ENDS = 11  #: coordinated: who works with whom in a round
    DATASAMPLER_METADATA = 12  #: what a datasampler's two sides tell each other
    META_INFO_REQ = 13  #: coordinated: a question about the load
    META_INFO_RES = 14  #: coordinated: its answer
    ALPHA_ADPT = 15  #: FedDyn: the adaptive hyperparameter
    EXTRA = 16  #: further named arrays of an optimizer (control variates ...)
    METADATA = 17  #: further small values beside an update (loss, number of steps ...)
    IDS = 18  #: vertical: keyed hashes of a party's sample ids
    NAME = 19  #: vertical: what a party is called
    ROWS = 20  #: vertical: the samples that a message is about
    STEP = 21  #: vertical: which request it is, or answers
    TRAINING = 22  #: vertical: whether gradients will follow
    ACTIVATIONS = 23  #: vertical: what a party's bottom model makes of its samples
    GRADIENTS = 24  #: vertical: the loss's gradient by those
    QUERY = 25  #: analytics: a question about the sites' data
    ANSWER = 26  #: analytics: its answer, which adds up with the other sites'
    METRICS = 27  #: evaluation: what a site has measured, by name
