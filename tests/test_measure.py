"""The measurements: which images they use, and that they say so."""

import torch
from helpers import small
from unravelling import Dataset, Split, digits, measure


def many(per_class=210):
    """A dataset of the digits with more test images than are used for thousands of lesions."""
    data = digits()
    labels = torch.arange(10).repeat(per_class)
    images = torch.stack([data.test.images[data.test.labels == label][0] for label in labels])
    test = Split(images, labels, data.test.mean, data.test.std)
    return Dataset("digits", data.train, data.validation, test, data.classes, data.label)


def test_thousands_of_lesions_use_all_of_a_small_test_split_and_a_fixed_part_of_a_large_one():
    chain = small("pre").eval()
    few, images = measure._some(digits(), chain)
    assert (len(few), images) == (500, "all 500 test images")
    part, images = measure._some(many(), chain)
    assert (len(part), images) == (1000, "the first 100 test images of every class")
    assert part.labels.bincount().tolist() == [100] * 10


def test_every_table_says_how_many_images_it_used(monkeypatch):
    monkeypatch.setattr(measure, "TRIALS", 2)
    chain, data = small("pre").eval(), many()
    table = measure.delete_each(chain, data, 0)
    assert set(table["images"]) == {2100}
    assert table.attrs["images"] == "all 2100 test images"
    table = measure.delete_random(chain, data, 0)
    assert set(table["images"]) == {1000}
    assert table.attrs["images"] == "the first 100 test images of every class"


def test_the_spectrum_uses_more_batches_where_there_are_more_images():
    chain = small("pre").eval()
    table = measure.spectrum(chain, digits(), 0)
    assert table.groupby("split")["batch"].nunique().to_dict() == {"test": 5, "train": 5}
    table = measure.spectrum(chain, many(), 0)
    assert table.query("split == 'test'")["batch"].nunique() == 10
    shares = table.groupby(["split", "batch"])["share"].sum()
    assert (shares - 1).abs().max() < 1e-4
