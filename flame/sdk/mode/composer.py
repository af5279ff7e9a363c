"""How a role's workflow is put together: tasklets in a chain, loops around parts of it.

A chain is kept as what it is, a list of steps in which a loop is one step that has a list of its own. Surgery
(insert, replace, remove) is then a change of one list and cannot tear the chain, wherever in a loop it happens.
The graph that ``>>`` seems to draw is never kept: ``a >> b`` joins the list that ends in ``a`` with the one that
begins with ``b``.

    with Composer() as composer:
        a, b, c = Tasklet("a", f), Tasklet("b", g), Tasklet("c", h)
    a >> Loop(loop_check_fn=lambda: done)(b >> c)
    composer.run()
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from flame.errors import UsageError

if TYPE_CHECKING:
    from flame.sdk.mode.tasklet import Step, Tasklet


class Chain:
    """Steps in order: the whole workflow, the inside of a loop, or a piece that is not joined to the rest yet.

    :ivar owner: the loop that this is the inside of; None for the whole, or for a piece.
    """

    __slots__ = ("owner", "steps")

    def __init__(self, steps: list[Step], owner: Step | None = None) -> None:
        self.steps = steps
        self.owner = owner
        for step in steps:
            step.chain = self

    def root_of(self) -> Chain:
        """The outermost chain around this one."""
        chain = self
        while chain.owner is not None and chain.owner.chain is not None:
            chain = chain.owner.chain
        return chain

    def tasklets(self) -> Iterator[Tasklet]:
        """All tasklets in order, those in loops included."""
        for step in self.steps:
            yield from step.tasklets()

    def run(self) -> None:
        """Do every step once."""
        for step in tuple(self.steps):
            step.do()

    def insert(self, place: Step, step: Step, *, after: bool) -> None:
        """Put a step beside one that is here."""
        self.steps.insert(self.steps.index(place) + after, step)
        step.chain = self

    def remove(self, step: Step) -> None:
        """Take a step out; a loop with nothing left inside goes with it.

        :raises flame.errors.UsageError: nothing of the workflow would be left.
        """
        if len(self.steps) == 1:
            if self.owner is None or self.owner.chain is None:
                raise UsageError(f"{step} is the only tasklet of the chain and cannot be removed.")
            self.owner.chain.remove(self.owner)
        self.steps.remove(step)
        step.chain = None

    def lines(self, indent: str = "") -> Iterator[str]:
        """The chain as text, a line a tasklet, loops with a rule at their side."""
        for step in self.steps:
            yield from step.lines(indent)


class Composer:
    """A workflow. Tasklets that are made inside ``with Composer() as composer:`` belong to it."""

    def __init__(self) -> None:
        self._made: list[Tasklet] = []
        self._unlinked: dict[str, Tasklet] = {}
        self._outer: list[Composer | None] = []

    def __enter__(self) -> Composer:
        self._outer.append(ComposerContext.get_composer())
        ComposerContext.set_composer(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        ComposerContext.set_composer(self._outer.pop())

    def adopt(self, tasklet: Tasklet) -> None:
        """Take a tasklet as one of this workflow's; done by the tasklet itself."""
        self._made.append(tasklet)

    @property
    def chain(self) -> Chain:
        """The workflow.

        :raises flame.errors.UsageError: there is none yet, or it lies in pieces that were never joined.
        """
        pieces: list[Chain] = []
        for tasklet in self._made:
            piece = tasklet.chain and tasklet.chain.root_of()
            if piece is not None and piece not in pieces:
                pieces.append(piece)
        # A tasklet that was made and never joined with anything is no piece: it was not used.
        joined = [piece for piece in pieces if len(piece.steps) > 1 or piece.steps[0].is_loop] or pieces
        if not joined:
            raise UsageError("This workflow has no tasklets: join some with >> before it is run.")
        if len(joined) > 1:
            parts = " / ".join(" >> ".join(tasklet.alias for tasklet in piece.tasklets()) for piece in joined)
            raise UsageError(f"This workflow lies in {len(joined)} pieces, join them with >>: {parts}.")
        return joined[0]

    @property
    def aliases(self) -> list[str]:
        """The tasklets' aliases in the order of the chain."""
        return [tasklet.alias for tasklet in self.chain.tasklets()]

    def run(self) -> None:
        """Do the tasklets, in order, loops as often as their conditions say. What a tasklet raises ends the run."""
        self.chain.run()

    def get_tasklet(self, alias: str) -> Tasklet:
        """The tasklet of that alias.

        :raises flame.errors.UsageError: there is none; the text lists those that there are.
        """
        for tasklet in self.chain.tasklets():
            if tasklet.alias == alias:
                return tasklet
        raise UsageError(f"There is no tasklet {alias!r}; there are: {', '.join(self.aliases)}.")

    def insert(self, alias: str, tasklet: Tasklet, after: bool = False) -> None:
        """Put a tasklet before (or after) the one of an alias; in a loop it becomes part of the loop."""
        place = self.get_tasklet(alias)
        (place.insert_after if after else place.insert_before)(tasklet)

    def remove_tasklet(self, alias: str) -> None:
        """Take the tasklet of that alias out."""
        self.get_tasklet(alias).remove()

    def unlink(self) -> None:
        """Take the chain apart, to join its tasklets anew: :meth:`tasklet` gives each of them."""
        self._unlinked = {tasklet.alias: tasklet for tasklet in self.chain.tasklets()}
        for tasklet in self._made:
            tasklet.chain = None

    def tasklet(self, alias: str) -> Tasklet:
        """A tasklet of the chain that :meth:`unlink` took apart.

        :raises flame.errors.UsageError: there was none of that alias.
        """
        if alias not in self._unlinked:
            raise UsageError(f"There is no unlinked tasklet {alias!r}; there are: {', '.join(self._unlinked)}.")
        return self._unlinked[alias]

    def print(self) -> None:
        """Print the chain as text."""
        print(self)

    def __str__(self) -> str:
        return "\n".join(self.chain.lines())


class CloneComposer:
    """``with CloneComposer(self.composer) as composer:`` adds tasklets to a workflow that exists already."""

    def __init__(self, composer: Composer) -> None:
        self.composer = composer

    def __enter__(self) -> Composer:
        return self.composer.__enter__()

    def __exit__(self, *details: Any) -> None:
        self.composer.__exit__(*details)


class ComposerContext:
    """The composer whose ``with`` block is open in this thread (several roles may run in one process)."""

    _local = threading.local()

    @classmethod
    def get_composer(cls) -> Composer | None:
        """The composer, or None outside of such a block."""
        return getattr(cls._local, "composer", None)

    @classmethod
    def set_composer(cls, composer: Composer | None) -> None:
        """Make a composer the one of this thread."""
        cls._local.composer = composer

    @classmethod
    def reset_composer(cls) -> None:
        """Leave the block."""
        cls._local.composer = None
