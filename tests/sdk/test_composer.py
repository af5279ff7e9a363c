"""Workflows: chains run in order, loops as often as they say, and surgery never tears a chain."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame.errors import UsageError
from flame.sdk.mode.composer import CloneComposer, Composer
from flame.sdk.mode.tasklet import Loop, Tasklet


class Log:
    """Records which tasklets ran; ``done`` after so many."""

    def __init__(self, stop=10**9):
        self.ran = []
        self.stop = stop

    def task(self, alias):
        return Tasklet(alias, self.ran.append, alias)

    def done(self):
        return len(self.ran) >= self.stop


def trainer_chain(log):
    with Composer() as composer:
        names = ("load", "init", "fetch", "train", "upload", "save")
        load, init, fetch, train, upload, save = map(log.task, names)
    load >> init >> Loop(loop_check_fn=log.done)(fetch >> train >> upload) >> save
    return composer


def test_a_loop_repeats_until_its_condition_holds_and_can_end_in_its_middle():
    log = Log(stop=7)
    trainer_chain(log).run()
    assert log.ran == ["load", "init", "fetch", "train", "upload", "fetch", "train", "save"]


def test_loops_may_be_nested_and_joined_in_pieces():
    log, inner, outer = Log(), iter([False, True] * 2), iter([False, False, True])
    with Composer() as composer:
        a, b, c = map(log.task, "abc")
        Loop(loop_check_fn=lambda: next(outer))(a >> Loop(loop_check_fn=lambda: next(inner))(b)) >> c
    composer.run()
    assert log.ran == ["a", "b", "b", "a", "c"]


def test_the_outer_condition_is_not_asked_inside_an_inner_loop():
    log = Log(stop=3)
    with Composer() as composer:
        a, b, c = map(log.task, "abc")
        Loop(log.done)(a >> Loop(lambda: log.ran.count("b") == 5)(b) >> c)
    composer.run()
    assert log.ran == ["a", "b", "b", "b", "b", "b"]


def test_a_tasklet_can_send_its_loop_back_to_the_start():
    log = Log(stop=5)
    composer = trainer_chain(log)
    composer.get_tasklet("fetch").set_continue_fn(lambda: log.ran.count("fetch") < 2)
    composer.run()
    assert log.ran == ["load", "init", "fetch", "fetch", "train", "save"]


def test_a_finished_loop_is_not_sent_back():
    log = Log(stop=3)
    composer = trainer_chain(log)
    composer.get_tasklet("fetch").set_continue_fn(lambda: True)
    composer.run()
    assert log.ran == ["load", "init", "fetch", "save"]


def test_inserting_at_the_edge_of_a_loop_grows_the_loop():
    log = Log(stop=10)
    composer = trainer_chain(log)
    composer.get_tasklet("fetch").insert_before(log.task("ready"))
    composer.get_tasklet("upload").insert_after(log.task("log"))
    composer.get_tasklet("load").insert_before(log.task("first"))
    composer.run()
    assert log.ran == ["first", "load", "init", "ready", "fetch", "train", "upload", "log", "ready", "fetch", "save"]


def test_replacing_keeps_the_place_and_what_follows():
    log = Log(stop=5)
    composer = trainer_chain(log)
    composer.get_tasklet("upload").replace_with(log.task("send"))
    composer.get_tasklet("train").replace_with(log.task("train"))
    composer.run()
    assert log.ran == ["load", "init", "fetch", "train", "send", "save"]
    with pytest.raises(
        UsageError, match="There is no tasklet 'upload'; there are: load, init, fetch, train, send, save"
    ):
        composer.get_tasklet("upload")


def test_a_loop_goes_with_its_last_tasklet():
    log = Log()
    with Composer() as composer:
        a, b = map(log.task, "ab")
        Loop(log.done)(a) >> b
    a.remove()
    assert composer.aliases == ["b"]
    composer.run()
    assert log.ran == ["b"]
    with pytest.raises(UsageError, match="'b' is the only tasklet"):
        b.remove()
    with pytest.raises(UsageError, match="'a' is in no chain"):
        a.remove()


def test_misuse_is_answered_in_words():
    log = Log()
    with Composer() as composer:
        a, b, c, d = map(log.task, "abcd")
    with pytest.raises(UsageError, match="no tasklets"):
        composer.run()
    a >> b
    with pytest.raises(UsageError, match="'a' >> 'c': something follows 'a' already"):
        a >> c
    with pytest.raises(UsageError, match="would make a circle"):
        b >> a
    with pytest.raises(UsageError, match="A loop cannot end at 'a'"):
        Loop(log.done)(a)
    c >> d
    with pytest.raises(UsageError, match="2 pieces, join them with >>: a >> b / c >> d"):
        composer.run()
    b >> c
    with pytest.raises(UsageError, match="'d' is in a chain already"):
        a.insert_after(d)
    with pytest.raises(UsageError, match="two tasklets named 'd'"):
        a.insert_after(log.task("d"))
    with pytest.raises(UsageError, match="must be a function"):
        Tasklet("x", 3)
    with pytest.raises(UsageError, match="must be a function"):
        Loop(loop_check_fn=3)
    assert composer.aliases == list("abcd")


def test_a_child_class_adds_to_its_parents_chain_and_may_join_it_anew():
    log = Log(stop=4)
    composer = trainer_chain(log)
    with CloneComposer(composer) as again:
        extra = log.task("extra")
        again.unlink()
        load, fetch = again.tasklet("load"), again.tasklet("fetch")
        load >> Loop(log.done)(fetch >> extra)
    composer.run()
    assert log.ran == ["load", "fetch", "extra", "fetch"]
    with pytest.raises(UsageError, match="no unlinked tasklet 'nope'"):
        composer.tasklet("nope")


def test_flames_older_tasklets_without_alias_take_the_functions_name():
    def get(tag):
        seen.append(tag)

    seen = []
    with Composer() as composer:
        Tasklet(get, "one") >> Tasklet("", get, "two") >> Tasklet("", get, tag="three")
    composer.run()
    assert seen == ["one", "two", "three"]
    assert composer.aliases == ["get", "get_2", "get_3"]


def test_roles_in_threads_of_one_process_do_not_mix_their_tasklets():
    barrier, results = threading.Barrier(2), {}

    def build(name):
        log = Log()
        with Composer() as composer:
            barrier.wait(10)
            a, b = log.task(f"{name}1"), log.task(f"{name}2")
            barrier.wait(10)
            a >> b
        results[name] = composer.aliases

    threads = [threading.Thread(target=build, args=(name,)) for name in "xy"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert results == {"x": ["x1", "x2"], "y": ["y1", "y2"]}


def test_the_chain_is_drawn_with_its_loops(capsys):
    trainer_chain(Log()).print()
    assert capsys.readouterr().out == "load\ninit\n╭ until done\n│ fetch\n│ train\n│ upload\n╰\nsave\n"


# A second model of a chain: nested lists. Any surgery on it must do the same to the real one.

Nested = st.recursive(st.none(), lambda inner: st.lists(inner, min_size=1, max_size=4), max_leaves=8)


def build(shape, names, log):
    if shape is None:
        name = f"t{len(names)}"
        names.append(name)
        return name, log.task(name)
    model, chain = [], None
    for part in shape:
        name, step = build(part, names, log)
        model.append(name)
        chain = step if chain is None else chain >> step
    return model, Loop(lambda: True)(chain)


def flat(model):
    for part in model:
        if isinstance(part, list):
            yield from flat(part)
        else:
            yield part


def surgery(model, place, operation, name):
    for index, part in enumerate(model):
        if isinstance(part, list):
            surgery(part, place, operation, name)
            if not part:
                del model[index]
                return
        elif part == place:
            if operation == "remove":
                del model[index]
            elif operation == "replace_with":
                model[index] = name
            else:
                model.insert(index + (operation == "insert_after"), name)
            return


def text(model, indent=""):
    for part in model:
        if isinstance(part, list):
            yield indent + "╭ until done"
            yield from text(part, indent + "│ ")
            yield indent + "╰"
        else:
            yield indent + part


@settings(max_examples=150, deadline=None)
@given(
    st.lists(Nested, min_size=1, max_size=4),
    st.lists(
        st.tuples(st.integers(0, 99), st.sampled_from(["insert_before", "insert_after", "replace_with", "remove"])),
        max_size=12,
    ),
)
def test_any_sequence_of_surgeries_keeps_a_valid_chain(shape, operations):
    log, names = Log(), []
    with Composer() as composer:
        model, chain = [], log.task("first")
        for part in shape:
            name, step = build(part, names, log)
            model.append(name)
            chain = chain >> step
    model.insert(0, "first")
    for number, (index, operation) in enumerate(operations):
        aliases = list(flat(model))
        place = aliases[index % len(aliases)]
        if operation == "remove" and len(aliases) == 1:
            with pytest.raises(UsageError):
                composer.get_tasklet(place).remove()
            continue
        name = f"new{number}"
        tasklet = composer.get_tasklet(place)
        getattr(tasklet, operation)(*([] if operation == "remove" else [log.task(name)]))
        surgery(model, place, operation, name)
        assert str(composer).splitlines() == list(text(model))
    assert composer.aliases == list(flat(model))
    composer.run()
    assert log.ran[0] == composer.aliases[0]
