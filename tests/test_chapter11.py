"""What chapter 11 does only for a reader who is online, and how it splits its text: neither shows in its outputs."""

from pathlib import Path

import nbformat
import pytest

torchvision = pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parents[1]
CELLS = [c.source for c in nbformat.read(ROOT / "book/11-your-own-network.ipynb", as_version=4).cells]


def cell(fragment):
    (found,) = [source for source in CELLS if fragment in source]
    return found


@pytest.fixture
def chapter():
    """The chapter's names, as far as the cell that asks for pretrained weights needs them."""
    names = {"ONLINE": False, "FOLDER": ""}
    exec(cell("import torchvision\n"), names)
    return names


def untrained(monkeypatch):
    """Stand random weights of a small network in for both downloads; return the names that were asked for."""
    asked = []

    def model(name, weights):
        asked.append((name, weights))
        return torchvision.models.resnet18(num_classes=5)

    monkeypatch.setattr(torchvision.models, "get_model", model)
    return asked


def test_no_download_is_tried_unasked(chapter, monkeypatch, capsys):
    asked = untrained(monkeypatch)
    exec(cell("def pretrained_or_none"), chapter)
    assert chapter["pretrained_or_none"]("resnet50") is None
    assert asked == []
    assert capsys.readouterr().out == ""


def test_online_cell_takes_both_networks_apart_on_the_photographs(chapter, monkeypatch, capsys):
    asked = untrained(monkeypatch)
    exec(cell("def pretrained_or_none"), chapter | {"ONLINE": True, "TRIALS": 2})
    assert [name for name, _ in asked] == ["resnet50", "vit_b_16"]
    assert all(weights.meta["categories"] for _, weights in asked)
    printed = capsys.readouterr().out
    assert "resnet50" in printed
    assert printed.count("layer") == 10, "the five worst units of either network"
    assert printed.count("complete shuffles: mean error") == 2
    assert printed.count("of 8 units") == 2


def test_lost_connection_is_reported_and_skipped(chapter, monkeypatch, capsys):
    def fails(name, weights):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models, "get_model", fails)
    exec(cell("def pretrained_or_none"), chapter | {"ONLINE": True, "TRIALS": 2})
    assert "resnet50: no weights (no route to host)" in capsys.readouterr().out


def test_images_of_a_folder_are_used(chapter, tmp_path):
    from PIL import Image

    for name, color in (("a.png", "red"), ("sub/b.JPG", "blue"), ("notes.txt", None)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), color).save(tmp_path / name) if color else (tmp_path / name).write_text("no image")
    chapter["FOLDER"] = str(tmp_path)
    exec(cell("def pretrained_or_none"), chapter)
    transform = torchvision.models.ResNet50_Weights.DEFAULT.transforms()
    images = chapter["photographs"](transform)
    assert images.shape == (2, 3, 224, 224)
    assert images[0, 0].mean() > images[0, 2].mean()
    assert images[1, 0].mean() < images[1, 2].mean()


def test_no_paragraph_is_on_both_sides_of_the_split(chapter):
    from pydoc_data.topics import topics

    exec(cell("class GPT").split("class Attention")[0], chapter)
    alphabet = chapter["alphabet"]
    training, held_out = (
        "".join(alphabet[i] for i in chapter[part].tolist()) for part in ("training_text", "held_out")
    )
    here, there = (set(part.split("\n\n")) for part in (training, held_out))
    assert here.isdisjoint(there)
    assert len(there) > 100
    every = {part.strip("\n") for topic in topics.values() for part in topic.split("\n\n")}
    assert sorted((training + held_out).split("\n\n")) == sorted(every), "each paragraph once, and none lost"
