"""Imports written for Flame's earlier library give the SDK's own modules, and nothing else changes."""

import subprocess
import sys

import pytest


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("first", ["flame", "flame.sdk"])
def test_a_module_is_one_module_under_both_names(first):
    second = "flame.sdk" if first == "flame" else "flame"
    python(f"""if True:
        import sys, pickle
        import {first}.config, {second}.config
        from {first}.mode.horizontal.syncfl.trainer import Trainer as A
        from {second}.mode.horizontal.trainer import Trainer as B
        from {second}.mode.tasklet import Loop, Tasklet
        import {first}.mode.tasklet
        from {first}.mode.horizontal.top_aggregator import TopAggregator
        from {first}.mode.composer import CloneComposer, Composer
        from {first}.mode.message import MessageType
        from {first}.dataset import Dataset
        from {first}.channel import VAL_CH_STATE_SEND
        from {first}.channel_manager import ChannelManager
        from {first}.common.util import get_ml_framework_in_use
        from {first}.common.custom_abcmeta import ABCMeta, abstract_attribute
        from {first}.optimizers import make
        import flame, flame.sdk
        assert A is B and {first}.mode.tasklet.Loop is Loop
        assert flame.config is flame.sdk.config and flame.mode is flame.sdk.mode
        doubles = {{}}
        for name, module in sys.modules.items():
            file = getattr(module, "__file__", None)
            if name.startswith("flame") and file:
                doubles.setdefault(file, set()).add(id(module))
        assert all(len(ids) == 1 for ids in doubles.values()), doubles
        assert flame.config.__spec__.name == flame.config.__name__ == "flame.sdk.config"
        assert pickle.loads(pickle.dumps(MessageType.EOT)) is MessageType.EOT
    """)


def test_the_control_plane_keeps_its_names_and_wrong_names_fail_as_ever():
    out = python("""if True:
        import importlib, flame.spec.nouns, flame.errors
        assert flame.spec.__name__ == "flame.spec"
        for name in ("flame.nope", "flame.spec.config", "flame.mode.nope", "flame.errors.config", "flame.sdk.nope"):
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                print(error.name)
    """)
    assert out.split() == [
        "flame.nope",
        "flame.spec.config",
        "flame.mode.nope",
        "flame.errors.config",
        "flame.sdk.nope",
    ]


def test_importing_flame_imports_nothing_else():
    out = python("import sys; before = set(sys.modules); import flame; print(*sorted(set(sys.modules) - before))")
    assert set(out.split()) <= {"flame", "flame._aliases", "importlib", "importlib.machinery", "collections.abc"}


def test_the_sdks_names_come_when_they_are_used_and_torch_never_by_itself():
    out = python("""if True:
        import sys, flame.sdk
        assert "numpy" not in sys.modules
        assert {"Trainer", "Config"} <= set(dir(flame.sdk))
        for name in flame.sdk.__all__:
            getattr(flame.sdk, name)
        assert flame.sdk.Aggregator is flame.sdk.TopAggregator
        try:
            flame.sdk.nope
        except AttributeError as error:
            print(error)
        heavy = {"torch", "mlflow", "tensorflow", "paho", "aiohttp", "yaml", "pandas", "sklearn"} & set(sys.modules)
        assert not heavy, heavy
    """)
    assert out.strip() == "module 'flame.sdk' has no attribute 'nope'"
