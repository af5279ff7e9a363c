"""The child's link, on a real process."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from flame.flamelet.child import Child

LAST_WORDS = """
import os, socket
link = socket.socket(fileno=int(os.environ["FLAME_LINK_FD"]))
link.recv(1, socket.MSG_PEEK)          # something has been sent to this process, and stays unread
link.sendall(b"".join(b'{"type": "model", "number": %d}\\n' % number for number in range(1000)))
os._exit(0)
"""


async def test_the_last_words_of_a_child_arrive_though_it_has_not_read_all_it_was_sent(tmp_path: Path) -> None:
    for _ in range(20):
        child = await Child.start(
            [sys.executable, "-S", "-c", LAST_WORDS], folder=tmp_path, environment=dict(os.environ), output=2
        )
        child.send({"type": "peers", "joined": [], "left": ["a"]})
        assert await child.wait() == 0  # so that the words and the reset are there together
        child.send({"type": "peers", "joined": [], "left": ["b"]})  # into a broken pipe
        for _ in range(3):
            await asyncio.sleep(0)
        heard = [message["number"] async for message in child.messages()]
        assert heard == list(range(1000))
        await child.close()
