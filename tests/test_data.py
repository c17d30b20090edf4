"""Data: frozen splits, moments, augmentation against a loop, and CIFAR-10 in every layout it comes in."""

import hashlib
import io
import lzma
import os
import pickle
import re
import shutil
import stat
import struct
import subprocess
import tarfile
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from unravelling import Split, cifar10, digits
from unravelling import data as data_module
from unravelling.data import CIFAR10_CLASSES, augment, load_dataset

PER_CLASS = (6, 2)


# ---------------------------------------------------------------- digits


def test_digits_are_split_once_and_for_all():
    data = digits()
    parts = (data.train, data.validation, data.test)
    assert [len(part) for part in parts] == [1097, 200, 500]
    assert data.validation.labels.bincount().tolist() == [20] * 10
    assert data.test.labels.bincount().tolist() == [50] * 10
    digest = hashlib.sha256()
    for part in parts:
        assert part.images.shape[1:] == (1, 8, 8)
        assert (part.images.dtype, part.labels.dtype) == (torch.uint8, torch.int64)
        digest.update(part.images.numpy().tobytes() + part.labels.numpy().tobytes())
    assert digest.hexdigest() == "8cc05372563468061fa667c1e0aae5e75a5c5d833e497b2bcd9f9ac9f2324886"
    assert data.classes == tuple("0123456789")


def test_the_digits_are_disjoint_and_all_there():
    raw = load_digits()
    pairs = zip(raw.images.astype(np.uint8), raw.target, strict=True)
    expected = Counter((image.tobytes(), int(label)) for image, label in pairs)
    data = digits()
    found = Counter()
    for part in (data.train, data.validation, data.test):
        found += Counter((x.numpy().tobytes(), int(y)) for x, y in zip(part.images, part.labels, strict=True))
    assert found == expected


def test_normalisation_is_numpys_over_the_training_images():
    data = digits()
    train = data.train.images.numpy().astype(np.float64)
    for part in (data.train, data.validation, data.test):
        assert np.allclose(part.mean.numpy(), train.mean((0, 2, 3)), rtol=1e-6)
        assert np.allclose(part.std.numpy(), train.std((0, 2, 3)), rtol=1e-6)
    expected = (data.test.images.numpy() - train.mean()) / train.std()
    assert np.allclose(data.test.normalize(data.test.images).numpy(), expected, atol=1e-5)
    normalized = data.train.normalize(data.train.images)
    assert normalized.dtype == torch.float32
    assert abs(normalized.mean()) < 1e-4
    assert abs(normalized.std(correction=0) - 1) < 1e-4


def test_every_channel_has_its_own_moments():
    images = torch.randint(256, (20, 3, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images[:, 1] //= 4
    labels = torch.arange(20) % 2
    train_split, _, test_split = data_module._splits((images, labels), {"validation": 2}, (images, labels))
    train = train_split.images.numpy().astype(np.float64)
    assert np.allclose(train_split.mean.numpy(), train.mean((0, 2, 3)), rtol=1e-6)
    assert np.allclose(test_split.std.numpy(), train.std((0, 2, 3)), rtol=1e-6)


def test_batches_hold_every_image_in_order():
    test = digits().test
    batches = test.batches(150)
    assert [len(y) for _, y in batches] == [150, 150, 150, 50]
    assert [len(y) for _, y in digits().train.batches()] == [500, 500, 97]
    assert torch.equal(torch.cat([y for _, y in batches]), test.labels)
    assert torch.equal(torch.cat([x for x, _ in batches]), test.normalize(test.images))


def test_take_keeps_the_moments():
    train = digits().train
    few = train.take(torch.tensor([5, 3]))
    assert torch.equal(few.images, train.images[[5, 3]])
    assert torch.equal(few.labels, train.labels[[5, 3]])
    assert (few.mean, few.std) == (train.mean, train.std)


@pytest.mark.parametrize("chosen", [torch.tensor([1097]), torch.tensor([-1098, 0])])
def test_indices_beyond_a_split(chosen):
    with pytest.raises(ValueError, match=r"^chosen holds \d+: expected indices below 1097, of this split$"):
        digits().train.take(chosen)


WANTED = "images must be a tensor (N, C, H, W) of torch.uint8"
IMAGES, LABELS = torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.arange(4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": IMAGES.double()}, TypeError, f"{WANTED}, not one (4, 3, 2, 2) of torch.float64"),
        ({"images": IMAGES.numpy()}, TypeError, f"{WANTED}, not ndarray"),
        ({"images": IMAGES[:, 0]}, TypeError, f"{WANTED}, not one (4, 2, 2) of torch.uint8"),
        ({"labels": LABELS.int()}, TypeError, "labels must be a tensor (N) of torch.int64, not one (4,)"),
        ({"labels": LABELS - 1}, ValueError, "a label is -1: expected classes from 0"),
        ({"labels": LABELS[:3]}, ValueError, "need as many labels, mean and std, not (3, 3, 3)"),
        ({"mean": torch.zeros(1)}, ValueError, "need as many labels, mean and std, not (4, 1, 3)"),
        ({"std": torch.tensor([1.0, 0, 1])}, ValueError, "and std [1.0, 0.0, 1.0] above 0: is a channel the same"),
        ({"std": torch.full((3,), torch.nan)}, ValueError, "and std [nan, nan, nan] above 0"),
        ({"mean": torch.full((3,), torch.nan)}, ValueError, "mean [nan, nan, nan] must be finite"),
    ],
)  # fmt: skip
def test_what_is_no_split(changes, error, message):
    parts = {"images": IMAGES, "labels": LABELS, "mean": torch.zeros(3), "std": torch.ones(3)}
    assert len(Split(**parts)) == 4
    with pytest.raises(error, match=re.escape(message)):
        Split(**parts | changes)


def test_a_device_that_is_not_there():
    train, where = digits().train, "cuda:77"
    for call in (lambda: train.batches(10, where), lambda: next(train.shuffled(10, torch.Generator(), device=where))):
        with pytest.raises(ValueError, match=r"^device 'cuda:77' cannot be used here \(.*\): choose another, such as"):
            call()


@pytest.mark.parametrize("device", ["hpu", "privateuseone", "meta", "CPU", "", 3.5])
def test_a_device_without_its_module_or_without_values(device):
    with pytest.raises(ValueError, match=r"^device .* cannot be used here \(.*\): choose another, such as 'cpu'"):
        digits().test.batches(10, device)


def test_numbers_of_numpy_will_do():
    test = digits().test
    assert [len(y) for _, y in test.batches(np.int8(100))] == [100] * 5
    x, y = next(test.shuffled(np.int64(7), torch.Generator(), crop=np.int64(1)))
    assert (len(x), len(y)) == (7, 7)
    assert len(test.stratified(np.int16(2))) == 20


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"crop": -1}, ValueError, "crop must be at least 0, not -1"),
        ({"crop": 1.0}, TypeError, "crop must be a whole number, not 1.0"),
        ({"crop": True}, TypeError, "crop must be a whole number, not True"),
        ({"images": torch.zeros(1, 1, 8, 8)}, TypeError, "images must be a tensor (B, C, H, W) of torch.uint8"),
        ({"images": torch.zeros(8, 8).byte()}, TypeError, "images must be a tensor (B, C, H, W) of torch.uint8"),
    ],
)
def test_augmentations_that_make_no_sense(arguments, error, message):
    with pytest.raises(error, match=rf"^{re.escape(message)}"):
        augment(**{"images": digits().test.images[:3], "generator": torch.Generator()} | arguments)


def test_load_dataset_knows_two_names():
    assert load_dataset("digits").name == "digits"
    with pytest.raises(ValueError, match=r"^unknown dataset 'mnist': expected digits or cifar10$"):
        load_dataset("mnist")


# ---------------------------------------------------------------- batches for training


def every_augmentation(image, crop, flip):
    """All images that cropping and mirroring can make of a (C, H, W) one, pixel by pixel."""
    h, w = image.shape[1:]
    made = {}
    for top in range(-crop, crop + 1):
        for left in range(-crop, crop + 1):
            for mirrored in (False, True)[: 1 + flip]:
                out = np.zeros_like(image)
                for i in range(h):
                    for j in range(w):
                        source = i + top, (w - 1 - j if mirrored else j) + left
                        if 0 <= source[0] < h and 0 <= source[1] < w:
                            out[:, i, j] = image[:, source[0], source[1]]
                made[out.tobytes()] = top, left, mirrored
    return made


@pytest.mark.parametrize(("crop", "flip"), [(0, False), (1, False), (0, True), (1, True), (2, True)])
def test_augmentation_makes_what_the_loop_makes_and_each_equally_often(crop, flip):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(1, 256, (3, 4, 5), generator=generator).to(torch.uint8)
    made = every_augmentation(image.numpy(), crop, flip)
    outcomes = (2 * crop + 1) ** 2 * (1 + flip)
    assert len(made) == outcomes
    draws = 200 * outcomes
    out = augment(image.expand(draws, -1, -1, -1), generator, crop=crop, flip=flip)
    assert out.shape == (draws, 3, 4, 5)
    assert out.dtype == torch.uint8
    seen = Counter(made[x.contiguous().numpy().tobytes()] for x in out)  # KeyError: no augmentation of this image
    assert len(seen) == outcomes
    assert all(abs(n - 200) < 5 * 200**0.5 for n in seen.values())


def test_augmentation_treats_every_image_of_a_batch_as_its_own():
    images = torch.randint(1, 256, (50, 2, 4, 4), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    before = images.clone()
    out = augment(images, torch.Generator().manual_seed(2), crop=1, flip=True)
    moves = [every_augmentation(a.numpy(), 1, True)[b.contiguous().numpy().tobytes()]
             for a, b in zip(images, out, strict=True)]  # fmt: skip
    assert len(set(moves)) > 10
    assert torch.equal(images, before)


def numbered(count=10):
    """A split whose images carry their own number."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return Split(images, torch.arange(count), torch.zeros(1), torch.ones(1))


def test_shuffled_batches_show_each_image_once_with_its_label():
    split = numbered()
    batches = list(split.shuffled(3, torch.Generator().manual_seed(0)))
    assert [x.shape for x, _ in batches] == [(3, 1, 2, 2)] * 3
    labels = torch.cat([y for _, y in batches])
    assert len(set(labels.tolist())) == 9
    assert labels.tolist() != sorted(labels.tolist())
    assert torch.equal(torch.cat([x for x, _ in batches])[:, 0, 0, 0], labels.float())


def test_shuffled_batches_follow_the_generator():
    def epochs(seed):
        generator = torch.Generator().manual_seed(seed)
        return [
            torch.cat([x.flatten() for x, _ in numbered().shuffled(5, generator, crop=1, flip=True)]) for _ in range(2)
        ]

    before = torch.get_rng_state()
    first, again, other = epochs(1), epochs(1), epochs(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_cuts_the_batches_that_a_processor_cuts():
    here, there = (
        list(digits().train.shuffled(64, torch.Generator().manual_seed(2), crop=2, flip=True, device=device))
        for device in ("cpu", "cuda")
    )
    for (x, y), (xx, yy) in zip(here, there, strict=True):
        assert xx.is_cuda
        assert torch.equal(y, yy.cpu())
        assert torch.allclose(x, xx.cpu(), rtol=1e-6, atol=1e-6)


def test_a_batch_larger_than_the_split():
    with pytest.raises(ValueError, match=r"^a batch of 11 images needs at least as many: this split has 10$"):
        next(numbered().shuffled(11, torch.Generator()))


# ---------------------------------------------------------------- CIFAR-10


@pytest.fixture(scope="module")
def pixels():
    """{split: {class: [images (32, 32, 3)]}}, random but smooth enough for JPEG."""
    random = np.random.default_rng(0)
    return {
        split: {
            name: [np.kron(random.integers(0, 256, (8, 8, 3)), np.ones((4, 4, 1))).astype(np.uint8) for _ in range(n)]
            for name in CIFAR10_CLASSES
        }
        for split, n in zip(("train", "test"), PER_CLASS, strict=True)
    }


def write_images(root, pixels, suffix="png"):
    for split, classes in pixels.items():
        for name, arrays in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i, array in enumerate(arrays):
                Image.fromarray(array).save(folder / f"{i:04}.{suffix}")
    return root


def contents(data):
    """What a dataset holds: counts of (split, class, bytes of the image); validation is part of train."""
    found = Counter()
    for split, part in (("train", data.train), ("train", data.validation), ("test", data.test)):
        for x, y in zip(part.images, part.labels, strict=True):
            found[split, data.classes[y], x.permute(1, 2, 0).numpy().tobytes()] += 1
    return found


def expected_contents(pixels):
    return Counter((split, c, a.tobytes()) for split, classes in pixels.items() for c, v in classes.items() for a in v)


@pytest.fixture
def root(tmp_path, pixels):
    return write_images(tmp_path / "images", pixels)


def test_a_folder_of_png_images(root, pixels):
    data = cifar10(root, per_class=PER_CLASS)
    assert contents(data) == expected_contents(pixels)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [50, 10, 20]
    assert data.validation.labels.bincount().tolist() == [1] * 10
    assert data.train.images.shape == (50, 3, 32, 32)
    assert data.name == "cifar10"
    assert data.classes == CIFAR10_CLASSES == tuple(sorted(CIFAR10_CLASSES))


def test_a_folder_of_jpeg_images(tmp_path, pixels):
    root = write_images(tmp_path / "images", pixels, "jpg")
    expected = Counter(
        (path.parts[-3], path.parts[-2], np.asarray(Image.open(path)).tobytes()) for path in root.glob("*/*/*.jpg")
    )
    assert contents(cifar10(root, per_class=PER_CLASS)) == expected
    assert sum(expected.values()) == 80


def test_grey_and_palette_images_become_colour(root, pixels):
    path = root / "train" / "cat" / "0000.png"
    Image.open(path).convert("L").save(path)
    grey = np.repeat(np.asarray(Image.open(path))[..., None], 3, 2)
    assert contents(cifar10(root, per_class=PER_CLASS))["train", "cat", grey.tobytes()] == 1


@pytest.mark.parametrize("prefix", ["", "./", "some/where/"])
@pytest.mark.parametrize("inside", [True, False])
def test_an_archive_of_the_folder(root, tmp_path, pixels, prefix, inside):
    folder = tmp_path / "archive"
    folder.mkdir()
    with tarfile.open(folder / "images.tar.xz", "w:xz", preset=0) as archive:
        for path in sorted(root.rglob("*")):
            archive.add(path, prefix + path.relative_to(root).as_posix(), recursive=False)
    before = sorted(folder.rglob("*"))
    source = folder if inside else folder / "images.tar.xz"
    assert contents(cifar10(source, per_class=PER_CLASS)) == expected_contents(pixels)
    assert sorted(folder.rglob("*")) == before, "something was extracted"


def torchvision_files(root, pixels, monkeypatch):
    """Write the pickles of the original distribution, and make torchvision expect their checksums."""
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)

    def dump(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((base / name).read_bytes()).hexdigest()

    def rows(split, part):
        pairs = [(a, i) for i, c in enumerate(CIFAR10_CLASSES) for a in pixels[split][c][part]]
        order = np.random.default_rng(1).permutation(len(pairs))
        return {
            "data": np.stack([pairs[i][0].transpose(2, 0, 1).ravel() for i in order]),
            "labels": [pairs[i][1] for i in order],
        }

    train = [[f"data_batch_{i}", dump(f"data_batch_{i}", rows("train", slice(i, 6, 3)))] for i in range(3)]
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", train)
    test = [["test_batch", dump("test_batch", rows("test", slice(None)))]]
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", test)
    checksum = dump("batches.meta", {"label_names": [*CIFAR10_CLASSES]})
    meta = {"filename": "batches.meta", "key": "label_names", "md5": checksum}
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", meta)
    return root


def test_the_files_of_torchvision(tmp_path, pixels, monkeypatch):
    root = torchvision_files(tmp_path / "original", pixels, monkeypatch)
    assert contents(cifar10(root, per_class=PER_CLASS)) == expected_contents(pixels)


@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
@pytest.mark.parametrize("harm", ["truncated", "absent"])
def test_harmed_files_of_torchvision(tmp_path, pixels, monkeypatch, name, harm):
    root = torchvision_files(tmp_path / "original", pixels, monkeypatch)
    path = root / "cifar-10-batches-py" / name
    if harm == "absent":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"batches-py is incomplete or corrupt, .*: delete it and call cifar10\("):
        cifar10(root, per_class=PER_CLASS)


def test_torchvisions_checksums_guard_the_pickles(tmp_path, pixels, monkeypatch):
    root = torchvision_files(tmp_path / "original", pixels, monkeypatch)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (root / "cifar-10-batches-py" / "data_batch_0").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="incomplete or corrupt"):
        cifar10(root, per_class=PER_CLASS)
    assert not (tmp_path / "executed").exists()


def test_images_are_decoded_once(root, pixels, monkeypatch, tmp_path):
    first = cifar10(root, per_class=PER_CLASS)
    with monkeypatch.context() as context:
        context.setattr(data_module, "_decode", lambda source: pytest.fail("decoded again"))
        second = cifar10(root, per_class=PER_CLASS)
    for part in ("train", "validation", "test"):
        a, b = getattr(first, part), getattr(second, part)
        assert all(torch.equal(getattr(a, key), getattr(b, key)) for key in ("images", "labels", "mean", "std"))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    # an image is replaced: the cache no longer holds
    path = root / "test" / "dog" / "0001.png"
    changed = {**pixels, "test": {**pixels["test"], "dog": [pixels["test"]["dog"][0], 255 - pixels["test"]["dog"][1]]}}
    Image.fromarray(changed["test"]["dog"][1]).save(path)
    os.utime(path, ns=(1, 1))
    assert contents(cifar10(root, per_class=PER_CLASS)) == expected_contents(changed)


def test_the_cache_goes_where_it_is_told(root, tmp_path):
    cifar10(root, per_class=PER_CLASS, cache=tmp_path / "elsewhere")
    assert [path.suffix for path in (tmp_path / "elsewhere").iterdir()] == [".safetensors"]
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_whole_is_not_written(root, tmp_path, monkeypatch, pixels):
    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(data_module, "save_file", full_disk)
        with pytest.raises(OSError, match="No space left"):
            cifar10(root, per_class=PER_CLASS)
    assert not any((tmp_path / "cache").iterdir())
    assert contents(cifar10(root, per_class=PER_CLASS)) == expected_contents(pixels)


def test_the_environment_says_where_the_data_is(root, monkeypatch, pixels):
    monkeypatch.setenv("UNRAVELLING_DATA", str(root))
    assert contents(cifar10(per_class=PER_CLASS)) == expected_contents(pixels)


# ---------------------------------------------------------------- faults


def test_nobody_said_where_the_data_is():
    with pytest.raises(FileNotFoundError, match=r"where is CIFAR-10\? Pass cifar10\(root\) or set UNRAVELLING_DATA"):
        cifar10()


@pytest.mark.parametrize("root", ["~nobody-of-this-name/images", "a\0b"])
def test_a_folder_that_cannot_be(root):
    with pytest.raises((FileNotFoundError, ValueError), match=r"^no CIFAR-10 at ~nobody|names no file or folder$"):
        cifar10(root)


@pytest.mark.parametrize("made", [True, False])
def test_no_data_there(tmp_path, made):
    folder = tmp_path / "nothing"
    if made:
        folder.mkdir()
    with pytest.raises(FileNotFoundError, match=f"no CIFAR-10 at {re.escape(str(folder))}: expected cifar-10-"):
        cifar10(folder)


def test_the_default_expects_all_of_cifar10(root):
    with pytest.raises(ValueError, match="6 images in train/airplane, expected 5000: is the copy complete"):
        cifar10(root)


def test_a_missing_class(root):
    shutil.rmtree(root / "train" / "horse")
    with pytest.raises(ValueError, match="0 images in train/horse, expected 6: is the copy complete"):
        cifar10(root, per_class=PER_CLASS)


@pytest.mark.parametrize(("split", "count", "expected"), [("train", 5, 6), ("test", 1, 2)])
def test_a_missing_image(root, split, count, expected):
    (root / split / "frog" / "0001.png").unlink()
    with pytest.raises(ValueError, match=f"{count} images in {split}/frog, expected {expected}: is the copy complete"):
        cifar10(root, per_class=PER_CLASS)


def test_no_test_images(root):
    for path in (root / "test").glob("*/*"):
        path.unlink()
    with pytest.raises(ValueError, match="no images in test/<class>/"):
        cifar10(root, per_class=PER_CLASS)


def test_an_unknown_class(root):
    (root / "train" / "cat").rename(root / "train" / "unicorn")
    with pytest.raises(ValueError, match=r"'unicorn' is not a class of CIFAR-10: expected airplane, .*, truck$"):
        cifar10(root, per_class=PER_CLASS)


def test_an_image_of_another_size(root):
    Image.new("RGB", (28, 30)).save(root / "test" / "ship" / "0000.png")
    with pytest.raises(ValueError, match=r"test/ship/0000.png has 28×30 pixels, expected 32×32"):
        cifar10(root, per_class=PER_CLASS)


def test_a_file_that_is_no_image(root, tmp_path):
    (root / "train" / "bird" / "0003.png").write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"train/bird/0003.png is not an image that can be read .*: copy it again"):
        cifar10(root, per_class=PER_CLASS)
    assert not list(tmp_path.glob("cache/*"))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_cut_short_anywhere_is_noticed_or_whole(tmp_path, pixels, suffix):
    path = tmp_path / "images" / "test" / "deer" / f"0000.{suffix}"
    path.parent.mkdir(parents=True)
    Image.fromarray(pixels["test"]["deer"][0]).save(path)
    whole = path.read_bytes()
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"deer/0000\.\w+ is not an image|no images in train") as caught:
            data_module._decode(path.parents[2])
        if "no images in train" in str(caught.value):
            assert end >= len(whole) - 16, "only the end marker may be missing"


def archived(root, path):
    with tarfile.open(path, "w:xz", preset=0) as archive:
        archive.add(root, "images")
    return path


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_archive(root, tmp_path, share):
    path = archived(root, tmp_path / "images.tar.xz")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"images.tar.xz is truncated or corrupt .*: copy it again"):
        cifar10(path, per_class=PER_CLASS)
    assert not list(tmp_path.glob("cache/*"))


@pytest.mark.parametrize("share", [0, 0.2, 0.5, 0.8])
def test_an_archive_with_a_wrong_byte(root, tmp_path, share):
    path = archived(root, tmp_path / "images.tar.xz")
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"\.tar\.xz(: .* is not an image| is truncated or corrupt) .*: copy it again"):
        cifar10(path, per_class=PER_CLASS)
    assert not list(tmp_path.glob("cache/*"))


@pytest.mark.parametrize("from_the_end", [3, 20, 36])
def test_an_archive_with_a_wrong_byte_that_only_its_checksum_shows(root, tmp_path, from_the_end):
    path = archived(root, tmp_path / "images.tar.xz")
    content = bytearray(lzma.compress(lzma.decompress(path.read_bytes()) + bytes(200_000), preset=0))
    path.write_bytes(content)
    cifar10(path, per_class=PER_CLASS)
    content[-from_the_end] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"images\.tar\.xz is truncated or corrupt .*: copy it again"):
        cifar10(path, per_class=PER_CLASS, cache=tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_an_archive_that_goes_on_after_its_end(root, tmp_path):
    path = archived(root, tmp_path / "images.tar.xz")
    path.write_bytes(lzma.compress(lzma.decompress(path.read_bytes()) + bytes(2**21), preset=0))
    with pytest.raises(ValueError, match=r"images\.tar\.xz goes on after the end of its archive: copy it again"):
        cifar10(path, per_class=PER_CLASS)


def test_two_archives_are_one_too_many(root, tmp_path):
    folder = tmp_path / "archives"
    folder.mkdir()
    for name in ("a", "b"):
        archived(root, folder / f"{name}.tar.xz")
    with pytest.raises(FileNotFoundError, match=r"or one \.tar\.xz of these"):
        cifar10(folder, per_class=PER_CLASS)


@pytest.mark.parametrize("per_class", [(1, 1), (2, 0), (2, True), (2.0, 1), 2, (2,), None])
def test_numbers_of_images_leave_some_to_train_on_to_validate_and_to_test(root, per_class):
    with pytest.raises((ValueError, TypeError), match=r"^per_class"):
        cifar10(root, per_class=per_class)


# ---------------------------------------------------------------- which copy, and which images


@pytest.mark.parametrize(
    ("suffix", "options", "copy"),
    [("png", {}, ""), ("webp", {"lossless": True}, ""), ("jpg", {"quality": 100}, " (JPEG copy)"),
     ("jpg", {"quality": 5}, " (JPEG copy)"), ("webp", {"quality": 90}, " (WEBP copy)")],
)  # fmt: skip
@pytest.mark.parametrize("all_of_them", [True, False])
def test_the_label_tells_a_lossy_copy_from_the_pixels(root, suffix, options, copy, all_of_them):
    for path in sorted(root.glob("*/*/*.png"))[None if all_of_them else -1 :]:
        image = Image.open(path)
        path.unlink()
        image.save(path.with_suffix(f".{suffix}"), **options)
    for _ in range(2):  # decoded, and from the cache
        assert cifar10(root, per_class=PER_CLASS).label == f"CIFAR-10{copy}"
    assert digits().label == "digits"


def test_other_files_beside_the_classes_say_nothing_of_the_label(root, tmp_path):
    for name in ("a/b/notes.txt", "train/README", "about.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("no image")
    assert cifar10(root, per_class=PER_CLASS).label == "CIFAR-10"
    with tarfile.open(tmp_path / "images.tar.xz", "w:xz", preset=0) as archive:
        archive.add(root, "")
    assert cifar10(tmp_path / "images.tar.xz", per_class=PER_CLASS).label == "CIFAR-10"


def test_a_stratified_split_holds_the_first_images_of_every_class():
    labels = torch.tensor([0, 1, 1, 0, 2, 2, 0, 1, 2])
    split = Split(torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1), labels, torch.zeros(1), torch.ones(1))
    assert split.stratified(2).images.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert split.stratified(1).labels.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"^4 images of every class are wanted, but one class has 3: take fewer$"):
        split.stratified(4)


# ---------------------------------------------------------------- hostile and damaged files


def png(width, height):
    """A PNG that says it has this size, and holds next to nothing."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 99)),
              (b"IEND", b"")]  # fmt: skip
    body = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def in_another_format(name):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, format=name)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (in_another_format("eps"), "is not an image that can be read"),
        (in_another_format("bmp"), "is not an image that can be read"),
        (in_another_format("gif"), "is not an image that can be read"),
        (png(5000, 4000), "has 5000×4000 pixels, expected 32×32"),
        (png(10**5, 10**5), r"is not an image that can be read \(.*bomb"),
        (png(32, 32) + bytes(2**20), r"has 1,048,\d+ bytes, expected 1,048,576 at most for 32×32 pixels"),
        (b"", "is not an image that can be read"),
    ],
    ids=["eps", "bmp", "gif", "large", "bomb", "heavy", "empty"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_only_small_png_jpeg_and_webp_are_decoded(tmp_path, monkeypatch, content, message, packed):
    source = tmp_path / "images"
    path = source / "train" / "bird" / "0003.png"
    path.parent.mkdir(parents=True)
    (source / "test").mkdir()
    path.write_bytes(content)
    if packed:
        source = archived(source, tmp_path / "images.tar.xz")
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("started a program"))
    with pytest.raises(ValueError, match=rf"images(\.tar\.xz)?: (images/)?train/bird/0003\.png {message}"):
        cifar10(source)
    assert not (tmp_path / "cache").exists()


def test_what_is_no_file_in_a_folder_is_named(root):
    path = root / "train" / "bird" / "0003.png"
    outside = root / "outside"
    outside.mkdir()
    makers = {
        "is a folder, a link or a device": [lambda: os.mkfifo(path), path.mkdir, lambda: path.symlink_to(outside)],
        "cannot be read": [lambda: path.symlink_to(path.name), lambda: path.symlink_to("nowhere.png")],
    }
    for message, several in makers.items():
        for make in several:
            path.unlink() if path.is_symlink() or not path.is_dir() else path.rmdir()
            make()
            with pytest.raises(ValueError, match=rf"images: train/bird/0003\.png {message}.*expected the file of an"):
                cifar10(root, per_class=PER_CLASS)


@pytest.mark.parametrize("name", ["train", "train/bird"])
def test_links_in_a_circle_above_the_images(root, name):
    shutil.rmtree(root / name)
    (root / name).symlink_to((root / name).name)
    with pytest.raises((FileNotFoundError, ValueError), match=r"no CIFAR-10 at .*images|0 images in train/bird"):
        cifar10(root, per_class=PER_CLASS)


def test_a_pipe_with_the_name_of_an_archive(tmp_path):
    os.mkfifo(tmp_path / "images.tar.xz")
    for root in (tmp_path, tmp_path / "images.tar.xz"):
        with pytest.raises(FileNotFoundError, match=f"no CIFAR-10 at {root}"):
            cifar10(root)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_what_is_no_file_in_an_archive_is_named(root, tmp_path, kind):
    member = tarfile.TarInfo("images/train/bird/more.png")
    member.type, member.linkname = kind, "/etc/hostname"
    with tarfile.open(tmp_path / "images.tar.xz", "w:xz", preset=0) as archive:
        archive.add(root, "images")
        archive.addfile(member)
    with pytest.raises(ValueError, match=r"\.tar\.xz: images/train/bird/more\.png is a folder, a link or a device"):
        cifar10(tmp_path / "images.tar.xz", per_class=PER_CLASS)


@pytest.mark.parametrize("name", ["images/train/bird/large.png", "elsewhere"])
def test_an_overlarge_member_is_not_read(tmp_path, name):
    member = tarfile.TarInfo(name)
    member.size = 2**40
    with lzma.open(tmp_path / "images.tar.xz", "w", preset=0) as stream:
        stream.write(member.tobuf() + bytes(2**16))
    with pytest.raises(ValueError, match=rf"\.tar\.xz: {name} has 1,099,511,627,776 bytes, expected 1,048,576 at most"):
        cifar10(tmp_path / "images.tar.xz")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_a_long_name_of_an_archive_is_no_bomb(tmp_path, monkeypatch, kind):
    """Such an entry belongs to the next one, and is read in one go wherever it claims to end."""
    member = tarfile.TarInfo("images/train/bird/large.png")
    member.type, member.size = kind, 2**33
    with lzma.open(tmp_path / "images.tar.xz", "w", preset=0) as stream:
        stream.write(member.tobuf(tarfile.GNU_FORMAT) + bytes(2**16))
    read, asked = lzma.LZMAFile.read, []
    monkeypatch.setattr(lzma.LZMAFile, "read", lambda self, size=-1: (asked.append(size), read(self, size))[1])
    with pytest.raises(ValueError, match=r"corrupt \(images/train/bird/large\.png has 8,589,934,592 bytes, expected"):
        cifar10(tmp_path / "images.tar.xz")
    assert max(asked) < 2**20


def test_an_image_that_is_there_twice(root, tmp_path):
    with tarfile.open(tmp_path / "images.tar.xz", "w:xz", preset=0) as archive:
        archive.add(root, "one")
        archive.add(root, "two")
    with pytest.raises(ValueError, match=r"\.tar\.xz: \w+/\w+/0000\.png is there twice: pack one copy alone"):
        cifar10(tmp_path / "images.tar.xz", per_class=PER_CLASS)


@pytest.mark.parametrize(("split", "count", "expected"), [("train", 7, 6), ("test", 3, 2)])
def test_an_image_more_than_expected(root, split, count, expected):
    shutil.copy(root / split / "frog" / "0001.png", root / split / "frog" / "more.png")
    with pytest.raises(ValueError, match=f"{count} images in {split}/frog, expected {expected}: is the copy complete"):
        cifar10(root, per_class=PER_CLASS)


# ---------------------------------------------------------------- files written whole


@pytest.mark.parametrize("harm", ["flipped", "flipped label", "truncated", "empty", "foreign", "no checksum"])
def test_a_damaged_cache_is_made_again(root, tmp_path, pixels, harm):
    cifar10(root, per_class=PER_CLASS)
    (path,) = (tmp_path / "cache").iterdir()
    content = path.read_bytes()
    at = len(content) - 4000
    new = {
        "flipped": content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :],
        "flipped label": content.replace(rb'\"copy\": \"\"', rb'\"copy\":\"!\"'),
        "truncated": content[:-9],
        "empty": b"",
        "no checksum": content.replace(b"checksum", b"checkstm"),
    }.get(harm)
    path.write_bytes(new) if new is not None else save_file({"weight": torch.zeros(3)}, path)
    assert path.read_bytes() != content
    data = cifar10(root, per_class=PER_CLASS)
    assert contents(data) == expected_contents(pixels)
    assert data.label == "CIFAR-10"
    assert path.read_bytes() == content


def test_what_a_killed_process_left_in_the_cache_is_cleaned_away(root, tmp_path):
    cifar10(root, per_class=PER_CLASS)
    (path,) = (tmp_path / "cache").iterdir()
    path.unlink()
    left, other = path.with_name(f".{path.name}.77"), path.with_name(".another.safetensors.77")
    for file in (left, other):
        file.write_bytes(b"half")
    cifar10(root, per_class=PER_CLASS)
    assert sorted(path.parent.iterdir()) == [other, path]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_others_may_read_a_file_as_far_as_the_umask_lets_them(tmp_path, mask):
    before = os.umask(mask)
    try:
        data_module.write_tensors(tmp_path / "a.safetensors", {"weight": torch.zeros(3)}, {})
        data_module.write_atomically(tmp_path / "a.pt", lambda to: torch.save({}, to))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~mask}


def test_a_file_is_renamed_into_place_and_an_open_one_stays_whole(tmp_path):
    path, made = tmp_path / "a.txt", []
    path.write_text("before")

    def write(temporary):
        assert path.read_text() == "before"
        temporary.write_text("after")
        made.append(temporary.stat().st_ino)

    with path.open() as earlier:
        data_module.write_atomically(path, write)
        assert earlier.read() == "before"
    assert path.read_text() == "after"
    assert path.stat().st_ino == made[0], "a copy, which a kill can leave half-written"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("write failed"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_earlier_file_alone(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("before")

    def write(temporary):
        temporary.write_text("ha")
        raise error

    with pytest.raises((KeyboardInterrupt, OSError)) as caught:
        data_module.write_atomically(path, write)
    expected = "" if isinstance(error, KeyboardInterrupt) else f"{path} could not be written ({error}): is the"
    assert str(caught.value).startswith(expected)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match=r"a\.txt/b could not be written"):
        data_module.write_atomically(path / "b", write)


def test_a_checksum_tells_apart_all_that_is_not_equal():
    contents = [
        1, 1.0, "1", None, True, [1], [[1]], [1, 1], {"1": 1}, {1: 1}, {"1": [1]}, [1, [1]], [[1], 1],
        torch.ones(1), torch.ones(1, 1), torch.ones(1).double(), torch.ones(2), torch.tensor(1), -torch.zeros(1),
        torch.zeros(1), {"a": 1, "b": 2}, {"a": 2, "b": 1},
    ]  # fmt: skip
    assert len({data_module.checksum(content) for content in contents}) == len(contents)
    assert data_module.checksum({"a": 1, "b": (2, 3)}) == data_module.checksum({"b": [2, 3], "a": 1})
    x = torch.arange(6.0).view(2, 3)
    assert data_module.checksum(x.t().contiguous().t()) == data_module.checksum(x)


def test_an_image_of_sixteen_bits_is_refused(root):
    """Pillow would make nearly all of it white."""
    path = root / "train" / "bird" / "0003.png"
    Image.fromarray(np.full((32, 32), 30_000, np.uint16)).save(path)
    with pytest.raises(ValueError, match=r"train/bird/0003\.png has 16 bits a channel, expected 8"):
        cifar10(root, per_class=PER_CLASS)


def test_the_folder_that_one_is_in(root, monkeypatch):
    monkeypatch.chdir(root)
    assert len(cifar10(".", per_class=PER_CLASS).test) == len(cifar10(root, per_class=PER_CLASS).test) > 0
