"""What is measured on a trained network: one table of functions, the networks they apply to, and the images they take.

Each function takes a chain, test images, the dataset that they are of and the chain's seed, and returns a tidy table.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch.nn.modules.batchnorm import _BatchNorm
from unravelling import ensemble, evaluate, lesion, paths
from unravelling.chain import Chain
from unravelling.data import Dataset, Split

K = (1, 2, 3, 5, 7, 10, 13, 16, 20, 25, 30)
"""Numbers of units that are deleted at random; those that the network has."""
TRIALS = 50
"""Random choices for each number."""
SWAPS = (1, 2, 4, 8, 16, 32, 64, 128, None)
"""Numbers of pairs that are swapped; None shuffles every stage completely."""
ACTIVE = (10, 20, 30, 35, 40, 44, 48, 51, 54)
"""Numbers of units that sub-networks keep."""
PER_CLASS = 100
"""Test images of each class where thousands of lesioned networks are evaluated, or a table has a row an image."""


def whole_network(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Evaluate the network as it is, and with batch norm re-estimated on training images.

    A network trained with branches left out has collected its statistics in thinner networks than the tested one.
    """
    batches = _batches(_first(data.train, 1000), chain, 250)
    as_trained, healed = evaluate(chain, test), evaluate(lesion.reestimate_batch_norm(chain, batches), test)
    columns = {"images": as_trained["images"], "error": as_trained["error"], "loss": as_trained["loss"]}
    return pd.DataFrame([columns | {"reestimated_error": healed["error"], "reestimated_loss": healed["loss"]}])


def single_deletions(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Delete every unit in turn, on all test images."""
    return lesion.delete_each(chain, test)


def random_deletions(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Delete k units at random, `TRIALS` times for each k of `K`."""
    return lesion.delete_random(chain, test, _numbers(chain), TRIALS, seed)


def healed_deletions(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Repeat some of the random deletions, five a k, with batch norm re-estimated on training images."""
    chosen = lesion.delete_random(chain, test, _numbers(chain), 5, seed)
    batches = _batches(_first(data.train, 1000), chain, 250)
    rows = []
    for units in chosen["units"]:
        healed = lesion.reestimate_batch_norm(chain.without(*map(int, units.split())), batches)
        score = evaluate(healed, test)
        rows.append({"reestimated_error": score["error"], "reestimated_loss": score["loss"]})
    columns = ["k", "trial", "units", "images", "error", "loss", "delta_error"]
    return chosen[columns].join(pd.DataFrame(rows))


def pair_deletions(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Delete 300 random pairs of units: with the single deletions, the interaction of two."""
    pairs = lesion.delete_random(chain, test, 2, 300, seed)
    return pairs[["trial", "units", "images", "error", "loss", "delta_error", "delta_loss"]]


def damage_by_image(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Return the damage matrix: one row a test image, and how much deleting each unit adds to its loss (nats).

    Columns: ``image``, ``label``, ``loss`` of the intact chain, then ``unit0`` and so on. Not rounded, so that margins
    follow from the losses: log(exp(loss) - 1) is minus the log odds of the true class.
    """
    intact = tuple(range(len(chain)))
    variants = [intact, *((*intact[:i], ~i, *intact[i + 1 :]) for i in intact)]
    _, loss = lesion.evaluate_variants(chain, test, variants)
    table = pd.DataFrame((loss[1:] - loss[0]).T, columns=[f"unit{i}" for i in intact])
    table.insert(0, "loss", loss[0])
    table.insert(0, "label", test.labels.numpy())
    table.insert(0, "image", np.arange(len(table)))
    return table


def swapped_orders(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Swap random pairs of units, 25 orders for each number of swaps of `SWAPS` that the chain has pairs for."""
    return lesion.reorder(chain, test, _swaps(chain), 25, seed).drop(columns="order")


def spectrum_of_batches(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Return the exact gradient by path length for batches of 128 test and training images; of 64 of the digits."""
    size = 128 if data.name == "cifar10" else 64
    tables = []
    for name, split in (("test", test), ("train", _first(data.train, len(test)))):
        for batch, (x, y) in enumerate(_batches(split, chain, size)):
            table = paths.spectrum(paths.gradient_by_length(chain, x, y))
            tables.append(table.assign(split=name, batch=batch))
    return pd.concat(tables)[["split", "batch", "length", "norm", "share"]]


def spectrum_in_training(chain: Chain, data: Dataset) -> pd.DataFrame:
    """Return the exact gradient by path length on 64 validation images, for a network in training.

    Batch norm statistics are averaged over 256 training images first: the running ones lag behind, and before the first
    step there are none.
    """
    chain = lesion.reestimate_batch_norm(chain, _batches(_first(data.train, 256), chain, 128))
    x, y = _batches(data.validation, chain, 64)[0]
    return paths.spectrum(paths.gradient_by_length(chain, x, y))


def norms_of_paths(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Estimate the norms of single paths on test images, by random signs and by sampling as the paper does.

    By 100 paths a length of CIFAR-10, by 20 of the digits.

    Columns: those of `unravelling.paths.path_norms`, then ``exact``, the norm of their exact sum ‖G_k‖, and the mean
    and standard deviation ``sampled_mean``, ``sampled_std`` of ``sampled`` paths. All in float64.
    """
    chain = copy.deepcopy(chain).double()
    samples = 100 if data.name == "cifar10" else 20
    x, y = _batches(test, chain, len(test))[0]
    x = x.double()
    table = paths.path_norms(chain, x, y, 20, seed)
    table["exact"] = paths.spectrum(paths.gradient_by_length(chain, x, y))["norm"]
    lengths = table.loc[table["paths"] > 0, "length"]
    sampled = paths.sample_path_gradients(chain, x, y, lengths, samples, seed).groupby("length")["norm"]
    return table.join(sampled.agg(sampled_mean="mean", sampled_std="std", sampled="size"), on="length")


def length_of_each_image(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Return every test image's mean path length and its mode, the length with the largest share."""
    rows = []
    for x, y in _batches(test, chain, 100):
        table = paths.spectrum(paths.gradient_by_length(chain, x, y), per_sample=True)
        shares = table.pivot(index="sample", columns="length", values="share")
        mean = shares.mul(shares.columns).sum(axis=1)
        rows.append(pd.DataFrame({"mean_length": mean, "mode": shares.idxmax(axis=1), "label": y.cpu().numpy()}))
    return pd.concat(rows, ignore_index=True).rename_axis("image").reset_index()


def size_and_direction(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Return for every branch how large it is, and whether it moves the state against the gradient of the loss.

    Columns: ``unit``; ``ratio``, the median over test images of ‖f‖ / ‖skip(y)‖; ``cosine`` of f and the skip;
    ``descent``, the cosine of f and minus the gradient of the image's loss at the sum (Jastrzębski et al., 2018). The
    last two are means over the images.
    """
    cosine = torch.nn.functional.cosine_similarity
    parts = []
    for x, y in _batches(test, chain, 100):
        states = chain.trace(x)
        loss = torch.nn.functional.cross_entropy(chain.head(states[-1]), y, reduction="sum")
        gradients = torch.autograd.grad(loss, states[1:])
        for i, unit in enumerate(chain.units):
            if unit.branch is None:
                continue
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
    return table.reset_index()


def shift_of_statistics(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Return for every unit how far its deletion moves the channels' mean and spread, and the damage once norms adapt.

    Columns: ``unit``; ``shift``, the root mean square of √((μ' - μ)² + (σ' - σ)²) / σ over the channels of all later
    states, where μ and σ are moments over 500 training images; ``delta_loss``, what the deletion adds to the test loss
    (nats); ``reestimated_delta_loss``, the same with batch norm statistics of these images before and after.
    """
    train = _first(data.train, 500)
    x, _ = _batches(train, chain, len(train))[0]
    batches = _batches(train, chain, 250)
    loss = evaluate(chain, test)["loss"]
    reestimated_loss = evaluate(lesion.reestimate_batch_norm(chain, batches), test)["loss"]
    moments = _moments(chain, x)
    rows = []
    for i in range(len(chain)):
        lesioned = chain.without(i)
        moved = [
            ((mean - old_mean).square() + (std - old_std).square()) / (old_std.square() + 1e-5)
            for (mean, std), (old_mean, old_std) in zip(_moments(lesioned, x)[i + 1 :], moments[i + 1 :], strict=True)
        ]
        healed = lesion.reestimate_batch_norm(lesioned, batches)
        rows.append(
            {
                "unit": i,
                "shift": torch.cat(moved).mean().sqrt().item(),
                "delta_loss": evaluate(lesioned, test)["loss"] - loss,
                "reestimated_delta_loss": evaluate(healed, test)["loss"] - reestimated_loss,
            }
        )
    return pd.DataFrame(rows)


def random_parts(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Average 20 random sub-networks of each size in `ACTIVE`: are they competent alone, and do they disagree?"""
    rows = []
    for active in (a for a in ACTIVE if a <= len(chain)):
        logits, labels = ensemble.random_subnetworks(chain, test, active, 20, seed)
        wrong, _ = lesion.score(logits, labels)
        averaged, _ = lesion.score(ensemble.average(logits), labels)
        rows.append(
            {
                "active": active,
                "members": len(logits),
                "mean_error": wrong.mean(),
                "best_error": wrong.mean(1).min(),
                "averaged_error": averaged.mean(),
                "disagreement": ensemble.disagreement(logits),
            }
        )
    return pd.DataFrame(rows)


def remove_members(chains: Sequence[Chain], test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Average several networks, and remove members in every way: what deleting blocks is compared with."""
    return ensemble.remove_members(*ensemble.predictions(chains, test), range(len(chains)))


def has_skips(chain: Chain) -> bool:
    """Return whether every unit has a skip in its sum, so that there are paths to follow."""
    return all(unit.residual for unit in chain.units)


def has_batch_norm(chain: Chain) -> bool:
    """Return whether there are statistics that can be estimated again."""
    return any(isinstance(module, _BatchNorm) for module in chain.modules())


def every(chain: Chain, data: Dataset) -> tuple[Split, str]:
    """Return all test images, and what they are in words."""
    return data.test, f"all {len(data.test)} test images"


def some(chain: Chain, data: Dataset) -> tuple[Split, str]:
    """Return a fixed part of the test images, and what it is in words; all of them where they are few."""
    if len(data.test) <= 2 * PER_CLASS * len(data.classes):
        return every(chain, data)
    return data.test.stratified(PER_CLASS), f"the first {PER_CLASS} test images of every class"


def fast(chain: Chain, data: Dataset) -> tuple[Split, str]:
    """Return all test images on a GPU, a fixed part of them on a CPU, and which, in words."""
    return (every if next(chain.parameters()).is_cuda else some)(chain, data)


def batches(chain: Chain, data: Dataset) -> tuple[Split, str]:
    """Return the images for the spectrum, and what they are in words."""
    number, size = (10, 128) if data.name == "cifar10" else (5, 64)
    words = f"the first {number} batches of {size} test and of {size} training images"
    return _first(data.test, number * size), words


def few(chain: Chain, data: Dataset) -> tuple[Split, str]:
    """Return the images for single paths, and what they are in words."""
    images = 16 if data.name == "cifar10" else 32
    return _first(data.test, images), f"the first {images} test images"


@dataclass(frozen=True)
class Measurement:
    """A row of the table.

    Attributes:
        function: of chain, test images, dataset and seed; returns a tidy table.
        images: of chain and dataset; returns the test images that the function takes, and what they are in words.
        applies: whether a chain can be measured so.
        note: what the record says besides about the images.
    """

    function: Callable[..., pd.DataFrame]
    images: Callable[[Chain, Dataset], tuple[Split, str]] = every
    applies: Callable[[Chain], bool] = lambda chain: True
    note: str = ""


TABLE = {
    "intact": Measurement(whole_network, note="; statistics from 1000 training images"),
    "delete_each": Measurement(single_deletions),
    "delete_random": Measurement(random_deletions, fast),
    "delete_reestimated": Measurement(healed_deletions, fast, has_batch_norm, "; statistics from 1000 training images"),
    "delete_pairs": Measurement(pair_deletions, fast, lambda chain: len(chain) >= 5),
    "damage": Measurement(damage_by_image, some),
    "reorder": Measurement(swapped_orders, fast, lambda chain: len(chain) >= 5),
    "spectrum": Measurement(spectrum_of_batches, batches, has_skips),
    "path_norms": Measurement(norms_of_paths, few, has_skips),
    "lengths": Measurement(length_of_each_image, some, has_skips),
    "branches": Measurement(size_and_direction, fast, has_skips),
    "batch_norm_shift": Measurement(shift_of_statistics, fast, has_batch_norm, "; statistics from 500 training images"),
    "subnetworks": Measurement(random_parts, fast, lambda chain: has_skips(chain) and len(chain) >= min(ACTIVE)),
}
"""What is measured on one network, by the name of the file that holds the results."""

ENSEMBLE = {"ensemble": Measurement(remove_members)}
"""What is measured on several networks of different seeds together."""


def applicable(chain: Chain) -> list[str]:
    """Return the names of the measurements that make sense for a network."""
    return [name for name, measurement in TABLE.items() if measurement.applies(chain)]


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


def _first(split: Split, images: int) -> Split:
    return split.take(torch.arange(min(images, len(split))))


def _batches(split: Split, chain: Chain, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return split.batches(size, next(chain.parameters()).device)
