"""What a control group says about memory, in both of the kernel's layouts. That it is right when it counts is shown by the
tests of the runners, where real containers run out of memory."""

from pathlib import Path

import pytest

from flame.flamelet.memory import Memory, read_memory

EVENTS = "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/user.slice/a\n", {"user.slice/a/memory.events": EVENTS, "user.slice/a/memory.max": "67108864\n"}),
        ("0::/\n", {"memory.events": EVENTS, "memory.max": "67108864\n"}),  # a container sees its own as the root
        (
            "4:memory:/a/b\n1:cpu:/\n0::/\n",
            {"memory/a/b/memory.oom_control": CONTROL, "memory/a/b/memory.limit_in_bytes": "67108864\n"},
        ),
        (  # a container, whose path leads nowhere in its own view
            "5:cpu,memory:/docker/12ab\n",
            {"memory/memory.oom_control": CONTROL, "memory/memory.limit_in_bytes": "67108864\n"},
        ),
    ],
)
def test_kills_and_limit_are_read_in_each_layout(tmp_path: Path, own: str, files: dict[str, str]) -> None:
    write(tmp_path, {"own": own, **files})
    assert read_memory(tmp_path, tmp_path / "own") == Memory(2, 64 << 20)


def test_no_limit_is_told_from_one(tmp_path: Path) -> None:
    write(tmp_path, {"own": "0::/\n", "memory.events": EVENTS, "memory.max": "max\n"})
    assert read_memory(tmp_path, tmp_path / "own") == Memory(2, None)
    write(tmp_path, {"memory.max": "9223372036854771712\n"})
    assert read_memory(tmp_path, tmp_path / "own") == Memory(2, None)


def test_nothing_is_known_where_there_are_no_control_groups(tmp_path: Path) -> None:
    assert read_memory(tmp_path, tmp_path / "none") == Memory(None, None)
