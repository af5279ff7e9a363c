"""A topology as text: roles are boxes, channels are lines between them, with groups, counts and backends.

The roles are laid out as a tree with the data-consuming ones at its leaves: the channels that carry the model
make its branches. A channel from a role to itself is a loop at its box, and one that closes a ring of roles, as a
coordinator's do, is a numbered mark at both ends, explained below. A tree that is too wide for the terminal
is drawn with indentation instead.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from flame.spec.nouns import Channel, Role, Schema, TaskConfig
from flame.spec.topology import groups_of, other_end, uses

#: Channels with these function tags carry the model; they come first when the tree is made.
_CARRIERS = {"fetch", "upload", "distribute", "aggregate", "forward", "backward"}
_MARKS = "①②③④⑤⑥⑦⑧⑨⑩⑪⑫⑬⑭⑮⑯⑰⑱⑲⑳"
_GAP = 3
_LABELS = (48, 30, 20)


class _Block(NamedTuple):
    """A drawn part: its lines, and the column at which a line from above meets it."""

    lines: list[str]
    anchor: int

    @property
    def width(self) -> int:
        return max((cells(line) for line in self.lines), default=0)


def draw_topology(schema: Schema, tasks: Sequence[TaskConfig] = (), width: int = 80) -> str:
    """Draw a schema, with the workers that a job makes of it.

    :param tasks: the job's tasks; without any, the schema is drawn by itself.
    :param width: columns of the terminal; no line is longer.
    :returns: lines of text, without colours.
    """
    drawing = _Drawing(schema, tasks)
    lines: list[str] = []
    for root in drawing.roots:
        for most in _LABELS:
            block = drawing.chart(root, most)
            if block.width <= width:
                break
        else:
            block = _Block(drawing.indented(root, width), 0)
        lines += ["", *block.lines]
    lines = [clip(drawing.title, width), *lines]
    if drawing.marks:
        lines.append("")
        for mark, channel in drawing.marks.values():
            lines += drawing.legend(channel, mark, width)
    return "\n".join(clip(line, width) for line in lines)


def cells(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def clip(text: str, width: int) -> str:
    """A text cut to a number of columns, with an ellipsis where something is missing; no blanks at its end."""
    text = text.rstrip()
    if cells(text) <= width:
        return text
    kept = ""
    for letter in text:
        if cells(kept + letter) > width - 1:
            break
        kept += letter
    return kept + "…" if width > 0 else ""


def _safe(name: str) -> str:
    """A name from a file, without what would move a terminal's cursor or count as no column."""
    return "".join(letter if letter.isprintable() and not unicodedata.combining(letter) else "?" for letter in name)


def _pad(text: str, width: int) -> str:
    return text + " " * (width - cells(text))


def _centred(text: str, width: int) -> str:
    left = (width - cells(text)) // 2
    return _pad(" " * left + text, width)


class _Drawing:
    """What is to be drawn, independent of the width: the tree, the loops, the marks, the counts."""

    def __init__(self, schema: Schema, tasks: Sequence[TaskConfig]) -> None:
        self.schema = schema
        self.roles = {role.name: role for role in schema.roles}
        self.with_tasks = bool(tasks)
        #: (role, channel, group) -> workers, and (role, association) -> workers.
        self.members: Counter[tuple[str, str, str]] = Counter()
        self.places: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
        self.backend = tasks[0].backend if tasks else ""
        if tasks:
            used = ((task.role, task.group_association, 1) for task in tasks)
        else:
            used = ((role.name, dict(association), count) for role, association, count in uses(schema, None))
        for role, association, count in used:
            self.places[role, tuple(association.items())] += count
            for channel, group in association.items():
                self.members[role, channel, group] += count
        self.loops: dict[str, Channel] = {}
        self.marks: dict[str, tuple[str, Channel]] = {}
        self.children: dict[str, list[tuple[Channel, str]]] = {role.name: [] for role in schema.roles}
        self.roots = self._grow()
        workers = sum(self.places.values())
        parts = [_safe(schema.name)]
        if tasks:
            parts.append(_count(workers, "worker"))
        parts += [_count(len(schema.roles), "role"), _count(len(schema.channels), "channel")]
        self.title = " · ".join(parts)

    def _grow(self) -> list[str]:
        """Choose the channels that make the tree, hang the rest as loops and marks; gives the roots."""
        tree: dict[str, list[tuple[Channel, str]]] = {name: [] for name in self.roles}
        part = {name: name for name in self.roles}
        rest: list[Channel] = []
        for channel in sorted(self.schema.channels, key=lambda one: not _carries(one)):
            first, second = channel.pair
            if first == second and first not in self.loops:
                self.loops[first] = channel
            elif part[first] == part[second]:
                rest.append(channel)
            else:
                tree[first].append((channel, second))
                tree[second].append((channel, first))
                joined = part[second]
                part = {name: part[first] if of == joined else of for name, of in part.items()}
        for number, channel in enumerate(rest):
            self.marks[channel.name] = (_MARKS[number] if number < len(_MARKS) else f"({number + 1})", channel)
        roots: list[str] = []
        for name in dict.fromkeys(part.values()):
            members = [one for one in self.roles if part[one] == name]
            roots.append(root := self._top(members, tree))
            self._hang(root, None, tree)
        return roots

    def _top(self, members: list[str], tree: dict[str, list[tuple[Channel, str]]]) -> str:
        """The role farthest from the data, which is where models are merged last."""
        distance = {name: 0 for name in members if self.roles[name].is_data_consumer}
        frontier = list(distance)
        for name in frontier:  # grows while it is walked: breadth first
            for _, other in tree[name]:
                if other not in distance:
                    distance[other] = distance[name] + 1
                    frontier.append(other)
        carrying = [name for name in members if any(_carries(channel) for channel, _ in tree[name])]
        return max(carrying or members, key=lambda name: distance.get(name, 0))

    def _hang(self, name: str, above: str | None, tree: dict[str, list[tuple[Channel, str]]]) -> None:
        for channel, other in tree[name]:
            if other != above:
                self.children[name].append((channel, other))
                self._hang(other, name, tree)

    # --- words

    def _box_text(self, role: Role) -> list[str]:
        """What stands in a role's box: its name, and how many workers it has where."""
        marks = "".join(mark for mark, channel in self.marks.values() if role.name in channel.pair)
        name = _safe(role.name) + (f" {marks}" if marks else "")
        if role.is_data_consumer and not self.with_tasks:
            return [name, "a worker a dataset"]
        counts = {place: count for (one, place), count in self.places.items() if one == role.name}
        total = _count(sum(counts.values()), "dataset" if role.is_data_consumer else "worker")
        if len(counts) < 2:
            return [name, total]
        varying = {
            channel
            for place in counts
            for channel, group in place
            if any(dict(other).get(channel) != group for other in counts)
        }
        groups = [
            (_safe("+".join(group for channel, group in place if channel in varying)), count)
            for place, count in counts.items()
        ]
        each = " · ".join(f"{group} {count}" for group, count in groups)
        if cells(each) > 40:
            each = f"{len(groups)} places, {_range([count for _, count in groups])} each"
        return [name, total, each]

    def _groups(self, channel: Channel, upper: str, most: int) -> list[str]:
        """A channel's groups, with how many workers are above and below in each."""
        lower = other_end(channel, upper)
        words: list[str] = []
        ratios: set[str] = set()
        for group in groups_of(channel):
            above, below = self.members[upper, channel.name, group], self.members[lower, channel.name, group]
            if self.with_tasks and not above and not below:
                continue
            ratio = str(above) if upper == lower else f"{above}↔{below}"
            ratios.add(ratio)
            words.append(f"{_safe(group)} {ratio}" if self.with_tasks else _safe(group))
        lines = _wrapped(words, " · ", most)
        if len(lines) <= 2:
            return lines
        total = f"{len(words)} groups"
        if self.with_tasks:
            total += f", {ratios.pop()} each" if len(ratios) == 1 else ""
        shown = _wrapped(words, " · ", most - 2)[0]
        return [total, f"{shown} …"]

    def _label(self, channel: Channel, upper: str, most: int) -> list[str]:
        backend = channel.backend or self.backend
        first = _safe(channel.name) + (f" · {_safe(backend)}" if backend else "")
        return [clip(line, most) for line in [first, *self._groups(channel, upper, most)]]

    def legend(self, channel: Channel, mark: str, width: int) -> list[str]:
        """The explanation of a mark."""
        upper, lower = channel.pair
        name, *groups = self._label(channel, upper, max(width - 4, 8))
        ends = f"{_safe(upper)} ↔ {_safe(lower)}"
        whole = f"{mark} {name} · {ends} · {groups[0] if groups else ''}".rstrip(" ·")
        if len(groups) < 2 and cells(whole) <= width:
            return [whole]
        return [f"{mark} {name}", f"  {ends}", *(f"  {line}" for line in groups)]

    # --- lines

    def _box(self, role: Role, most: int, *, above: bool, below: bool, left: bool = False) -> _Block:
        """A role's box; ``above`` and ``below``: lines meet it there. ``left``: text and lines keep to the left."""
        text = self._box_text(role)
        loop = self.loops.get(role.name)
        inner = max(cells(line) for line in text) + 2
        anchor = 3 if left else (inner + 2) // 2
        centre = (lambda line, size: _pad(f" {line}", size)) if left else _centred
        edge = "─" * inner
        top, bottom = f"┌{edge}┐", f"└{edge}┘"
        if above and not left:
            top = f"{top[:anchor]}┴{top[anchor + 1 :]}"
        if below:
            bottom = f"{bottom[:anchor]}┬{bottom[anchor + 1 :]}"
        rows = [f"│{centre(line, inner)}│" for line in text]
        if loop is not None:
            label = self._label(loop, role.name, most)
            sides = ["├─╮", *("│ │" for _ in rows[2:]), "├─╯"]
            if len(label) > len(rows):
                label = [*label[: len(rows) - 1], f"{len(groups_of(loop))} groups"]
            label += [""] * (len(rows) - len(label))
            rows = [f"{row[:-1]}{side} {word}".rstrip() for row, side, word in zip(rows, sides, label, strict=True)]
        return _Block([top, *rows, bottom], anchor)

    def chart(self, name: str, most: int, *, above: bool = False) -> _Block:
        """A role and all below it, its children side by side under it."""
        children = self.children[name]
        box = self._box(self.roles[name], most, above=above, below=bool(children))
        if not children:
            return box
        labels = [self._label(channel, name, most) for channel, _ in children]
        height = max(len(label) for label in labels)
        parts = []
        for (_, child), label in zip(children, labels, strict=True):
            block = self.chart(child, most, above=True)
            words = label + [""] * (height - len(label))
            lines = [f"{' ' * block.anchor}│ {word}".rstrip() for word in words] + block.lines
            parts.append(_Block(lines, block.anchor))
        below, anchors = _beside(parts)
        if len(anchors) > 1:
            below = [_bus(anchors, (anchors[0] + anchors[-1]) // 2), *below]
        centre = (anchors[0] + anchors[-1]) // 2
        shift = centre - box.anchor
        upper = [" " * max(shift, 0) + line for line in box.lines]
        lower = [" " * max(-shift, 0) + line for line in below]
        return _Block(upper + lower, max(centre, box.anchor))

    def indented(self, name: str, width: int) -> list[str]:
        """A role and all below it, each level a few columns further to the right."""
        children = self.children[name]
        lines = self._box(self.roles[name], max(width - 30, 8), above=False, below=bool(children), left=True).lines
        for number, (channel, child) in enumerate(children):
            last = number == len(children) - 1
            first, *more = self._label(channel, name, max(width - 6, 8))
            inner = [*more, *self.indented(child, width - 6)]
            lines += [f"   {'└' if last else '├'}─ {first}", *(f"   {' ' if last else '│'}  {line}" for line in inner)]
        return lines


def _carries(channel: Channel) -> bool:
    return any(_CARRIERS.intersection(tags) for tags in channel.func_tags.values())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _wrapped(words: list[str], joint: str, width: int) -> list[str]:
    lines: list[str] = []
    for word in words:
        if lines and cells(lines[-1]) + cells(joint) + cells(word) <= width:
            lines[-1] += joint + word
        else:
            lines.append(word)
    return lines


def _beside(parts: list[_Block]) -> tuple[list[str], list[int]]:
    """Blocks side by side; gives the lines and the columns of their anchors."""
    height = max(len(part.lines) for part in parts)
    lines = [""] * height
    anchors: list[int] = []
    at = 0
    for part in parts:
        anchors.append(at + part.anchor)
        for row, line in enumerate(part.lines):
            lines[row] = _pad(lines[row], at) + line
        at += part.width + _GAP
    return [line.rstrip() for line in lines], anchors


def _bus(anchors: list[int], centre: int) -> str:
    """The horizontal line under a box from which the lines to its children hang."""
    row = [" "] * (anchors[-1] + 1)
    row[anchors[0] : anchors[-1] + 1] = "─" * (anchors[-1] - anchors[0] + 1)
    for anchor in anchors[1:-1]:
        row[anchor] = "┬"
    row[anchors[0]], row[anchors[-1]] = "┌", "┐"
    row[centre] = "┼" if centre in anchors else "┴"
    return "".join(row)
