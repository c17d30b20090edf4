"""Weights files: they give back every bit, say what they are, and say what is wrong with them."""

import json
import pickle
import random as random_module
import re
import resource
import struct
from pathlib import Path

import pytest
import torch
from helpers import SMALL, images, randomized, small, snapshot
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from unravelling import Chain, build, load, resnet, save
from unravelling import data as data_module
from unravelling.weights import header

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A project folder to work in."""
    (tmp_path / "project" / "data" / "results").mkdir(parents=True)
    inside = tmp_path / "project" / "book"
    inside.mkdir()
    monkeypatch.chdir(inside)
    return tmp_path / "project" / "data" / "weights"


@pytest.mark.parametrize("kind", SMALL)
def test_a_file_gives_back_every_bit(kind, tmp_path):
    chain, (x, _) = small(kind), images()
    before = snapshot(chain)
    path = save(chain, tmp_path / "folder" / "a.safetensors", recipe="digits", seed=3, test_error=0.125)
    assert snapshot(chain) == before
    for name in (path, str(path)):
        again = load(name)
        assert snapshot(again)["bytes"] == before["bytes"]
        assert not any(part.training for part in again.modules())
        assert again.config == chain.config
        assert repr(again) == repr(chain)
        with torch.no_grad():
            assert torch.allclose(again(x), chain(x), rtol=1e-5, atol=1e-6)  # another memory layout, other rounding
    assert not {p.data_ptr() for p in again.parameters()} & {p.data_ptr() for p in chain.parameters()}


def test_the_header_says_what_the_file_is(tmp_path):
    chain = small("post")
    path = save(chain, tmp_path / "a.safetensors", recipe="digits", seed=3, test_error=0.125, notes=["a", None])
    head = header(path)
    architecture = {"name": "resnet14-post", "in_channels": 1, "classes": 10, "width": 4}
    assert head["architecture"] == chain.config == architecture
    assert (head["format"], head["recipe"], head["seed"], head["test_error"]) == ("unravelling/1", "digits", 3, 0.125)
    assert head["notes"] == ["a", None]
    assert head["versions"]["torch"] == torch.__version__


def test_the_file_is_plain_safetensors(tmp_path):
    chain = small("pre")
    path = save(chain, tmp_path / "a.safetensors", seed=1)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])  # the format: a length, JSON, and the tensors' bytes
    layout = json.loads(content[8 : 8 + length])
    assert json.loads(layout.pop("__metadata__")["unravelling"])["seed"] == 1
    state = chain.state_dict()
    assert layout.keys() == state.keys()
    for name, tensor in state.items():
        begin, end = (8 + length + offset for offset in layout[name]["data_offsets"])
        assert content[begin:end] == tensor.numpy().tobytes()
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == state.keys()


def test_a_network_in_another_memory_layout_and_in_training(tmp_path):
    chain = small("pre").to(memory_format=torch.channels_last).train()
    path = save(chain, tmp_path / "a.safetensors")
    assert chain.training
    again = load(path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in chain.state_dict().items())
    assert not again.training


def test_reordered_networks_come_back_reordered(tmp_path):
    chain, (x, _) = resnet(20, width=3, in_channels=1).eval(), images()
    moved = chain.reordered([2, 1, 0, 3, 5, 4, 6, 7, 8])
    again = load(save(moved, tmp_path / "a.safetensors"))
    assert torch.allclose(again(x), moved(x), atol=1e-6)


def test_only_intact_networks_of_the_library_can_be_saved(tmp_path):
    scaled = small("pre").with_units(unit.scaled(0.5) for unit in small("pre").units)
    path = tmp_path / "a.safetensors"
    other = small("pre").with_units(unit.then(nn.ReLU()) for unit in small("pre").units)
    chains = small("pre").without(2), scaled, other, small("pre").split(0.5), Chain(nn.Identity(), [], nn.Flatten())
    for chain in chains:
        with pytest.raises(ValueError, match=r"^only an intact network made by unravelling\.nets can be rebuilt"):
            save(chain, path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limited", ["by us", "by the system"])
def test_a_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch, limited):
    path = save(small("pre"), tmp_path / "a.safetensors", seed=1)
    content = path.read_bytes()

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limited == "by us":
        monkeypatch.setattr(data_module, "save_file", full_disk)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, hard))
    try:
        for name in ("a", "b"):
            with pytest.raises(OSError, match=rf"{name}\.safetensors could not be written \(.*\): is the disk full\?"):
                save(small("post"), tmp_path / f"{name}.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.read_bytes() == content


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_network_of_another_type_comes_back_in_it(tmp_path, dtype):
    chain = small("pre", dtype)
    again = load(save(chain, tmp_path / "a.safetensors"))
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert snapshot_bits(again) == snapshot_bits(chain)


@pytest.mark.parametrize("half", [False, True])
def test_parts_of_different_types_keep_theirs(tmp_path, half):
    chain = small("pre")
    chain.head.double()
    again = load(save(chain, tmp_path / "a.safetensors", half=half))
    if not half:
        assert snapshot_bits(again) == snapshot_bits(chain)
    kinds = [{name: tensor.dtype for name, tensor in one.state_dict().items() if not half or tensor.dim() == 1}
             for one in (again, chain)]  # fmt: skip
    assert kinds[0] == kinds[1]
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_loaded_weights_do_not_depend_on_their_file(tmp_path):
    chain = small("pre")
    path = save(chain, tmp_path / "a.safetensors")
    again = load(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert snapshot_bits(again) == snapshot_bits(chain)


def snapshot_bits(chain):
    return {
        name: tensor.contiguous().view(-1).view(torch.uint8).tolist() for name, tensor in chain.state_dict().items()
    }


@pytest.mark.parametrize("path", ["a\0.safetensors", "\0"])
def test_a_name_that_no_file_can_have(path):
    for call in (load, header, lambda path: save(small("pre"), path)):
        with pytest.raises(ValueError, match=r"^(path|name) '.*\\x00.*' names no file or folder$"):
            call(path)


@pytest.mark.parametrize("name", ["format", "architecture", "versions", "dtype", "checksum"])
def test_what_save_writes_itself_cannot_be_overwritten(tmp_path, name):
    with pytest.raises(
        ValueError, match=rf"^the header's entry '{name}' is written by save itself: choose another name$"
    ):
        save(small("pre"), tmp_path / "a.safetensors", **{"versions": "x", name: "x"})  # the first of both is named
    assert not list(tmp_path.iterdir())


def test_a_flipped_bit_is_noticed_anywhere(tmp_path):
    path = save(small("pre"), tmp_path / "a.safetensors", seed=3, error=0.125)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    seed = content.index(b'seed\\": 3') + 8
    tensors = torch.linspace(8 + length, len(content) - 1, 40).long().tolist()
    for at in (seed, *tensors):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        for read in (load, header):
            with pytest.raises(ValueError, match=r"a\.safetensors is damaged: its content does not match its checksum"):
                read(path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("half", [False, True])
def test_one_wrong_bit_anywhere_is_noticed_or_changes_nothing(tmp_path, half):
    """Only a letter's case can change without effect, where JSON has two forms of a number or an escape."""
    path = save(small("pre"), tmp_path / "a.safetensors", seed=3, error=1e-7, half=half)
    content, head, tensors = path.read_bytes(), header(path), load(path).state_dict()
    length = 8 + struct.unpack("<Q", content[:8])[0]
    random = random_module.Random(0)
    for at in [*range(9), *random.sample(range(length), 400), *random.sample(range(length, len(content)), 100)]:
        wrong = bytearray(content)
        wrong[at] ^= 1 << random.randrange(8)
        path.write_bytes(wrong)
        try:
            read, message = (header(path), load(path).state_dict()), None
        except ValueError as error:
            message = str(error)
        if message:
            assert message.startswith(f"{path} ")
        else:
            assert at < length
            assert read[0] == head
            assert all(torch.equal(read[1][name], tensor) for name, tensor in tensors.items())


def test_the_weights_of_another_network_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    chain = small("pre")
    state = {**chain.state_dict(), "extra.weight": torch.zeros(2)}
    del state["head.2.weight" if "head.2.weight" in state else next(reversed(chain.state_dict()))]
    data_module.write_tensors(path, state, {"format": "unravelling/1", "architecture": chain.config})
    with pytest.raises(ValueError, match=r"(?s)does not fit the architecture in its .*Missing key.*extra\.weight"):
        load(path)
    torch.save(chain.state_dict(), tmp_path / "a.pt")
    with pytest.raises((ValueError, FileNotFoundError), match=r"a\.pt"):
        load(tmp_path / "a.pt")


def test_a_file_that_lacks_its_checksum_is_refused(tmp_path):
    chain = small("pre")
    head = {"format": "unravelling/1", "architecture": chain.config, "versions": {"torch": "2.8"}, "dtype": "float32"}
    path = tmp_path / "a.safetensors"
    save_file(chain.state_dict(), path, {"unravelling": json.dumps(head)})
    for read in (load, header):
        with pytest.raises(ValueError, match=r"a\.safetensors was not written by unravelling\.save, or is damaged"):
            read(path)


def test_the_checksum_tells_networks_apart(tmp_path):
    first, again, other = (
        header(save(resnet(8, width=2, seed=seed), tmp_path / f"{i}.safetensors"))["checksum"]
        for i, seed in enumerate((0, 0, 1))
    )
    assert first == again != other


@pytest.mark.parametrize("share", [0, 0.001, 0.2, 0.7, 0.9999])
def test_a_truncated_file(tmp_path, share):
    path = save(small("pre"), tmp_path / "a.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    for read in (load, header):
        with pytest.raises(ValueError, match=r"a\.safetensors is truncated or no safetensors file \(.*\): fetch"):
            read(path)


def test_a_pickle_under_the_wrong_name_is_not_opened(tmp_path):
    path = tmp_path / "a.safetensors"

    class Evil:
        def __reduce__(self):
            return (tmp_path / "executed").mkdir, ()

    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="is truncated or no safetensors file"):
        load(path)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is truncated or no safetensors file"):
        load(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "metadata",
    [None, {"format": "pt"}, {"unravelling": "{}"}, {"unravelling": '{"format": "unravelling/0"}'},
     {"unravelling": "not JSON"}, {"unravelling": "[]"}],
)  # fmt: skip
def test_a_foreign_file(tmp_path, metadata):
    path = tmp_path / "a.safetensors"
    save_file({"weight": torch.zeros(3)}, path, metadata)
    with pytest.raises(ValueError, match=r"a\.safetensors was not written by unravelling\.save, or is damaged: its"):
        load(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": "resnet20"}, "Missing key"),
        ({"name": "resnet8"}, "Unexpected key"),
        ({"width": 5}, "size mismatch"),
        ({"name": "resnet14-post"}, "Missing key"),
        ({"name": "resnet15"}, "depth 15 is not 6n"),
        ({"name": "alexnet"}, "unknown network 'alexnet'"),
        ({"name": None}, "unknown network None"),
        ({"colour": 3}, "unexpected keyword argument 'colour'"),
    ],
)
def test_a_header_that_does_not_fit_the_tensors(tmp_path, change, reason):
    chain = small("pre")
    chain.config = chain.config | change
    path = save(chain, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=rf"(?s)a\.safetensors does not fit the architecture in its.*{reason}"):
        load(path)


def test_a_header_without_architecture(tmp_path):
    path = tmp_path / "a.safetensors"
    fitting = {"architecture": small("pre").config, "dtype": "float31"}
    for architecture in ({}, {"architecture": {}}, {"architecture": 3}, fitting):
        data_module.write_tensors(path, {"weight": torch.zeros(3)}, {"format": "unravelling/1"} | architecture)
        with pytest.raises(ValueError, match="does not fit the architecture in its header"):
            load(path)


def test_shipped_networks_are_found_by_name(shipped):
    chain = small("pre")
    for name in ("digits/b-seed0", "digits/a-seed0", "cifar10/c"):
        save(chain, shipped / f"{name}.safetensors", what=name)
    assert header("digits/a-seed0")["what"] == "digits/a-seed0"
    assert snapshot(load("digits/b-seed0"))["bytes"] == snapshot(chain)["bytes"]
    message = "no weights named 'digits/d': there are cifar10/c, digits/a-seed0, digits/b-seed0"
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        load("digits/d")
    with pytest.raises(FileNotFoundError, match=r"^no weights at nowhere\.safetensors$"):
        load("nowhere.safetensors")


def test_nothing_is_shipped(shipped):
    with pytest.raises(FileNotFoundError, match=r"^no weights named 'digits/d': there are none$"):
        load("digits/d")


def test_half_precision_halves_the_file_and_rounds_only_matrices_and_kernels(tmp_path):
    chain = randomized(build("vgg15", "digits", width=24))
    for name, buffer in chain.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(4097)  # which half precision cannot hold
    whole, small = save(chain, tmp_path / "whole.safetensors"), save(chain, tmp_path / "half.safetensors", half=True)
    assert small.stat().st_size < 0.6 * whole.stat().st_size
    assert header(small)["half"] is True
    with pytest.raises(TypeError, match="positional"):  # what a third argument would mean is to be said
        save(chain, tmp_path / "half.safetensors", True)
    loaded = load(small).state_dict()
    for name, tensor in chain.state_dict().items():
        expected = tensor.to(torch.float16).to(tensor.dtype) if tensor.dim() > 1 else tensor
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], expected)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("path", sorted((ROOT / "data/weights").rglob("*.safetensors")), ids=lambda path: path.stem)
def test_every_shipped_file_has_a_checksum(path):
    assert header(path)["checksum"]
    assert len(load(path).units) > 1


def test_a_file_that_load_would_not_take_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"model\.pt: expected a file that ends with \.safetensors$"):
        save(small("pre"), tmp_path / "model.pt")
    chain = small("pre")
    with torch.no_grad():
        chain.units[0].branch[2].weight[0, 0] = 1e5  # float16 ends at 65,504
    with pytest.raises(ValueError, match=r"^units\.0\.branch\.2\.weight is too large for float16"):
        save(chain, tmp_path / "half.safetensors", half=True)
    assert not list(tmp_path.iterdir())
