"""The channels of a worker, made from its configuration."""

from __future__ import annotations

import atexit
import hashlib
import hmac
import inspect
import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from flame.errors import ChannelError, SpecError
from flame.sdk import backends
from flame.sdk.backends.base import Backend, BackendContext, Member, Rendezvous
from flame.sdk.channel import WINDOW, Channel, Compression, Selector
from flame.sdk.mode.seeding import seed_of

if TYPE_CHECKING:
    from flame.sdk.config import Channel as ChannelConfig
    from flame.sdk.config import Config

SelectorFactory = Callable[[str, Mapping[str, Any]], Selector | None]


class ChannelManager:
    """Makes, joins and leaves the channels of a worker; one backend object serves all channels that use its kind.

    ``ChannelManager(config)`` is a manager of its own. ``ChannelManager()`` gives the one of the process, which is
    configured by calling it, as in Flame's library::

        cm = ChannelManager()
        cm(config)
        cm.join_all()
        channel = cm.get_by_tag("fetch")

    :param config: the task's configuration.
    :param rendezvous: how workers find each other; None: the meeting point in the configuration's ``brokers``.
    :param attempt: this start of the task; None: ``FLAME_ATTEMPT``, else 1.
    :param key: the job's secret; None: ``FLAME_JOB_KEY`` (hex), else one made of the job's id.
    :param options: further settings for the backends.
    :param window: see :data:`flame.sdk.channel.WINDOW`.
    """

    _of_process: ChannelManager | None = None

    def __new__(cls, config: Config | None = None, **settings: Any) -> ChannelManager:
        """A new manager, or the process's own where nothing is given."""
        if config is not None or settings:
            return super().__new__(cls)
        if cls._of_process is None:
            cls._of_process = super().__new__(cls)
        return cls._of_process

    def __init__(
        self,
        config: Config | None = None,
        *,
        rendezvous: Rendezvous | None = None,
        attempt: int | None = None,
        key: bytes | None = None,
        options: Mapping[str, Any] | None = None,
        window: int = WINDOW,
    ) -> None:
        if config is None and self is type(self)._of_process and hasattr(self, "_channels"):
            return  # asked for again
        self._config: Config | None = None
        self._channels: dict[str, Channel] = {}
        self._backends: dict[tuple[str, str | None], Backend] = {}
        self._rendezvous = rendezvous
        self._own_rendezvous: Rendezvous | None = None
        self._attempt = attempt
        self._key = key
        self._options = dict(options or {})
        self._window = window
        self._process = os.getpid()
        self._condition = threading.Condition()
        if config is not None:
            self(config)

    def __call__(self, config: Config) -> None:
        """Take the configuration; channels of an earlier one are left first."""
        if self._config is not None:
            self.cleanup()
        self._config = config
        self._process = os.getpid()
        atexit.register(self.cleanup)

    @property
    def config(self) -> Config:
        """The configuration.

        :raises flame.errors.ChannelError: none was given so far.
        """
        if self._config is None:
            raise ChannelError("The channel manager has no configuration yet: call it with one, as in cm(config).")
        return self._config

    def wake(self) -> None:
        """Let whoever waits on a channel look again whether what it waits for has come."""
        with self._condition:
            self._condition.notify_all()

    def join_all(self) -> None:
        """Join every channel of the role.

        :raises flame.errors.BackendError: a transport cannot be used.
        """
        for name in self.config.channels:
            self.join(name)

    def join(self, name: str) -> bool:
        """Join a channel; one that is joined already is left as it is.

        :returns: True.
        :raises flame.errors.ChannelError: the role has no such channel.
        :raises flame.errors.BackendError: its transport cannot be used.
        """
        if name in self._channels:
            return True
        spec = self.config.channels.get(name)
        if spec is None:
            raise ChannelError(
                f"The role {self.config.role} has no channel {name!r}; it has {', '.join(self.config.channels)}."
            )
        me = self._me()
        first, second = spec.pair
        backend = self._backend(spec)
        channel = Channel(
            name,
            backend=backend,
            job=self.config.job.job_id,
            me=me,
            other_role=second if first == me.role else first,
            group=self.config.group(name),
            selector=self._selector(spec),
            window=self._window,
            compression=self._compression(spec),
            condition=self._condition,
        )
        channel.join()
        self._channels[name] = channel
        return True

    def leave(self, name: str) -> None:
        """Leave a channel; passed over when it is not joined."""
        channel = self._channels.pop(name, None)
        if channel is not None:
            channel.leave()

    def get_by_tag(self, tag: str) -> Channel | None:
        """The channel on which the function ``tag`` of this role acts; None when there is none, or it is not joined."""
        name = self.config.func_tag_map.get(tag)
        return None if name is None else self.get(name)

    def get(self, name: str) -> Channel | None:
        """A channel by its name; None when it is not joined."""
        return self._channels.get(name)

    def is_joined(self, name: str) -> bool:
        """Whether a channel is joined."""
        return name in self._channels

    def selector_states(self) -> dict[str, Any]:
        """What the channels' selectors must not forget, by channel."""
        states = {name: channel.selector_state() for name, channel in self._channels.items()}
        return {name: state for name, state in states.items() if state}

    def load_selector_states(self, states: Mapping[str, Any]) -> None:
        """Let the selectors go on where those of an earlier process were."""
        for name, state in states.items():
            if name in self._channels:
                self._channels[name].load_selector_state(state)

    def compression_states(self) -> dict[str, dict[str, Any]]:
        """What the channels' compressions must not forget, arrays and plain values by name, by channel."""
        states = {name: channel.compression_state() for name, channel in self._channels.items()}
        return {name: state for name, state in states.items() if state}

    def load_compression_states(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Let the compressions of all channels go on where those of an earlier process, or of an earlier round, were."""
        for name, channel in self._channels.items():
            channel.load_compression_state(states.get(name, {}))

    def secret(self, purpose: str) -> bytes:
        """32 bytes that every worker of the job can make and nobody else, others for each purpose.

        A job that is run by hand without ``FLAME_JOB_KEY`` has no secret: there they are made of its id.
        """
        return hmac.digest(self._job_key(), purpose.encode(), hashlib.sha256)

    def cleanup(self) -> None:
        """Leave all channels, after what was sent is delivered, and free everything. Safe to call again."""
        atexit.unregister(self.cleanup)
        if os.getpid() != self._process:
            return  # a process that was forked off, such as a data loader's: the channels are its parent's
        for name in list(self._channels):
            self.leave(name)
        for backend in self._backends.values():
            backend.close()
        self._backends.clear()
        if self._own_rendezvous is not None:
            self._own_rendezvous.close()
            self._own_rendezvous = None
        self._config = None

    def _me(self) -> Member:
        attempt = self._attempt if self._attempt is not None else int(os.environ.get("FLAME_ATTEMPT") or 1)
        return Member(
            end=self.config.task_id,
            role=self.config.role,
            attempt=attempt,
            dials=bool(self.config.dataset) or self.config.from_user,
            order=self.order,
        )

    @property
    def order(self) -> str:
        """A digest of what this worker works on, the same in every run of a job."""
        groups = (f"{channel}={group}" for channel, group in sorted(self.config.group_association.items()))
        work = "\n".join((self.config.dataset, self.config.realm, *groups))
        return hashlib.sha256(work.encode()).hexdigest()[:16]

    def _backend(self, spec: ChannelConfig) -> Backend:
        sort = spec.backend or self.config.backend
        broker = spec.broker_host or self.config.brokers.sort_to_host.get(sort)
        backend = self._backends.get((sort, broker))
        if backend is None:
            context = BackendContext(
                job=self.config.job.job_id,
                key=self._job_key(),
                me=self._me(),
                broker=broker,
                rendezvous=self._meeting(broker) if sort == "p2p" else self._rendezvous,
                options=self._options,
            )
            backend = self._backends[sort, broker] = backends.make(sort, context)
        return backend

    def _job_key(self) -> bytes:
        if self._key is not None:
            return self._key
        from flame.sdk.backends.rendezvous_server import hand_key

        return hand_key(self.config.job.job_id)

    def _meeting(self, broker: str | None) -> Rendezvous:
        """How peers are found where the backend has no meeting point of its own."""
        if self._rendezvous is not None:
            return self._rendezvous
        if self._own_rendezvous is None:
            if broker is None:
                raise SpecError(
                    "no meeting point for the p2p backend; run the job with Flame, or name an address that one of the "
                    "workers can listen on, such as {sort: p2p, host: localhost:10104}",
                    "brokers",
                )
            from flame.sdk.backends.rendezvous import TcpRendezvous

            self._own_rendezvous = TcpRendezvous(broker, self.config.job.job_id, self._job_key())
        return self._own_rendezvous

    def _selector(self, spec: ChannelConfig) -> Selector | None:
        chosen = spec.selector or self.config.selector
        if chosen.sort == "default":
            return None
        from flame.sdk import selectors

        kwargs = self._seeded(selectors.selectors.load(chosen.sort), chosen.kwargs)
        selector: Selector = selectors.make(chosen.sort, kwargs)
        return selector

    def _compression(self, spec: ChannelConfig) -> Compression | None:
        if spec.compression is None:
            return None
        from flame.sdk import compression as compressions
        from flame.sdk.optimizers import optimizers

        differences = bool(getattr(optimizers.load(self.config.optimizer.sort), "differences", False))
        sort, kwargs = spec.compression.sort, dict(spec.compression.kwargs)
        if sort != "none":
            kwargs = self._seeded(compressions.compressors.load(sort), kwargs)
        return compressions.make(sort, kwargs, differences=differences)

    def _seeded(self, part: Callable[..., Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a part that draws lots; in a deterministic job they are the same in every run, also where nobody has given a seed."""
        drawn = "seed" in inspect.signature(part).parameters and kwargs.get("seed") is None
        if drawn and self.config.policy.deterministic:
            return {**kwargs, "seed": seed_of(self.config, self.order, 0)}
        return dict(kwargs)
