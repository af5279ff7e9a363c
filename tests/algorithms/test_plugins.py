"""Parts are chosen by name; a user's own come by a call or from an installed package."""

import subprocess
import sys

import pytest

from flame.errors import SpecError
from flame.sdk import datasamplers, optimizers, privacy, selectors
from flame.sdk.optimizers.fedavg import FedAvg
from flame.sdk.plugins import Plugins
from flame.spec import known


class Mine(FedAvg):
    sort = "mine"

    def __init__(self, strength=1.0):
        super().__init__()
        self.strength = strength


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (optimizers, known.OPTIMIZERS),
        (selectors, known.SELECTORS),
        (datasamplers, known.DATASAMPLERS),
        (privacy, known.PRIVACIES),
    ],
)
def test_a_job_may_name_exactly_what_there_is(module, kind):
    plugins = next(each for each in vars(module).values() if isinstance(each, Plugins))
    assert sorted(kind.names) == sorted(plugins.builtin)
    assert kind.group == plugins.group
    for name in plugins.builtin:
        assert plugins.load(name).sort == name


def test_a_users_own_optimizer_is_made_by_name():
    plugins = Plugins("optimizer", "flame.test", dict(optimizers.optimizers.builtin))
    plugins.register("mine", Mine)
    assert plugins.make("mine", {"strength": 3}).strength == 3
    assert "mine" in plugins.names()


def test_an_installed_package_brings_its_own(tmp_path):
    (tmp_path / "theirs.py").write_text("class Theirs:\n    def __init__(self, a=1):\n        self.a = a\n")
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[flame.optimizers]\ntheirs = theirs:Theirs\n")
    code = "from flame.sdk import optimizers as o; print(o.make('theirs', {'a': 5}).a, 'theirs' in o.names())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["5", "True"]


def test_spelling_is_forgiven_where_it_can_mean_only_one_thing():
    assert optimizers.make("FedAvg").sort == "fedavg"
    assert optimizers.make("trimmed_mean").sort == "trimmedmean"


@pytest.mark.parametrize(
    ("name", "kwargs", "says"),
    [
        ("fedadm", {}, "There is no optimizer 'fedadm'. Did you mean 'fedadam'?"),
        ("fedadam", {"beta1": 0.9}, "The optimizer 'fedadam' takes no argument 'beta1'. Did you mean 'beta_1'?"),
        ("fedavg", {"eta": 1}, "The optimizer 'fedavg' takes no argument 'eta'. It takes none."),
        ("fedprox", {}, "The optimizer 'fedprox' needs the argument 'mu'; give it in kwargs."),
        ("fedadam", {"eta": "fast"}, "kwargs: eta must be a finite number, not 'fast'."),
        ("fedadam", {"beta_1": 1.0}, "kwargs: beta_1 must be at least 0 and below 1, not 1.0."),
        ("fedbuff", {"agg_goal": 0}, "kwargs: agg_goal must be at least 1, not 0."),
        ("krum", {"f": 1.5}, "kwargs: f must be an integer, not 1.5."),
    ],
)
def test_a_wrong_choice_is_answered_with_the_mend(name, kwargs, says):
    with pytest.raises(SpecError) as caught:
        optimizers.make(name, kwargs)
    assert str(caught.value) == says


def test_choosing_one_imports_that_one_only():
    code = (
        "import sys; from flame.sdk import optimizers, selectors; optimizers.make('fedadam'); selectors.make('default');"
        "print(*sorted(m for m in sys.modules if m.startswith(('flame.sdk.optimizers', 'flame.sdk.selectors'))), "
        "'torch' in sys.modules, 'importlib.metadata' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *modules, torch, metadata = done.stdout.split()
    assert (torch, metadata) == ("False", "False")
    assert "flame.sdk.optimizers.fedadam" in modules
    assert not {"flame.sdk.optimizers.krum", "flame.sdk.optimizers.scaffold", "flame.sdk.selectors.oort"} & set(modules)
