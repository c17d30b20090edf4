"""The measurements whose results are stored: each takes a chain, its dataset and its seed, and returns a tidy table."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch

from . import lesion, paths
from .batches import device_of
from .chain import Chain
from .data import Dataset, Split
from .ensemble import average, disagreement, random_subnetworks
from .train import evaluate

K = (1, 2, 3, 5, 7, 10, 13, 16, 20, 25, 30)
"""Numbers of units that `delete_random` deletes; those that the network has."""
TRIALS = 50
"""Random choices for each number."""
SWAPS = (1, 2, 4, 8, 16, 32, 64, 128, None)
"""Numbers of pairs that `reorder` swaps; None shuffles every stage completely."""
ACTIVE = (10, 20, 30, 35, 40, 44, 48, 51, 54)
"""Numbers of units that the sub-networks of `subnetworks` keep."""
PER_CLASS = 100
"""Test images of each class where thousands of lesioned networks are evaluated on a CPU and the test split is large."""


def delete_each(chain: Chain, data: Dataset, seed: int) -> pd.DataFrame:
    """Delete every unit in turn, on all test images."""
    return _on(f"all {len(data.test)} test images", lesion.delete_each(chain, data.test))


def delete_random(chain: Chain, data: Dataset, seed: int) -> pd.DataFrame:
    """Delete k units at random, `TRIALS` times for each k of `K`."""
    test, images = _some(data, chain)
    return _on(images, lesion.delete_random(chain, test, _numbers(chain), TRIALS, seed))


def delete_reestimated(chain: Chain, data: Dataset, seed: int) -> pd.DataFrame:
    """Repeat some lesions of `delete_random`, five a k, with batch norm re-estimated on training images."""
    test, images = _some(data, chain)
    chosen = lesion.delete_random(chain, test, _numbers(chain), 5, seed)
    train = data.train.take(torch.arange(min(1000, len(data.train))))
    batches = _batches(train, chain, 250)
    rows = []
    for units in chosen["units"]:
        healed = lesion.reestimate_batch_norm(chain.without(*map(int, units.split())), batches)
        score = evaluate(healed, test)
        rows.append({"reestimated_error": score["error"], "reestimated_loss": score["loss"]})
    columns = ["k", "trial", "units", "images", "error", "loss", "delta_error"]
    return _on(f"{images}; statistics from {len(train)} training images", chosen[columns].join(pd.DataFrame(rows)))


def intact(chain: Chain, data: Dataset, seed: int) -> pd.DataFrame:
    """Evaluate the network as it is, and with batch norm re-estimated on training images.

    A network trained with branches left out has collected its statistics in thinner networks than the tested one.
    """
    batches = _batches(data.train.take(torch.arange(min(1000, len(data.train)))), chain, 250)
    as_trained, healed = evaluate(chain, data.test), evaluate(lesion.reestimate_batch_norm(chain, batches), data.test)
    columns = {"images": as_trained["images"], "error": as_trained["error"], "loss": as_trained["loss"]}
    table = pd.DataFrame([columns | {"reestimated_error": healed["error"], "reestimated_loss": healed["loss"]}])
    return _on(f"all {len(data.test)} test images", table)


def delete_pairs(chain: Chain, data: Dataset, seed: int) -> pd.DataFrame:
    """Delete 300 random pairs of units: with `delete_each`, the interaction of two deletions."""
    test, images = _some(data, chain)
    pairs = lesion.delete_random(chain, test, 2, 300, seed)
    return _on(images, pairs[["trial", "units", "images", "error", "loss", "delta_error", "delta_loss"]])


def damage(chain: Chain, data: Dataset, seed: int) -> pd.DataFrame:
    """Return the damage matrix: one row a test image, and how much deleting each unit adds to its loss (nats).

    Columns: ``image``, ``label``, ``loss`` of the intact chain, then ``unit0`` and so on. Not rounded, so that margins
    follow from the losses: log(exp(loss) - 1) is minus the log odds of the true class.
    """
    intact = tuple(range(len(chain)))
    variants = [intact, *((*intact[:i], ~i, *intact[i + 1 :]) for i in intact)]
    test, images = _some(data, chain)
    _, loss = lesion.evaluate_variants(chain, test, variants)
    table = pd.DataFrame((loss[1:] - loss[0]).T, columns=[f"unit{i}" for i in intact])
    table.insert(0, "loss", loss[0])
    table.insert(0, "label", test.labels.numpy())
    table.insert(0, "image", np.arange(len(table)))
    return _on(images, table)


def reorder(chain: Chain, data: Dataset, seed: int) -> pd.DataFrame:
    """Swap random pairs of units, 25 orders for each number of swaps of `SWAPS` that the chain has pairs for."""
    test, images = _some(data, chain)
    return _on(images, lesion.reorder(chain, test, _swaps(chain), 25, seed).drop(columns="order"))


def spectrum(chain: Chain, data: Dataset, seed: int) -> pd.DataFrame:
    """Return the exact gradient by path length for batches of test and of training images.

    Ten batches of 128 each; of the digits, which are few, five of 64.
    """
    batches, size = (10, 128) if len(data.test) >= 1280 else (5, 64)
    tables = []
    for split in ("test", "train"):
        first = getattr(data, split).take(torch.arange(min(batches * size, len(getattr(data, split)))))
        for batch, (x, y) in enumerate(_batches(first, chain, size)):
            table = paths.spectrum(paths.gradient_by_length(chain, x, y))
            tables.append(table.assign(split=split, batch=batch))
    table = pd.concat(tables)[["split", "batch", "length", "norm", "share"]]
    return _on(f"the first {batches} batches of {size} test and of {size} training images", table)


def spectrum_now(chain: Chain, data: Dataset) -> pd.DataFrame:
    """Return the exact gradient by path length on 64 validation images, for a network in training.

    Batch norm statistics are averaged over 256 training images first: the running ones lag behind, and before the first
    step there are none.
    """
    chain = lesion.reestimate_batch_norm(chain, _batches(data.train.take(torch.arange(256)), chain, 128))
    x, y = _batches(data.validation, chain, 64)[0]
    return paths.spectrum(paths.gradient_by_length(chain, x, y))


def path_norms(chain: Chain, data: Dataset, seed: int) -> pd.DataFrame:
    """Estimate the norms of single paths on test images, by random signs and by sampling as the paper does.

    On 32 images and 20 paths a length of the digits, on 16 images and 100 paths a length of CIFAR-10.

    Columns: those of `unravelling.paths.path_norms`, then ``exact``, the norm of their exact sum ‖G_k‖, and the mean
    and standard deviation ``sampled_mean``, ``sampled_std`` of ``sampled`` paths. All in float64.
    """
    chain = copy.deepcopy(chain).double()
    images, samples = (16, 100) if data.name == "cifar10" else (32, 20)
    x, y = _batches(data.test.take(torch.arange(images)), chain, images)[0]
    x = x.double()
    table = paths.path_norms(chain, x, y, 20, seed)
    table["exact"] = paths.spectrum(paths.gradient_by_length(chain, x, y))["norm"]
    lengths = table.loc[table["paths"] > 0, "length"]
    sampled = paths.sample_path_gradients(chain, x, y, lengths, samples, seed).groupby("length")["norm"]
    table = table.join(sampled.agg(sampled_mean="mean", sampled_std="std", sampled="size"), on="length")
    return _on(f"the first {images} test images", table)


def lengths(chain: Chain, data: Dataset, seed: int) -> pd.DataFrame:
    """Return every test image's mean path length and its mode, the length with the largest share."""
    rows = []
    test, images = _some(data, chain)
    for x, y in _batches(test, chain, 100):
        table = paths.spectrum(paths.gradient_by_length(chain, x, y), per_sample=True)
        shares = table.pivot(index="sample", columns="length", values="share")
        mean = shares.mul(shares.columns).sum(axis=1)
        rows.append(pd.DataFrame({"mean_length": mean, "mode": shares.idxmax(axis=1), "label": y.cpu().numpy()}))
    table = pd.concat(rows, ignore_index=True)
    return _on(images, table.rename_axis("image").reset_index())


def branches(chain: Chain, data: Dataset, seed: int) -> pd.DataFrame:
    """Return for every branch how large it is, and whether it moves the state against the gradient of the loss.

    Columns: ``unit``; ``ratio``, the median over test images of ‖f‖ / ‖skip(y)‖; ``cosine`` of f and the skip;
    ``descent``, the cosine of f and minus the gradient of the image's loss at the sum (Jastrzębski et al., 2018). The
    last two are means over the images.
    """
    test, images = _some(data, chain)
    parts = []
    for x, y in _batches(test, chain, 100):
        states = chain.trace(x)
        loss = torch.nn.functional.cross_entropy(chain.head(states[-1]), y, reduction="sum")
        gradients = torch.autograd.grad(loss, states[1:])
        for i, unit in enumerate(chain.units):
            if unit.branch is None:
                continue
            cosine = torch.nn.functional.cosine_similarity
            with torch.no_grad():
                f, skip = (part(states[i]).flatten(1) for part in (unit.branch, unit.skip))
                columns = {
                    "ratio": f.norm(dim=1) / skip.norm(dim=1),
                    "cosine": cosine(f, skip),
                    "descent": cosine(f, -gradients[i].flatten(1)),
                }
            parts.append(pd.DataFrame({"unit": i} | {name: value.cpu().numpy() for name, value in columns.items()}))
    by_unit = pd.concat(parts).groupby("unit")
    table = by_unit.agg(ratio=("ratio", "median"), cosine=("cosine", "mean"), descent=("descent", "mean"))
    return _on(images, table.reset_index())


def batch_norm_shift(chain: Chain, data: Dataset, seed: int) -> pd.DataFrame:
    """Return for every unit how far its deletion moves the channels' mean and spread, and the damage once norms adapt.

    Columns: ``unit``; ``shift``, the root mean square of √((μ' - μ)² + (σ' - σ)²) / σ over the channels of all later
    states, where μ and σ are moments over 500 training images; ``delta_loss``, what the deletion adds to the test loss
    (nats); ``reestimated_delta_loss``, the same with batch norm statistics of these images before and after.
    """
    train = data.train.take(torch.arange(min(500, len(data.train))))
    x, _ = _batches(train, chain, len(train))[0]
    intact = lesion.reestimate_batch_norm(chain, _batches(train, chain, 250))
    test, images = _some(data, chain)
    loss, reestimated_loss = evaluate(chain, test)["loss"], evaluate(intact, test)["loss"]
    moments = _moments(chain, x)
    rows = []
    for i in range(len(chain)):
        lesioned = chain.without(i)
        moved = [
            ((mean - old_mean).square() + (std - old_std).square()) / (old_std.square() + 1e-5)
            for (mean, std), (old_mean, old_std) in zip(_moments(lesioned, x)[i + 1 :], moments[i + 1 :], strict=True)
        ]
        healed = lesion.reestimate_batch_norm(lesioned, _batches(train, chain, 250))
        rows.append(
            {
                "unit": i,
                "shift": torch.cat(moved).mean().sqrt().item(),
                "delta_loss": evaluate(lesioned, test)["loss"] - loss,
                "reestimated_delta_loss": evaluate(healed, test)["loss"] - reestimated_loss,
            }
        )
    return _on(f"{images}; statistics from {len(train)} training images", pd.DataFrame(rows))


def subnetworks(chain: Chain, data: Dataset, seed: int) -> pd.DataFrame:
    """Average 20 random sub-networks of each size in `ACTIVE`: are they competent alone, and do they disagree?"""
    rows = []
    test, images = _some(data, chain)
    for active in (a for a in ACTIVE if a <= len(chain)):
        logits, labels = random_subnetworks(chain, test, active, 20, seed)
        wrong, _ = lesion.score(logits, labels)
        averaged, _ = lesion.score(average(logits), labels)
        rows.append(
            {
                "active": active,
                "members": len(logits),
                "mean_error": wrong.mean(),
                "best_error": wrong.mean(1).min(),
                "averaged_error": averaged.mean(),
                "disagreement": disagreement(logits),
            }
        )
    return _on(images, pd.DataFrame(rows))


MEASUREMENTS: dict[str, Callable[[Chain, Dataset, int], pd.DataFrame]] = {
    measurement.__name__: measurement
    for measurement in (
        intact,
        delete_each,
        delete_random,
        delete_reestimated,
        delete_pairs,
        damage,
        reorder,
        spectrum,
        path_norms,
        lengths,
        branches,
        batch_norm_shift,
        subnetworks,
    )
}
"""What ``python -m unravelling measure --what`` knows."""


def _numbers(chain: Chain) -> list[int]:
    return [k for k in K if k < len(chain)]


def _swaps(chain: Chain) -> list[int | None]:
    sizes = Counter(unit.stage for unit in chain.units if not unit.is_transition)
    pairs = sum(math.comb(size, 2) for size in sizes.values())
    return [k for k in SWAPS if k is None or k <= pairs]


def _moments(chain: Chain, x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return mean and standard deviation ``(channels,)`` of every state y_0 … y_n, over images and pixels."""
    with torch.inference_mode():
        return [(y.mean((0, 2, 3)), y.std((0, 2, 3), correction=0)) for y in chain.trace(x)]


def _some(data: Dataset, chain: Chain) -> tuple[Split, str]:
    """Return the test images for thousands of lesions, and what they are: all, or a fixed part of many on a CPU."""
    if len(data.test) <= 2 * PER_CLASS * len(data.classes) or device_of(chain).type == "cuda":
        return data.test, f"all {len(data.test)} test images"
    return data.test.stratified(PER_CLASS), f"the first {PER_CLASS} test images of every class"


def _on(images: str, table: pd.DataFrame) -> pd.DataFrame:
    """Note on a table which images it was measured on; `unravelling.results.store` puts it into the record."""
    table.attrs["images"] = images
    return table


def _batches(split: Split, chain: Chain, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return split.batches(size, device_of(chain))
