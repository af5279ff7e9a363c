"""What somebody on the way reads: of jobs' models between workers, of tokens and code between clients and a server."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from flame.apiserver.tls import ServerTls
from flame.cli.main import flame
from flame.client import Client
from flame.spec.nouns import Channel, ModelSpec, Role, Schema
from flame.spec.records import JobState

sys.path.insert(0, str(Path(__file__).parents[1]))
from wiretap import Wiretap

#: The model's bytes, again and again these; they are numbers (float32), and training does not change them.
SECRET = b"a known pattern of a model's bytes, 64 of them, to be looked for"
TIMES = 50_000

ROLE = f"""
import os, sys
import numpy as np

os.environ["FLAME_P2P_SAME_HOST"] = "{{same_host}}"
MODEL = {{"w": np.frombuffer({SECRET!r} * {TIMES}, np.float32).copy()}}
"""

TRAINER = (
    ROLE
    + """
from flame.sdk import Config, Trainer

class Site(Trainer):
    dataset_size = 1

    def __init__(self, config):
        self.config = config

    def initialize(self):
        self.model = MODEL

    def load_data(self):
        pass

    def train(self):
        assert self.model["w"].tobytes() == MODEL["w"].tobytes()

    def evaluate(self):
        pass

site = Site(Config("config.json"))
site.compose()
site.run()
"""
)

AGGREGATOR = (
    ROLE
    + """
os.environ.update(FLAME_P2P_HOST="127.0.0.2", FLAME_P2P_BIND="127.0.0.1", FLAME_P2P_PORT="{port}")
from flame.sdk import Aggregator, Config

class Mean(Aggregator):
    def __init__(self, config):
        self.config = config

    def initialize(self):
        self.model = MODEL

    def evaluate(self):
        pass

mean = Mean(Config("config.json"))
mean.compose()
mean.run()
"""
)


@pytest.fixture
def overhear(
    make_server: Any, make_form: Any, make_code: Callable[..., bytes], unused_tcp_port: int
) -> Callable[..., Awaitable[bytes]]:
    """What goes over sockets between the workers of a job that trains, on one machine.

    Takes whether they may pass models through memory that they share, and settings of the server.
    """
    port = unused_tcp_port

    async def heard(*, same_host: int, **settings: Any) -> bytes:
        place = [{"param": "default"}]
        schema = Schema(
            name="two tiers",
            roles=[
                Role(name="trainer", is_data_consumer=True, group_association=place),
                Role(name="aggregator", group_association=place),
            ],
            channels=[
                Channel(
                    name="param",
                    pair=["trainer", "aggregator"],
                    func_tags={"trainer": ["fetch", "upload"], "aggregator": ["distribute", "aggregate"]},
                )
            ],
        )
        async with make_server(**settings) as served:
            with Wiretap(("127.0.0.2", port), ("127.0.0.1", port)) as tap:
                roles = [
                    role.replace("{same_host}", str(same_host)).replace("{port}", str(port))
                    for role in (TRAINER, AGGREGATOR)
                ]
                digest = await served.client.code.upload(make_code(*roles))
                form = make_form(digest, schema=schema, model_spec=ModelSpec(hyperparameters={"rounds": 2}))
                job = await served.client.jobs.create(form)
                await served.client.jobs.start(job.id)
                ended = await served.client.jobs.wait(job.id)
                assert ended.state is JobState.COMPLETED, ended.failure
        # Two trainers got the model and sent it back, twice: all of it went by here.
        assert len(tap.heard) > 2 * 2 * 2 * len(SECRET) * TIMES
        return tap.heard

    return heard


async def test_with_p2p_tls_nobody_on_the_way_reads_a_model(overhear: Callable[..., Awaitable[bytes]]) -> None:
    assert SECRET not in await overhear(same_host=1, p2p_tls=True)


async def test_without_it_everybody_does(overhear: Callable[..., Awaitable[bytes]]) -> None:
    """So what the other test looks for would be found."""
    assert SECRET in await overhear(same_host=0)


@pytest.mark.parametrize("tls", [True, False])
async def test_with_tls_nobody_on_the_way_reads_what_is_said_to_a_server(
    tls: bool, make_server: Any, make_form: Any, make_code: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in (["ca"], ["server"]):
        result = CliRunner().invoke(flame, ["cert", *arguments, "--dir", str(tmp_path)])
        assert result.exit_code == 0, result.output
    monkeypatch.setenv("FLAME_CA", str(tmp_path / "ca.pem"))
    certificate = ServerTls(cert=tmp_path / "server.pem", key=tmp_path / "server-key.pem", ca=tmp_path / "ca.pem")
    code = make_code(TRAINER)
    async with make_server(token="a token that is kept", tls=certificate if tls else ServerTls()) as served:
        port = int(served.url.rpartition(":")[2])
        with Wiretap(("127.0.0.1", 0), ("127.0.0.1", port)) as tap:
            url = f"{served.url.rpartition(':')[0]}:{tap.port}"
            async with Client(url, "a token that is kept") as client:
                digest = await client.code.upload(code)
                job = await client.jobs.create(make_form(digest, name="a name that is kept"))
                assert (await client.jobs.get(job.id)).name == "a name that is kept"
                async for _ in client.jobs.events(job.id):
                    pass
    assert digest == hashlib.sha256(code).hexdigest()
    for secret in (b"a token that is kept", b"a name that is kept", code[:200], digest.encode()):
        assert (secret in tap.heard) is not tls
