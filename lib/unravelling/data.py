"""Real images in memory: scikit-learn's digits and CIFAR-10, as uint8 tensors with seeded augmentation."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import stat
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from .chain import FLAG, check_kind, check_number

SPLITS = ("train", "test")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

LARGEST = 2**20
"""Bytes that the file of one image of 32×32 pixels may have."""

Device = torch.device | str


def _check_tensor(name: str, value: Any, dtype: torch.dtype, dimensions: str) -> None:
    if not isinstance(value, Tensor) or value.dtype != dtype or value.dim() != len(dimensions):
        found = f"one {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a tensor ({', '.join(dimensions)}) of {dtype}, not {found}")


def check_device(device: Device) -> None:
    """Raise ValueError for a device that cannot be used here."""
    try:
        torch.zeros((), device=device).item()
    except (AssertionError, RuntimeError, TypeError, ValueError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {device!r} cannot be used here ({reason}): choose another, such as 'cpu'") from error


@dataclass(frozen=True)
class Split:
    """Images of one split, and how they are normalised.

    Attributes:
        images: ``(N, C, H, W)``, uint8.
        labels: ``(N,)``, int64.
        mean: of every channel of the training images, ``(C,)``, in the units of ``images``.
        std: likewise, the standard deviation.
    """

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        for name, dimensions in (("images", "NCHW"), ("labels", "N"), ("mean", "C"), ("std", "C")):
            dtype = {"images": torch.uint8, "labels": torch.int64}.get(name, torch.float32)
            _check_tensor(name, getattr(self, name), dtype, dimensions)
        (n, channels), sizes = self.images.shape[:2], (len(self.labels), len(self.mean), len(self.std))
        if sizes != (n, channels, channels):
            raise ValueError(f"{n} images of {channels} channels need as many labels, mean and std, not {sizes}")
        if (self.labels < 0).any():
            raise ValueError(f"a label is {int(self.labels.min())}: expected classes from 0")
        if not (self.mean.isfinite() & (self.std > 0)).all():
            moments = f"mean {self.mean.tolist()} must be finite and std {self.std.tolist()} above 0"
            raise ValueError(f"{moments}: is a channel the same everywhere?")

    def __len__(self) -> int:
        return len(self.labels)

    def normalize(self, images: Tensor) -> Tensor:
        """Map uint8 images ``(B, C, H, W)`` to float32, with mean 0 and deviation 1 over the training images."""
        _check_tensor("images", images, torch.uint8, "BCHW")
        mean, std = (t.to(images.device).view(1, -1, 1, 1) for t in (self.mean, self.std))
        return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)

    def batches(self, size: int = 500, device: Device = "cpu") -> list[tuple[Tensor, Tensor]]:
        """Return all images in order as normalised batches ``(B, C, H, W)`` with labels ``(B,)``."""
        size = check_number(1, size=size)
        check_device(device)
        pairs = zip(self.images.split(size), self.labels.split(size), strict=True)
        return [(self.normalize(x.to(device)), y.to(device)) for x, y in pairs]

    def shuffled(
        self, size: int, generator: torch.Generator, *, crop: int = 0, flip: bool = False, device: Device = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one epoch of ``size`` images a batch in random order, the last incomplete one left out.

        They are augmented as by `augment`. The generator of order, crops and flips is on the CPU, so that every
        ``device``, to which the batches go, sees the same ones.
        """
        size = check_number(1, size=size)
        check_device(device)
        if size > len(self):
            raise ValueError(f"a batch of {size} images needs at least as many: this split has {len(self)}")
        order = torch.randperm(len(self), generator=generator).to(device)
        images, labels = self.images.to(device), self.labels.to(device)  # a GPU cuts its own batches
        for chosen in order.split(size)[: len(self) // size]:
            yield self.normalize(augment(images[chosen], generator, crop=crop, flip=flip)), labels[chosen]

    def take(self, chosen: Tensor) -> Split:
        """Return the split of the images with the given indices ``(M,)``."""
        _check_tensor("chosen", chosen, torch.int64, "M")
        if len(chosen) and not -len(self) <= int(chosen.min()) <= int(chosen.max()) < len(self):
            raise ValueError(f"chosen holds {int(chosen.max())}: expected indices below {len(self)}, of this split")
        return Split(self.images[chosen], self.labels[chosen], self.mean, self.std)

    def stratified(self, per_class: int) -> Split:
        """Return the split of the first ``per_class`` images of every class, in their old order; always the same ones.

        Raises ValueError where a class has fewer.
        """
        check_number(1, per_class=per_class)
        members = [torch.nonzero(self.labels == label).flatten() for label in self.labels.unique()]
        fewest = min(map(len, members), default=0)
        if fewest < per_class:
            raise ValueError(f"{per_class} images of every class are wanted, but one class has {fewest}: take fewer")
        return self.take(torch.cat([m[:per_class] for m in members]).sort().values)


@dataclass(frozen=True)
class Dataset:
    """A training, a validation and a test split; choices are made on validation, test errors are only reported.

    Attributes:
        name: ``"digits"`` or ``"cifar10"``.
        classes: names of the classes, in the order of the labels.
        label: names the very copy of the images, such as ``"CIFAR-10 (JPEG copy)"``, for records.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    label: str = ""


def augment(images: Tensor, generator: torch.Generator, *, crop: int = 0, flip: bool = False) -> Tensor:
    """Return images ``(B, C, H, W)`` shifted by up to ``crop`` pixels each way over zeros, half of them mirrored."""
    _check_tensor("images", images, torch.uint8, "BCHW")
    check_kind(*FLAG, flip=flip)
    b, _, h, w = images.shape
    if crop := check_number(crop=crop):
        top, left = torch.randint(2 * crop + 1, (2, b, 1), generator=generator)
        padded = torch.nn.functional.pad(images, (crop,) * 4)
        chosen = torch.arange(b)[:, None, None], (top + torch.arange(h))[:, :, None], (left + torch.arange(w))[:, None]
        image, row, column = (index.to(images.device) for index in chosen)
        images = padded[image, :, row, column].permute(0, 3, 1, 2)
    if flip:
        mirrored = torch.rand(b, generator=generator).to(images.device) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images


Pair = tuple[Tensor, Tensor]
"""Images ``(N, C, H, W)`` and labels ``(N,)``."""


def _splits(pool: Pair, sizes: dict[str, int], test: Pair | None = None) -> tuple[Split, Split, Split]:
    """Cut the splits in ``sizes`` (images a class) out of ``pool``, stratified and always the same; the rest trains."""
    images, labels = pool
    random = np.random.RandomState(0)  # NumPy freezes this stream, so the split is the same on every machine
    members = [torch.from_numpy(random.permutation(np.flatnonzero(labels == i))) for i in labels.unique()]
    chosen, first = {}, 0
    for split, size in (*sizes.items(), ("train", len(labels))):
        chosen[split] = torch.cat([m[first : first + size] for m in members]).sort().values
        first += size
    # moments from counts of the 256 values: exact, and without a float copy of all images
    channels, values = images[chosen["train"]].unbind(1), torch.arange(256.0, dtype=torch.float64)
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in channels]).double()
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ values
    moments = mean.float(), (share @ values**2 - mean**2).sqrt().float()
    pairs = {split: (images[i], labels[i]) for split, i in chosen.items()} | ({} if test is None else {"test": test})
    train, validation, tested = (Split(*pairs[split], *moments) for split in ("train", "validation", "test"))
    return train, validation, tested


def digits() -> Dataset:
    """Return the 1,797 handwritten digits that scikit-learn ships, 1×8×8 pixels of 0 to 16.

    The split is stratified and the same on every machine: 1,097 to train, 200 to validate, 500 to test. No download.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    pool = torch.from_numpy(raw.images.astype(np.uint8))[:, None], torch.from_numpy(raw.target.astype(np.int64))
    return Dataset("digits", *_splits(pool, {"test": 50, "validation": 20}), tuple("0123456789"), "digits")


def cifar10(
    root: str | Path | None = None, *, download: bool = False, cache: str | Path | None = None,
    per_class: tuple[int, int] = (5000, 1000),
) -> Dataset:
    """Return CIFAR-10, 3×32×32 pixels: 45,000 images to train, 5,000 to validate and 10,000 to test.

    Args:
        root: a folder with torchvision's ``cifar-10-batches-py``; or one with images (PNG, WebP or JPEG) as
            ``train/<class>/*`` and ``test/<class>/*``; or a ``.tar.xz`` of the latter, or a folder with one of those.
            The environment variable ``UNRAVELLING_DATA`` when None.
        download: fetch torchvision's files into ``root`` when they are not there.
        cache: folder for the decoded images; ``UNRAVELLING_CACHE`` or ``~/.cache/unravelling`` when None.
        per_class: training and test images expected of each class; other numbers admit a subset.

    Raises:
        FileNotFoundError: no CIFAR-10 at ``root``.
        ValueError: classes or images are missing, or there are more; or one cannot be decoded, or is no plain file.
        OSError: the cache could not be written.
    """
    check_kind(*FLAG, download=download)
    root = os.environ.get("UNRAVELLING_DATA") if root is None else root
    if root is None:
        ways = "Pass cifar10(root) or set UNRAVELLING_DATA; cifar10(root, download=True) fetches it"
        raise FileNotFoundError(f"where is CIFAR-10? {ways}")
    if not isinstance(per_class, (tuple, list)) or len(per_class) != 2:
        raise ValueError(f"per_class {per_class!r} must be two numbers, of images to train on and to test on")
    check_number(2, per_class=per_class[0])
    check_number(1, per_class=per_class[1])
    root, copy = check_path(root=root), ""
    if download or (root / "cifar-10-batches-py").is_dir():
        pool, test = (_torchvision_files(root, train, download) for train in (True, False))
    else:
        folder = os.environ.get("UNRAVELLING_CACHE") or "~/.cache/unravelling" if cache is None else cache
        decoded, copy = _cached(_find_images(root), check_path(cache=folder))
        pool, test = ((decoded[f"{split}_images"], decoded[f"{split}_labels"]) for split in SPLITS)
    for split, (_, labels), expected in zip(SPLITS, (pool, test), per_class, strict=True):
        for name, count in zip(CIFAR10_CLASSES, labels.bincount(minlength=10).tolist(), strict=True):
            if count != expected:
                found = f"{count} images in {split}/{name}, expected {expected}"
                raise ValueError(f"{root}: {found}: is the copy complete?")
    splits = _splits(pool, {"validation": max(1, per_class[0] // 10)}, test)
    return Dataset("cifar10", *splits, CIFAR10_CLASSES, f"CIFAR-10{copy}")


def _torchvision_files(root: Path, train: bool, download: bool) -> Pair:
    from torchvision.datasets import CIFAR10

    try:
        raw = CIFAR10(root, train=train, download=download)  # checks MD5 sums before it unpickles
    except (RuntimeError, OSError) as error:
        what = f"{root / 'cifar-10-batches-py'} is incomplete or corrupt, or out of reach ({error})"
        raise ValueError(f"{what}: delete it and call cifar10(root, download=True)") from error
    return torch.from_numpy(raw.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(raw.targets)


def _find_images(root: Path) -> Path:
    """Return the folder with train/ and test/, or the archive."""
    if (root / "train").is_dir() and (root / "test").is_dir():
        return root
    archives = [path for path in (root, *root.glob("*.tar.xz")) if path.name.endswith(".tar.xz") and path.is_file()]
    if len(archives) == 1:
        return archives[0]
    what = "cifar-10-batches-py/, or train/<class>/* and test/<class>/*, or one .tar.xz of these"
    raise FileNotFoundError(f"no CIFAR-10 at {root}: expected {what}; cifar10(root, download=True) fetches the first")


class _Member(tarfile.TarInfo):
    """An entry of an archive; one that is no file, such as a long name, is refused by its size before it is read."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> _Member:
        member = super().frombuf(buf, encoding, errors)
        if member.size > LARGEST and not member.isreg():
            raise tarfile.ReadError(f"{member.name} has {member.size:,} bytes, expected {LARGEST:,} at most")
        return member


def _admit(source: Path, name: str, is_file: bool, size: int) -> None:
    """Raise ValueError for what is no file of an image of 32×32 pixels, before anything of it is read."""
    if not is_file:
        raise ValueError(f"{source}: {name} is a folder, a link or a device, expected the file of an image")
    if size > LARGEST:
        raise ValueError(f"{source}: {name} has {size:,} bytes, expected {LARGEST:,} at most for 32×32 pixels")


def _listing(folder: Path) -> dict[str, os.stat_result]:
    """Return the files ``train/<class>/<file>`` and ``test/<class>/<file>`` of a folder, each one admitted."""
    found = {}
    for path in sorted(path for split in SPLITS for path in (folder / split).glob("*/*")):
        name = path.relative_to(folder).as_posix()
        try:
            found[name] = path.stat()
        except OSError as error:  # links that lead nowhere, or in a circle
            raise ValueError(f"{folder}: {name} cannot be read ({error}), expected the file of an image") from error
        _admit(folder, name, stat.S_ISREG(found[name].st_mode), found[name].st_size)
    return found


def _image_files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield ``train/<class>/<file>`` or ``test/<class>/<file>`` and the file's bytes, whatever holds it."""
    if source.is_dir():
        for name in _listing(source):
            yield name, (source / name).read_bytes()
        return
    import lzma  # Python can be built without it

    try:
        with lzma.open(source) as stream, tarfile.open(fileobj=stream, mode="r:", tarinfo=_Member) as archive:
            for member in archive:  # nothing is extracted
                parts = PurePosixPath(member.name).parts[-3:]
                wanted = len(parts) == 3 and parts[0] in SPLITS
                _admit(source, member.name, member.isreg() or not wanted, member.size)
                if wanted and (file := archive.extractfile(member)) is not None:
                    yield "/".join(parts), file.read()
            if len(stream.read(LARGEST)) == LARGEST:  # reads on to the checksum, which comes last
                raise ValueError(f"{source} goes on after the end of its archive: copy it again")
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
        raise ValueError(f"{source} is truncated or corrupt ({error}): copy it again") from error


def _decode(source: Path) -> tuple[dict[str, Tensor], str]:
    """Return images and labels of both splits, and what a label says about a lossy copy."""
    from PIL import Image

    found: dict[str, np.ndarray] = {}
    lossy: set[str] = set()
    for name, content in tqdm(_image_files(source), desc="decoding CIFAR-10", unit=" images", leave=False):
        if (label := name.split("/")[1]) not in CIFAR10_CLASSES:
            raise ValueError(f"{source}: {label!r} is not a class of CIFAR-10: expected {', '.join(CIFAR10_CLASSES)}")
        if name in found:
            raise ValueError(f"{source}: {name} is there twice: pack one copy alone")
        try:
            image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP"))
            found[name] = np.asarray(image.convert("RGB") if image.size == (32, 32) else ())
        except Exception as error:  # Pillow raises many kinds for a damaged or an overlarge image
            raise ValueError(f"{source}: {name} is not an image that can be read ({error}): copy it again") from error
        if image.mode.startswith("I"):  # Pillow would make all of them white
            raise ValueError(f"{source}: {name} has 16 bits a channel, expected 8")
        if image.size != (32, 32):
            raise ValueError(f"{source}: {name} has {image.size[0]}×{image.size[1]} pixels, expected 32×32")
        if image.format == "JPEG" or (image.format == "WEBP" and b"VP8L" not in content):
            lossy.add(image.format)
    decoded = {}
    for split in SPLITS:
        names = sorted(name for name in found if name.startswith(split))
        if not names:
            raise ValueError(f"{source}: no images in {split}/<class>/")
        # class by class, the first images would all show aeroplanes: an order that is mixed, and always the same
        names = np.random.RandomState(0).permutation(names).tolist()
        stack = torch.from_numpy(np.stack([found[name] for name in names]))
        decoded[f"{split}_images"] = stack.permute(0, 3, 1, 2).contiguous()
        decoded[f"{split}_labels"] = torch.tensor([CIFAR10_CLASSES.index(name.split("/")[1]) for name in names])
    return decoded, f" ({', '.join(sorted(lossy))} copy)" if lossy else ""


def _cached(source: Path, folder: Path) -> tuple[dict[str, Tensor], str]:
    """Return what `_decode` does, from a file where there is a whole one made from the same images."""
    files = {"": source.stat()} if source.is_file() else _listing(source)
    state = [(name, status.st_size, status.st_mtime_ns) for name, status in files.items()]
    path, began = folder / f"cifar10-{checksum([str(source.resolve()), state])[:16]}.safetensors", time.time()
    with contextlib.suppress(ValueError):  # not there, or damaged
        about, decoded = read_tensors(path)
        if about:
            return decoded, about["copy"]
    decoded, copy = _decode(source)
    write_tensors(path, decoded, {"copy": copy})
    for left in folder.glob(f".{path.name}.*"):  # by a process that was killed while it wrote
        if left.stat().st_mtime < began:
            left.unlink(missing_ok=True)
    return decoded, copy


def check_path(**path: Any) -> Path:
    """Return the one argument given by name as a path, ``~`` being the home, or raise TypeError or ValueError."""
    ((name, value),) = path.items()
    check_kind(str | Path, "a path", **path)
    if not str(value) or "\0" in str(value):
        raise ValueError(f"{name} {str(value)!r} names no file or folder")
    return Path(os.path.expanduser(value))


def write_tensors(path: Path, tensors: dict[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors, as `write_atomically`, to a safetensors file with a header of JSON values, and a checksum."""
    try:
        head = json.loads(json.dumps(about))
    except (TypeError, ValueError) as error:
        raise TypeError(f"the header of {path} must hold JSON values alone: {error}") from error
    head["checksum"] = checksum([head, tensors])
    write_atomically(path, lambda temporary: save_file(tensors, temporary, {"unravelling": json.dumps(head)}))


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return header and tensors of a file of `write_tensors`; of another's, an empty header.

    Raises ValueError where the file cannot be read, or its content does not match its checksum.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}): fetch it again") from error
    try:
        head = dict(json.loads(metadata["unravelling"]))
        stated = head.pop("checksum")
    except (KeyError, TypeError, ValueError):
        return {}, tensors
    if stated != checksum([head, tensors]):
        raise ValueError(f"{path} is damaged: its content does not match its checksum. Fetch it again")
    return head | {"checksum": stated}, tensors


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary)`` and rename the result to ``path``, so that ``path`` is never half-written.

    Raises OSError where the file could not be written; an earlier one is kept.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)  # what the umask grants; safetensors would let nobody else read
        write(temporary)
        temporary.chmod(mode)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        raise OSError(f"{path} could not be written ({error}): is the disk full? An earlier file is kept") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def checksum(content: Any) -> str:
    """Return the SHA-256, in hexadecimal, of tensors, numbers and texts in dicts (in any order), lists and tuples."""
    digest, rest = hashlib.sha256(), [content]
    while rest:  # in the order in which the parts stand
        value = rest.pop()
        if isinstance(value, Mapping):
            value = sorted(value.items(), key=lambda item: str(item[0]))
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)};".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, (list, tuple)):
            digest.update(f"{len(value)} parts;".encode())
            rest.extend(reversed(value))
        else:
            digest.update(f"{value!r};".encode())
    return digest.hexdigest()


def load_dataset(name: str, root: str | Path | None = None) -> Dataset:
    """Return `digits` or `cifar10` by name; ``root`` says where CIFAR-10 is."""
    if name not in ("digits", "cifar10"):
        raise ValueError(f"unknown dataset {name!r:.80}: expected digits or cifar10")
    return digits() if name == "digits" else cifar10(root)
