"""The steps of a workflow: a tasklet, which calls a function, and a loop around some steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

from flame.errors import UsageError
from flame.sdk.mode.composer import Chain, ComposerContext

S = TypeVar("S", bound="Step")


class Step:
    """What can stand in a chain."""

    is_loop = False
    chain: Chain | None = None

    def piece(self) -> Chain:
        """The chain that this is in; a new one where it stands alone."""
        return self.chain or Chain([self])

    def __rshift__(self, other: S) -> S:
        """``a >> b``: ``b`` follows ``a``. Gives ``b``.

        :raises flame.errors.UsageError: ``a`` is followed, or ``b`` is preceded, by something else already.
        """
        if not isinstance(other, Step):
            return NotImplemented
        left, right = self.piece(), other.piece()
        if left.root_of() is right.root_of():
            raise UsageError(f"{self} >> {other} would make a circle: both are in the same chain. Use Loop to repeat.")
        if left.steps[-1] is not self or left.owner is not None:
            raise UsageError(f"{self} >> {other}: something follows {self} already. Use insert_after.")
        if right.steps[0] is not other or right.owner is not None:
            raise UsageError(f"{self} >> {other}: something precedes {other} already. Use insert_before.")
        known = {tasklet.alias for tasklet in left.tasklets()}
        for tasklet in right.tasklets():
            tasklet.settle_alias(known)
        Chain(left.steps + right.steps)
        return other

    def do(self) -> None:
        """Do this step."""
        raise NotImplementedError

    def tasklets(self) -> Iterator[Tasklet]:
        """The tasklets in this step."""
        raise NotImplementedError

    def lines(self, indent: str) -> Iterator[str]:
        """This step as text."""
        raise NotImplementedError

    def is_continue(self) -> bool:
        """Whether the loop around this step shall begin anew now."""
        return False


class Tasklet(Step):
    """A named unit of work.

    :param alias: its name, unique in a workflow. Flame's older form without one (``Tasklet(self.train)``) takes the function's.
    :param func: what it calls, with the further arguments.
    :raises flame.errors.UsageError: ``func`` cannot be called.
    """

    def __init__(self, alias: str | Callable[..., Any], func: Any = None, *args: Any, **kwargs: Any) -> None:
        self.named = isinstance(alias, str) and alias != ""
        if callable(alias):
            args = args if func is None else (func, *args)
            func = alias
        if not callable(func):
            raise UsageError(f"Tasklet({alias!r}, {func!r}): the second argument must be a function.")
        self.alias: str = alias if isinstance(alias, str) and alias else getattr(func, "__name__", "tasklet")
        self.func: Callable[..., Any] = func
        self.args = args
        self.kwargs = kwargs
        self.cont_fn: Callable[[], bool] | None = None
        self.composer = ComposerContext.get_composer()
        if self.composer is not None:
            self.composer.adopt(self)

    def __str__(self) -> str:
        return f"'{self.alias}'"

    def __repr__(self) -> str:
        return f"Tasklet({self.alias!r})"

    #: Told the name of each tasklet before it is done, and with a plus behind it afterwards. For trials, see :mod:`flame.sdk.chaospoints`.
    watch: ClassVar[Callable[[str], None] | None] = None

    def do(self) -> None:
        """Call the function."""
        if Tasklet.watch is None:
            self.func(*self.args, **self.kwargs)
        else:
            Tasklet.watch(self.alias)
            self.func(*self.args, **self.kwargs)
            Tasklet.watch(f"{self.alias}+")

    def tasklets(self) -> Iterator[Tasklet]:
        """Itself."""
        yield self

    def lines(self, indent: str) -> Iterator[str]:
        """Its alias."""
        yield indent + self.alias

    def set_continue_fn(self, cont_fn: Callable[[], bool]) -> None:
        """After this tasklet, begin its loop anew when ``cont_fn()`` is true and the loop is not done."""
        self.cont_fn = cont_fn

    def is_continue(self) -> bool:
        """Whether the loop around this tasklet shall begin anew now."""
        return self.cont_fn is not None and self.cont_fn()

    def get_composer(self) -> Any:
        """The composer that this tasklet belongs to."""
        return self.composer

    def insert_before(self, tasklet: Tasklet) -> None:
        """Put a new tasklet directly before this one; before a loop's first one it becomes the loop's first.

        :raises flame.errors.UsageError: this one is in no chain, or the new one is in one already, or its alias is taken.
        """
        self._place(tasklet).insert(self, tasklet, after=False)

    def insert_after(self, tasklet: Tasklet) -> None:
        """Put a new tasklet directly after this one; after a loop's last one it becomes the loop's last."""
        self._place(tasklet).insert(self, tasklet, after=True)

    def replace_with(self, tasklet: Tasklet) -> None:
        """Put a new tasklet in this one's place; the condition of :meth:`set_continue_fn` stays unless it has its own."""
        chain = self._place(tasklet, leaving=self)
        tasklet.cont_fn = tasklet.cont_fn or self.cont_fn
        chain.insert(self, tasklet, after=False)
        chain.remove(self)

    def remove(self) -> None:
        """Take this tasklet out of its chain; a loop that it was alone in goes too.

        :raises flame.errors.UsageError: it is in no chain, or the only one.
        """
        self._home().remove(self)

    def settle_alias(self, known: set[str]) -> None:
        """Make the alias one of a chain's: a name that the user gave must be new, one taken from a function is numbered."""
        if self.alias in known and self.named:
            raise UsageError(f"There are two tasklets named {self}: an alias must be unique in a workflow.")
        alias, count = self.alias, 1
        while self.alias in known:
            count += 1
            self.alias = f"{alias}_{count}"
        known.add(self.alias)

    def _home(self) -> Chain:
        if self.chain is None:
            raise UsageError(f"{self} is in no chain (any more).")
        return self.chain

    def _place(self, tasklet: Tasklet, leaving: Tasklet | None = None) -> Chain:
        """This tasklet's chain, after looking at what is to come into it."""
        chain = self._home()
        if tasklet.chain is not None:
            raise UsageError(f"{tasklet} is in a chain already and cannot be put beside {self}.")
        tasklet.settle_alias({other.alias for other in chain.root_of().tasklets() if other is not leaving})
        if tasklet.composer is None and self.composer is not None:
            tasklet.composer = self.composer
            tasklet.composer.adopt(tasklet)
        return chain


class Block(Step):
    """Steps that are repeated until a condition holds. Made by :class:`Loop`."""

    is_loop = True

    def __init__(self, inside: Chain, done: Callable[[], bool], skip: Callable[[], bool] | None = None) -> None:
        self.inside = Chain(inside.steps, owner=self)
        self.done = done
        self.skip = skip
        Chain([self])

    def __str__(self) -> str:
        return f"loop({' >> '.join(tasklet.alias for tasklet in self.inside.tasklets())})"

    def do(self) -> None:
        """Repeat. The condition is looked at after each step, so that a loop can end in its middle."""
        done = self.done
        if self.skip is not None and self.skip():
            return
        while True:
            for step in tuple(self.inside.steps):
                step.do()
                if done():
                    return
                if step.is_continue():
                    break

    def tasklets(self) -> Iterator[Tasklet]:
        """All inside."""
        return self.inside.tasklets()

    def lines(self, indent: str) -> Iterator[str]:
        """The steps with a rule at their side."""
        yield indent + "╭ until done"
        yield from self.inside.lines(indent + "│ ")
        yield indent + "╰"


class Loop:
    """``Loop(loop_check_fn=done)(first >> ... >> last)`` repeats those tasklets until ``done()``.

    :param loop_check_fn: true when the loop shall end; asked after each tasklet in it.
    :param skip_fn: true when the loop is not to be begun at all; None: it always is.
    :raises flame.errors.UsageError: it cannot be called.
    """

    def __init__(self, loop_check_fn: Callable[[], bool], skip_fn: Callable[[], bool] | None = None) -> None:
        if not callable(loop_check_fn):
            raise UsageError(f"Loop(loop_check_fn={loop_check_fn!r}): it must be a function.")
        self.loop_check_fn = loop_check_fn
        self.skip_fn = skip_fn

    def __call__(self, ender: Step) -> Block:
        """Put a loop around the piece of chain that ends in ``ender``; gives the loop, to be joined with ``>>``.

        :raises flame.errors.UsageError: ``ender`` is not the end of a piece.
        """
        piece = ender.piece()
        if piece.steps[-1] is not ender or piece.owner is not None:
            raise UsageError(f"A loop cannot end at {ender}: something follows it already.")
        return Block(piece, self.loop_check_fn, self.skip_fn)
