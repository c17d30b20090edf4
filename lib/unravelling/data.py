"""Real images in memory: scikit-learn's digits and CIFAR-10, as uint8 tensors with seeded augmentation."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


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

    def __len__(self) -> int:
        return len(self.labels)

    def normalize(self, images: Tensor) -> Tensor:
        """Map uint8 images ``(B, C, H, W)`` to float32, with mean 0 and deviation 1 over the training images."""
        mean, std = (t.to(images.device).view(1, -1, 1, 1) for t in (self.mean, self.std))
        return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)

    def batches(self, size: int = 500, device: torch.device | str = "cpu") -> list[tuple[Tensor, Tensor]]:
        """Return all images in order as normalised batches ``(B, C, H, W)`` with labels ``(B,)``."""
        return [
            (self.normalize(x.to(device)), y.to(device))
            for x, y in zip(self.images.split(size), self.labels.split(size), strict=True)
        ]

    def shuffled(
        self,
        size: int,
        generator: torch.Generator,
        *,
        crop: int = 0,
        flip: bool = False,
        device: torch.device | str = "cpu",
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one epoch of augmented batches in random order, the last incomplete one left out.

        Args:
            size: images a batch, B.
            generator: source of order, crops and flips; on the CPU, so that every device sees the same batches.
            crop: pixels of zero padding on each side, from which a window of the old size is cut at random.
            flip: whether half of the images are mirrored.
            device: where the batches go.
        """
        if size > len(self):
            raise ValueError(f"a batch of {size} images needs at least as many: this split has {len(self)}")
        order = torch.randperm(len(self), generator=generator)
        for chosen in order.split(size)[: len(self) // size]:
            x = augment(self.images[chosen], generator, crop=crop, flip=flip)
            yield self.normalize(x.to(device)), self.labels[chosen].to(device)

    def take(self, chosen: Tensor) -> Split:
        """Return the split of the images with the given indices."""
        return Split(self.images[chosen], self.labels[chosen], self.mean, self.std)

    def stratified(self, per_class: int) -> Split:
        """Return the split of the first ``per_class`` images of every class, in their old order; always the same ones.

        Raises:
            ValueError: a class has fewer images.
        """
        members = [torch.nonzero(self.labels == label).flatten() for label in self.labels.unique()]
        fewest = min(map(len, members))
        if fewest < per_class:
            raise ValueError(f"{per_class} images of every class are wanted, but one class has {fewest}: take fewer")
        return self.take(torch.cat([m[:per_class] for m in members]).sort().values)


@dataclass(frozen=True)
class Dataset:
    """A training, a validation and a test split; choices are made on validation, test errors are only reported.

    Attributes:
        name: ``"digits"`` or ``"cifar10"``.
        classes: names of the classes, in the order of the labels.
        label: names the very copy of the images, such as ``"CIFAR-10 (JPEG-75 copy)"``, for tables and figures.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    label: str = ""


def augment(images: Tensor, generator: torch.Generator, *, crop: int = 0, flip: bool = False) -> Tensor:
    """Return images ``(B, C, H, W)`` shifted by up to ``crop`` pixels each way over zeros, half of them mirrored."""
    b, _, h, w = images.shape
    if crop:
        top, left = torch.randint(2 * crop + 1, (2, b, 1), generator=generator)
        padded = torch.nn.functional.pad(images, (crop,) * 4)
        rows, columns = top + torch.arange(h), left + torch.arange(w)
        images = padded[torch.arange(b)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if flip:
        mirrored = torch.rand(b, generator=generator) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images


def _dataset(
    name: str,
    pool: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor] | None,
    sizes: dict[str, int],
    classes: tuple[str, ...],
    label: str,
) -> Dataset:
    """Cut the splits in ``sizes`` (images a class) out of ``pool``, stratified and always the same; the rest trains."""
    images, labels = pool
    random = np.random.RandomState(0)  # NumPy freezes this stream, so the split is the same on every machine
    parts: dict[str, list[Tensor]] = {split: [] for split in [*sizes, "train"]}
    for number in range(len(classes)):
        members = torch.from_numpy(random.permutation(np.flatnonzero(labels.numpy() == number)))
        for split, size in sizes.items():
            parts[split].append(members[:size])
            members = members[size:]
        parts["train"].append(members)
    chosen = {split: torch.cat(members).sort().values for split, members in parts.items()}
    # moments from counts of the 256 values: exact, and without a float copy of all images
    train, values = images[chosen["train"]], torch.arange(256.0, dtype=torch.float64)
    counts = torch.stack([train[:, c].flatten().bincount(minlength=256) for c in range(train.shape[1])]).double()
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ values
    std = (share @ values**2 - mean**2).sqrt().float()
    mean = mean.float()
    splits = {split: Split(images[i], labels[i], mean, std) for split, i in chosen.items()}
    if test is not None:
        splits["test"] = Split(*test, mean, std)
    return Dataset(name, splits["train"], splits["validation"], splits["test"], classes, label)


def digits() -> Dataset:
    """Return the 1,797 handwritten digits that scikit-learn ships, 1×8×8 pixels of 0 to 16.

    The split is stratified and the same on every machine: 1,097 to train, 200 to validate, 500 to test. No download.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images.astype(np.uint8))[:, None]
    labels = torch.from_numpy(raw.target.astype(np.int64))
    return _dataset("digits", (images, labels), None, {"test": 50, "validation": 20}, tuple("0123456789"), "digits")


def cifar10(
    root: str | Path | None = None,
    *,
    download: bool = False,
    cache: str | Path | None = None,
    per_class: tuple[int, int] = (5000, 1000),
) -> Dataset:
    """Return CIFAR-10, 3×32×32 pixels: 45,000 images to train, 5,000 to validate and 10,000 to test.

    Args:
        root: a folder with torchvision's ``cifar-10-batches-py``; or one with images (PNG or JPEG) as
            ``train/<class>/*`` and ``test/<class>/*``; or a ``.tar.xz`` of the latter, or a folder with one of those.
            The environment variable ``UNRAVELLING_DATA`` when None.
        download: fetch torchvision's files into ``root`` when they are not there.
        cache: folder for the decoded images; ``UNRAVELLING_CACHE`` or ``~/.cache/unravelling`` when None.
        per_class: training and test images expected of each class; other numbers admit a subset.

    Raises:
        FileNotFoundError: no CIFAR-10 at ``root``.
        ValueError: classes or images are missing, or one cannot be decoded.
    """
    root = root or os.environ.get("UNRAVELLING_DATA")
    if root is None:
        raise FileNotFoundError(
            "where is CIFAR-10? Pass cifar10(root) or set UNRAVELLING_DATA; cifar10(root, download=True) fetches it"
        )
    root = Path(root).expanduser()
    label = "CIFAR-10"
    if download or (root / "cifar-10-batches-py").is_dir():
        pool, test = _torchvision_files(root, download)
    else:
        source = _find_images(root)
        stamp = hashlib.sha256(f"{source.resolve()} {_fingerprint(source)}".encode()).hexdigest()[:16]
        folder = Path(cache or os.environ.get("UNRAVELLING_CACHE") or "~/.cache/unravelling").expanduser()
        pool, test = _cached(source, folder / f"cifar10-{stamp}.safetensors")
        label += _lossy(source)
    for split, (_, labels), expected in (("train", pool, per_class[0]), ("test", test, per_class[1])):
        for name, count in zip(CIFAR10_CLASSES, labels.bincount(minlength=10).tolist(), strict=True):
            if count != expected:
                raise ValueError(
                    f"{root}: {count} images in {split}/{name}, expected {expected}: is the copy complete?"
                )
    held_out = max(1, per_class[0] // 10)
    return _dataset("cifar10", pool, test, {"validation": held_out}, CIFAR10_CLASSES, label)


def _torchvision_files(root: Path, download: bool) -> list[tuple[Tensor, Tensor]]:
    from torchvision.datasets import CIFAR10

    splits = []
    for train in (True, False):
        try:
            raw = CIFAR10(root, train=train, download=download)  # checks MD5 sums before it unpickles
        except RuntimeError as error:
            raise ValueError(
                f"{root / 'cifar-10-batches-py'} is incomplete or corrupt ({error}): "
                "delete it and call cifar10(root, download=True)"
            ) from error
        splits.append((torch.from_numpy(raw.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(raw.targets)))
    return splits


def _find_images(root: Path) -> Path:
    """Return the folder with train/ and test/, or the archive."""
    if root.is_file() and root.name.endswith(".tar.xz"):
        return root
    if (root / "train").is_dir() and (root / "test").is_dir():
        return root
    archives = sorted(root.glob("*.tar.xz")) if root.is_dir() else []
    if len(archives) == 1:
        return archives[0]
    raise FileNotFoundError(
        f"no CIFAR-10 at {root}: expected cifar-10-batches-py/, or train/<class>/* and test/<class>/*, or one .tar.xz "
        "of these; cifar10(root, download=True) fetches the first"
    )


def _fingerprint(source: Path) -> str:
    """Return what changes when the images do: names, sizes and times of the files."""
    if source.is_file():
        return f"{source.stat().st_size} {source.stat().st_mtime_ns}"
    return "\n".join(f"{p} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in sorted(source.glob("t*/*/*")))


def _image_files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield ``train/<class>/<file>`` and the file's bytes, whatever holds it."""
    if source.is_file():
        import lzma  # Python can be built without it

        try:
            with lzma.open(source) as stream, tarfile.open(fileobj=stream) as archive:  # nothing is extracted
                for member in archive:
                    if (file := archive.extractfile(member)) is not None:  # None for folders
                        yield "/".join(Path(member.name).parts[-3:]), file.read()
                while stream.read(2**20):  # the checksum comes last
                    pass
        except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
            raise ValueError(f"{source} is truncated or corrupt ({error}): copy it again") from error
    else:
        for split in ("train", "test"):
            for path in sorted((source / split).glob("*/*")):
                yield path.relative_to(source).as_posix(), path.read_bytes()


def _decode(source: Path) -> dict[str, Tensor]:
    from PIL import Image, UnidentifiedImageError

    found: dict[str, tuple[np.ndarray, int]] = {}
    for name, content in tqdm(_image_files(source), desc="decoding CIFAR-10", unit=" images", leave=False):
        split, label, _ = name.split("/") if name.count("/") == 2 else ("", "", "")
        if split not in ("train", "test"):
            continue
        if label not in CIFAR10_CLASSES:
            raise ValueError(f"{source}: {label!r} is not a class of CIFAR-10: expected {', '.join(CIFAR10_CLASSES)}")
        try:
            pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ValueError(f"{source}: {name} is not an image that can be read ({error}): copy it again") from error
        if pixels.shape != (32, 32, 3):
            raise ValueError(f"{source}: {name} has {pixels.shape[1]}×{pixels.shape[0]} pixels, expected 32×32")
        found[name] = pixels, CIFAR10_CLASSES.index(label)
    decoded = {}
    for split in ("train", "test"):
        names = sorted(name for name in found if name.startswith(split + "/"))
        if not names:
            raise ValueError(f"{source}: no images in {split}/<class>/")
        # class by class, the first images would all show aeroplanes: an order that is mixed, and always the same
        names = np.random.RandomState(0).permutation(names).tolist()
        stack = np.stack([found[name][0] for name in names])
        decoded[f"{split}_images"] = torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous()
        decoded[f"{split}_labels"] = torch.tensor([found[name][1] for name in names])
    return decoded


def _lossy(source: Path) -> str:
    """Return `` (JPEG-75 copy)``, say, where the first image is a JPEG of quality 75; nothing where it is lossless."""
    from PIL import Image

    image = Image.open(io.BytesIO(next(content for name, content in _image_files(source) if name.count("/") == 2)))
    if image.format != "JPEG":
        return ""
    # the first row of the luminance table that the JPEG standard suggests, scaled as libjpeg does for each quality
    standard = np.array([16, 11, 10, 16, 24, 40, 51, 61])
    for quality in range(100, 0, -1):
        scale = 5000 // quality if quality < 50 else 200 - 2 * quality
        if (np.clip((standard * scale + 50) // 100, 1, 255) == image.quantization[0][:8]).all():  # type: ignore[attr-defined]
            return f" (JPEG-{quality} copy)"
    return " (JPEG copy)"


def _cached(source: Path, path: Path) -> list[tuple[Tensor, Tensor]]:
    if not path.exists():
        fresh = _decode(source)
        write_atomically(path, lambda temporary: save_file(fresh, temporary))
    decoded = load_file(path)
    return [(decoded[f"{split}_images"], decoded[f"{split}_labels"]) for split in ("train", "test")]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary)`` and rename the result to ``path``, so that ``path`` is never half-written.

    Raises:
        OSError: the file could not be written; an earlier one is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        raise OSError(f"{path} could not be written ({error}): is the disk full? An earlier file is kept") from error
    finally:
        temporary.unlink(missing_ok=True)


def checksum(content: Any) -> str:
    """Return the SHA-256, in hexadecimal, of tensors, numbers and texts in dicts (in any order), lists and tuples."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)};".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            add(sorted(value.items(), key=lambda item: str(item[0])))
        elif isinstance(value, (list, tuple)):
            digest.update(f"{len(value)} parts;".encode())
            for part in value:
                add(part)
        else:
            digest.update(f"{value!r};".encode())

    add(content)
    return digest.hexdigest()


def load_dataset(name: str, root: str | Path | None = None) -> Dataset:
    """Return `digits` or `cifar10` by name; ``root`` says where CIFAR-10 is."""
    if name == "digits":
        return digits()
    if name == "cifar10":
        return cifar10(root)
    raise ValueError(f"unknown dataset {name!r}: expected digits or cifar10")
