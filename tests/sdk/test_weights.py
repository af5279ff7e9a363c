"""Models of any library as named arrays: taken without a copy, given back exactly, refused in words."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from flame.errors import WorkerError
from flame.sdk import modelfile
from flame.sdk.weights import as_arrays, get_weights, set_weights


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)
        self.bn = torch.nn.BatchNorm1d(2)
        self.register_buffer("scale", torch.ones(2, dtype=torch.bfloat16))


class KerasLike:
    def __init__(self):
        self.weights = [np.zeros((2, 3), np.float32), np.zeros(3, np.float32)]

    def get_weights(self):
        return [w.copy() for w in self.weights]

    def set_weights(self, weights):
        self.weights = [np.array(w) for w in weights]


def locked(weights):
    copies = {}
    for name, array in weights.items():
        copies[name] = np.array(array)
        copies[name].setflags(write=False)
    return copies


def test_a_torch_modules_arrays_are_its_own_memory_and_fit_back_with_batchnorms_counters():
    net, other = Net(), Net()
    net.bn(net.fc(torch.randn(8, 3)))
    weights = get_weights(net)
    assert list(weights) == list(net.state_dict())
    assert np.shares_memory(weights["fc.weight"], net.fc.weight.detach().numpy())
    assert weights["bn.num_batches_tracked"].dtype == np.int64
    assert weights["bn.num_batches_tracked"].shape == ()
    assert weights["scale"].dtype == np.float32
    set_weights(other, locked(weights))
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, net.state_dict()[name])
    assert other.bn.num_batches_tracked.item() == 1
    assert other.fc.weight.requires_grad


def test_a_dict_is_changed_in_place_and_a_shared_read_only_one_is_not():
    mine = {"w": np.zeros((2, 2)), "b": 0.5, "n": np.int64(3)}
    memory = mine["w"]
    set_weights(mine, locked({"w": np.ones((2, 2)), "b": np.array(1.5), "n": np.array(4)}))
    assert mine["w"] is memory
    assert memory.sum() == 4
    assert mine["b"] == 1.5
    frozen = {"w": np.zeros(2)}
    frozen["w"].setflags(write=False)
    before = frozen["w"]
    set_weights(frozen, {"w": np.ones(2)})
    assert before.sum() == 0
    assert frozen["w"].sum() == 2


def test_lists_and_objects_with_get_weights_keep_their_order():
    model = KerasLike()
    assert list(get_weights(model)) == ["w0", "w1"]
    set_weights(model, locked({"w0": np.ones((2, 3), np.float32), "w1": np.full(3, 7, np.float32)}))
    assert model.weights[1].tolist() == [7, 7, 7]
    many = [np.full(1, i) for i in range(12)]
    assert list(get_weights(many))[-1] == "w11"
    assert sorted(get_weights(many)) == list(get_weights(many))
    set_weights(many, {f"w{i:02d}": np.full(1, i + 1) for i in range(12)})
    assert many[11][0] == 12


@pytest.mark.parametrize("model", [None, 3, object()])
def test_what_is_no_model_is_refused_with_what_may_be_one(model):
    with pytest.raises(WorkerError, match=r"Set it in initialize\(\) to a PyTorch module, a dict of numpy arrays"):
        get_weights(model)
    with pytest.raises(WorkerError, match="PyTorch module"):
        set_weights(model, {})


def test_weights_that_do_not_fit_are_refused_and_named():
    net = Net()
    weights = dict(get_weights(net))
    weights["fc.weight"] = np.zeros((5, 5), np.float32)
    with pytest.raises(WorkerError, match=r"'fc.weight' is \[5, 5\], here it is \[2, 3\]"):
        set_weights(net, weights)
    del weights["fc.bias"]
    with pytest.raises(WorkerError, match=r"only this role's model has 'fc.bias'"):
        set_weights(net, weights)
    with pytest.raises(WorkerError, match="this role's model lacks 'x'"):
        set_weights({}, {"x": np.zeros(1)})
    with pytest.raises(WorkerError, match=r"self.model\['name'\] is a str"):
        get_weights({"name": "resnet"})


def test_received_bfloat16_tensors_become_float32_arrays():
    arrays = as_arrays({"a": torch.ones(3, dtype=torch.bfloat16), "b": np.ones(2)})
    assert arrays["a"].dtype == np.float32


def test_model_files_are_read_by_safetensors_and_the_reverse(tmp_path):
    weights = get_weights(Net()) | {
        "empty": np.zeros((0, 4)),
        "flag": np.array([True, False]),
        "h": np.ones(3, np.float16),
    }
    path = tmp_path / "model.safetensors"
    modelfile.save(path, weights, {"job": "j1"})
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]
    theirs = load_file(path)
    mine, metadata = modelfile.load(path)
    assert metadata == {"job": "j1"}
    assert theirs.keys() == mine.keys() == weights.keys()
    for name, array in weights.items():
        assert np.array_equal(theirs[name], array)
        assert np.array_equal(mine[name], array)
        assert mine[name].shape == array.shape
    save_file({"x": np.arange(6, dtype=np.int32).reshape(2, 3)}, path)
    assert modelfile.load(path)[0]["x"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 20, b"\x02" + b"\0" * 7 + b"[]", b"\x02" + b"\0" * 7 + b"{"],
)  # fmt: skip
def test_a_damaged_model_file_is_refused(tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(WorkerError, match="is no model file"):
        modelfile.load(path)


def test_a_model_file_whose_array_lies_outside_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    text = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    with pytest.raises(WorkerError, match="an array lies outside of it"):
        modelfile.load(path)
