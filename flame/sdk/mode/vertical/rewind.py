"""Going back to a round that all parties of a split network can go back to.

The network lies in parts at several parties, which are only worth something together: all must be of the same round. So what a party
has after a round is kept by all of them at once, when the active party says so; and when one of them is replaced, all align anew
and go on behind the newest round that each of them still has. The beginning is a round, too: the last resort.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flame.sdk.checkpoints import State
from flame.sdk.mode.role import Role
from flame.sdk.mode.vertical.split import pytorch
from flame.sdk.weights import as_arrays, get_weights, set_weights

#: How many rounds are held in memory, beside the beginning.
HELD = 2


class PartyLost(Exception):
    """A party has left whose place another one will take."""


class Rewinding(Role):
    """Base of the parties."""

    optimizer: Any = None
    _states: dict[int, State]

    def _state(self) -> State:
        """See :class:`Role`: also the model, and what the local optimizer remembers."""
        state = super()._state()
        state.arrays.update({f"model/{name}": array for name, array in get_weights(self.model).items()})
        if self.optimizer is not None:
            for index, entries in self.optimizer.state_dict()["state"].items():
                for name, value in entries.items():
                    tensor = value if isinstance(value, pytorch().Tensor) else pytorch().tensor(value)
                    state.arrays[f"optimizer/{index}/{name}"] = as_arrays({name: tensor})[name]
        return state

    def _load(self, state: State) -> None:
        super()._load(state)
        set_weights(self.model, state.part("model"))
        if self.optimizer is not None:
            entries: dict[int, dict[str, Any]] = {}
            for key, array in state.part("optimizer").items():
                index, _, name = key.partition("/")
                entries.setdefault(int(index), {})[name] = pytorch().from_numpy(np.array(array))
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": entries, "param_groups": groups})

    def _remember_beginning(self) -> None:
        self._states = {0: self._state().copy()}

    def _available(self) -> list[int]:
        """The rounds that this party can go back to."""
        return sorted({*self._states, *self._kept.rounds()})

    def _keep_state(self, round: int) -> None:
        """All parties keep this round."""
        state = self._state().copy()
        self._states[round] = state
        for old in sorted(self._states)[1:-HELD]:
            del self._states[old]
        self._kept.commit(round, lambda: state)

    def _go_back(self, round: int) -> bool:
        """Be as after a round; False if what was kept of it cannot be read."""
        state = self._states.get(round)
        if state is None:
            found = self._kept.load(before=round + 1)
            if found is None or found[0] != round:
                return False
            state = self._states[round] = found[1]
        self._load(state.copy())
        for later in [each for each in self._states if each > round]:
            del self._states[later]
        return True
