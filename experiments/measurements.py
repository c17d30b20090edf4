"""What is measured on a trained network: one table of functions, the networks they apply to, and the images they take.

Each function takes a chain, test images, the dataset that they are of and the chain's seed, and returns a tidy table.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from unravelling import ensemble, evaluate, gradient_norms, lesion, paths
from unravelling.batches import device_of
from unravelling.chain import Chain
from unravelling.data import Dataset, Split
from unravelling.nets import Average

K = (1, 2, 3, 5, 7, 10, 13, 16, 20, 25, 30)
"""Numbers of units that are deleted at random; those that the network has."""
TRIALS = 50
"""Random choices for each number."""
SWAPS = (1, 2, 4, 8, 16, 32, 64, 128, None)
"""Numbers of pairs that are swapped; None shuffles every stage completely."""
ACTIVE = (10, 20, 30, 35, 40, 44, 48, 51, 54)
"""Numbers of units that sub-networks keep."""
DEEP = 54
"""Units from which on every image's damage is kept; `variance_of_damage` has what it says of shallower networks."""
PER_CLASS = 100
"""Test images of each class where thousands of lesioned networks are evaluated, or a table has a row an image."""


def whole_network(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Evaluate the network as it is, and with batch norm re-estimated on training images.

    The second is the baseline of every re-estimated result: a network trained with branches left out has collected its
    statistics in thinner networks than the tested one.
    """
    scores = {"": evaluate(chain, test), "reestimated_": evaluate(_healed(chain, data), test)}
    columns = {f"{kind}{name}": score[name] for kind, score in scores.items() for name in ("error", "loss")}
    return pd.DataFrame([{"images": len(test)} | columns])


def random_deletions(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Delete k units at random, `TRIALS` times for each k of `K`."""
    return lesion.delete_random(chain, test, [k for k in K if k < len(chain)], TRIALS, seed)


def healed_deletions(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Repeat some of the random deletions, five a k, with batch norm re-estimated on training images."""
    table = lesion.delete_random(chain, test, [k for k in K if k < len(chain)], 5, seed)
    chosen = (chain.without(*map(int, units.split())) for units in table["units"])
    healed = pd.DataFrame([evaluate(_healed(lesioned, data), test) for lesioned in chosen])
    columns = ["k", "trial", "units", "images", "error", "loss", "delta_error"]
    return table[columns].join(healed[["error", "loss"]].add_prefix("reestimated_"))


def pair_deletions(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Delete 300 random pairs of units: with the single deletions, the interaction of two."""
    pairs = lesion.delete_random(chain, test, 2, 300, seed)
    return pairs[["trial", "units", "images", "error", "loss", "delta_error", "delta_loss"]]


def damage_by_image(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Return the damage matrix: one row a test image, and how much deleting each unit adds to its loss (nats).

    Columns: ``image``, ``label``, ``loss`` of the intact chain, then ``unit0`` and so on, so that margins follow from
    the losses: log(exp(loss) - 1) is minus the log odds of the true class.
    """
    before, after = _losses(chain, test)
    table = {"image": np.arange(len(test)), "label": test.labels.numpy(), "loss": before}
    return pd.DataFrame(table | {f"unit{i}": lost - before for i, lost in enumerate(after)})


def variance_of_damage(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Return where the variance of the damage matrix comes from, with and without the unit that costs the most.

    Columns: ``statistics`` of batch norm, "trained", or "re-estimated" before and after each deletion; ``scale``, the
    loss or the margin; ``without``, the unit left out, or none; ``size``, the root mean square of the damage (nats);
    and as shares of its variance ``block``, ``image`` and ``interaction``.
    """
    losses = {"trained": _losses(chain, test)}
    if has_batch_norm(chain):
        healed = (_healed(one, data) for one in (chain, *map(chain.without, range(len(chain)))))
        before, *after = (lesion.evaluate_variants(one, test, [range(len(one))])[1][0] for one in healed)
        losses["re-estimated"] = before, np.stack(after)
    rows = []
    for statistics, (before, after) in losses.items():
        margin = [-(loss + np.log(-np.expm1(-np.maximum(loss, 1e-9)))) for loss in (before, after)]
        for scale, damage in {"loss": (after - before).T, "margin": (margin[0] - margin[1]).T}.items():
            worst = int(damage.mean(0).argmax())
            for without, part in {"": damage, worst: np.delete(damage, worst, axis=1)}.items():
                rows.append({"statistics": statistics, "scale": scale, "without": without, **variance_parts(part)})
    return pd.DataFrame(rows)


def variance_parts(table: np.ndarray) -> dict[str, float]:
    """Split the variance of a table ``(images, blocks)`` into shares of block, image and their interaction."""
    block, image = (table.mean(axis, keepdims=True) - table.mean() for axis in (0, 1))
    parts = {"block": block, "image": image, "interaction": table - table.mean() - block - image}
    shares = {name: float((part**2).mean() / table.var()) for name, part in parts.items()}
    return {"size": float((table**2).mean() ** 0.5), **shares}


def swapped_orders(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Swap random pairs of units, 25 orders for each number of swaps of `SWAPS` that the chain has pairs for."""
    sizes = Counter(unit.stage for unit in chain.units if not unit.is_transition)
    pairs = sum(math.comb(size, 2) for size in sizes.values())
    swaps = [k for k in SWAPS if k is None or k <= pairs]
    return lesion.reorder(chain, test, swaps, 25, seed).drop(columns="order")


def spectrum_of_batches(
    chain: Chain, test: Split, data: Dataset, seed: int, at_weights: bool = False, batch_statistics: bool = False
) -> pd.DataFrame:
    """Return the exact gradient by path length for batches of 128 test and training images; of 64 of the digits.

    At y_0 or, as updates follow it, at all weights of the branches; with stored statistics of batch norm or, as in
    training, with each batch's own.
    """
    tables = []
    for name, split in (("test", test), ("train", first(data.train, len(test)))):
        for batch, (x, y) in enumerate(split.batches(_spectrum_batch(data), device_of(chain))):
            if at_weights:
                table = paths.weight_spectrum(chain, x, y, batch_statistics=batch_statistics)
                whole = {"norm": lambda norms: (norms**2).sum() ** 0.5, "share": "sum"}
                table = table.groupby("length", as_index=False).agg(whole)
            else:
                table = paths.spectrum(paths.gradient_by_length(chain, x, y, batch_statistics=batch_statistics))
            tables.append(table.assign(split=name, batch=batch))
    return pd.concat(tables)[["split", "batch", "length", "norm", "share"]]


def other_splits(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Return the spectrum of the first test batch when c·y is taken for the skip and the rest for the branch.

    Columns: ``split``, "as it is", "trace-free" (each branch's Jacobian, by Hutchinson's estimator) or a factor c for
    all; ``length``, ``norm``, ``share``.
    """
    x, y = test.batches(_spectrum_batch(data), device_of(chain))[0]
    factors = {"as it is": 1.0, "trace-free": paths.canonical_split(chain, x, seed=seed)["c"]}
    factors |= {str(c): c for c in (0.5, 0.9, 1.1)}
    spectra = {name: paths.spectrum(paths.gradient_by_length(chain.split(c), x, y)) for name, c in factors.items()}
    return pd.concat([spectrum.assign(split=name) for name, spectrum in spectra.items()])


def trace_free_split(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Return for every unit how much of the identity lies in its branch, on the first test batch."""
    return paths.canonical_split(chain, test.batches(_spectrum_batch(data), device_of(chain))[0][0], seed=seed)


def norms_in_training(chain: Chain, data: Dataset) -> pd.DataFrame:
    """Return the gradient norms of the states on 256 training images, for a network as it is trained."""
    return gradient_norms(chain.train(), *first(data.train, 256).batches(256, device_of(chain))[0])


def spectrum_in_training(chain: Chain, data: Dataset) -> pd.DataFrame:
    """Return the exact gradient by path length on 64 validation images, for a network as it is trained.

    Batch norm statistics are averaged over 256 training images first: the running ones lag behind, and before the first
    step there are none.
    """
    chain = lesion.reestimate_batch_norm(chain, first(data.train, 256).batches(128, device_of(chain)))
    x, y = data.validation.batches(64, device_of(chain))[0]
    return paths.spectrum(paths.gradient_by_length(chain, x, y))


def norms_of_paths(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Estimate the norms of single paths on test images, by random signs and by sampling as the paper does.

    By 100 paths a length of CIFAR-10, by 20 of the digits.

    Columns: those of `unravelling.paths.path_norms`, then ``exact``, the norm of their exact sum ‖G_k‖, and the mean
    and standard deviation ``sampled_mean``, ``sampled_std`` of ``sampled`` paths. All in float64.
    """
    chain = copy.deepcopy(chain).double()
    samples = 100 if data.name == "cifar10" else 20
    x, y = test.batches(len(test), device_of(chain))[0]
    table = paths.path_norms(chain, x, y, 20, seed)
    table["exact"] = paths.spectrum(paths.gradient_by_length(chain, x, y))["norm"]
    lengths = table.loc[table["paths"] > 0, "length"]
    sampled = paths.sample_path_gradients(chain, x, y, lengths, samples, seed).groupby("length")["norm"]
    return table.join(sampled.agg(sampled_mean="mean", sampled_std="std", sampled="size"), on="length")


def length_of_each_image(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Return every test image's mean path length and its mode, the length with the largest share."""
    parts = []
    for x, y in test.batches(100, device_of(chain)):
        table = paths.spectrum(paths.gradient_by_length(chain, x, y), per_sample=True)
        shares = table.pivot(index="sample", columns="length", values="share")
        mean = shares.mul(shares.columns).sum(axis=1)
        parts.append(pd.DataFrame({"mean_length": mean, "mode": shares.idxmax(axis=1), "label": y.cpu().numpy()}))
    return pd.concat(parts, ignore_index=True).rename_axis("image").reset_index()


def size_and_direction(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Return for every branch how large it is, and whether it moves the state against the gradient of the loss.

    Columns: ``unit``; ``ratio``, the median over test images of ‖f‖ / ‖skip(y)‖; ``cosine`` of f and the skip;
    ``descent``, the cosine of f and minus the gradient of the image's loss at the sum (Jastrzębski et al., 2018). The
    last two are means over the images.
    """
    parts = []
    for x, y in test.batches(100, device_of(chain)):
        state, terms, totals = chain.stem(x), [], []
        for unit in chain.units:
            terms.append((unit.branch(state), unit.skip(state)))
            totals.append(sum(terms[-1]))
            state = unit.post(totals[-1])
        gradients = torch.autograd.grad(cross_entropy(chain.head(state), y, reduction="sum"), totals)
        for i, (pair, gradient) in enumerate(zip(terms, gradients, strict=True)):
            f, skip = (part.detach().flatten(1) for part in pair)
            columns = {"ratio": f.norm(dim=1) / skip.norm(dim=1), "cosine": cosine_similarity(f, skip)}
            columns |= {"descent": cosine_similarity(f, -gradient.flatten(1))}
            parts.append(pd.DataFrame({"unit": i} | {name: value.cpu().numpy() for name, value in columns.items()}))
    how = {"ratio": "median", "cosine": "mean", "descent": "mean"}
    return pd.concat(parts).groupby("unit", as_index=False).agg(how)


def shift_of_statistics(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Return for every unit how far its deletion moves the channels' mean and spread, and the damage once norms adapt.

    Columns: ``unit``; ``shift``, the root mean square of √((μ' - μ)² + (σ' - σ)²) / σ over the channels of all later
    states, where μ and σ are moments over 500 training images; ``delta_loss``, what the deletion adds to the test loss
    (nats); ``reestimated_delta_loss``, the same with batch norm statistics of these images before and after.
    """
    x, _ = first(data.train, 500).batches(500, device_of(chain))[0]

    def measured(chain: Chain) -> tuple[list[torch.Tensor], list[torch.Tensor], float, float]:
        with torch.inference_mode():
            states = chain.trace(x)
        mean = [y.mean((0, 2, 3)) for y in states]
        std = [y.std((0, 2, 3), correction=0) for y in states]
        return mean, std, evaluate(chain, test)["loss"], evaluate(_healed(chain, data, 500), test)["loss"]

    mean, std, loss, reestimated = measured(chain)
    rows = []
    for i in range(len(chain)):
        new_mean, new_std, new_loss, new_reestimated = measured(chain.without(i))
        moved = [
            ((new_mean[j] - mean[j]).square() + (new_std[j] - std[j]).square()) / (std[j].square() + 1e-5)
            for j in range(i + 1, len(mean))
        ]
        rows.append((i, torch.cat(moved).mean().sqrt().item(), new_loss - loss, new_reestimated - reestimated))
    return pd.DataFrame(rows, columns=["unit", "shift", "delta_loss", "reestimated_delta_loss"])


def random_parts(chain: Chain, test: Split, data: Dataset, seed: int) -> pd.DataFrame:
    """Average 20 random sub-networks of each size in `ACTIVE`: are they competent alone, and do they disagree?"""
    rows = []
    for active in (a for a in ACTIVE if a <= len(chain)):
        logits, labels = ensemble.random_subnetworks(chain, test, active, 20, seed)
        alone, averaged = (lesion.score(members, labels)[0] for members in (logits, ensemble.average(logits)))
        errors = {"mean_error": alone.mean(), "best_error": alone.mean(1).min(), "averaged_error": averaged.mean()}
        rows.append({"active": active, "members": len(logits), **errors, "disagreement": ensemble.disagreement(logits)})
    return pd.DataFrame(rows)


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


def batches(chain: Chain, data: Dataset, most: int = 10) -> tuple[Split, str]:
    """Return the images for the spectrum, in at most so many batches, and what they are in words."""
    number, size = min(most, 10 if data.name == "cifar10" else 5), _spectrum_batch(data)
    words = f"the first {number} batches of {size} test and of {size} training images"
    return first(data.test, number * size), words


def few(chain: Chain, data: Dataset) -> tuple[Split, str]:
    """Return the images for single paths, and what they are in words."""
    images = 16 if data.name == "cifar10" else 32
    return first(data.test, images), f"the first {images} test images"


def first(split: Split, images: int) -> Split:
    """Return the first images of a split; all of them where there are no more."""
    return split.take(torch.arange(min(images, len(split))))


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


two_batches = partial(batches, most=2)
HEALED, FIRST = "; statistics from 1000 training images", "; of these the first of test images"
TABLE = {
    "intact": Measurement(whole_network, note=HEALED),
    "delete_each": Measurement(lambda chain, test, *_: lesion.delete_each(chain, test)),
    "delete_random": Measurement(random_deletions, some),
    "delete_reestimated": Measurement(healed_deletions, some, has_batch_norm, HEALED),
    "delete_pairs": Measurement(pair_deletions, some, lambda chain: len(chain) >= 5),
    "damage": Measurement(damage_by_image, some, lambda chain: len(chain) >= DEEP),
    "reorder": Measurement(swapped_orders, some, lambda chain: len(chain) >= 5),
    "spectrum": Measurement(spectrum_of_batches, batches, has_skips),
    "path_norms": Measurement(norms_of_paths, few, has_skips),
    "lengths": Measurement(length_of_each_image, some, has_skips),
    "branches": Measurement(size_and_direction, some, has_skips),
    "replace": Measurement(lambda chain, test, _, seed: lesion.replace_branches(chain, test, seed=seed), some),
    "taylor": Measurement(lambda chain, test, *_: lesion.taylor_importance(chain, test), some),
    "variance": Measurement(variance_of_damage, some, note=HEALED),
    "spectrum_weights": Measurement(partial(spectrum_of_batches, at_weights=True), two_batches, has_skips),
    "spectrum_batch_norm": Measurement(
        partial(spectrum_of_batches, batch_statistics=True), two_batches,
        lambda chain: has_skips(chain) and has_batch_norm(chain)),
    "spectrum_splits": Measurement(other_splits, two_batches, has_skips, FIRST),
    "trace_free_split": Measurement(trace_free_split, two_batches, has_skips, FIRST),
    "batch_norm_shift": Measurement(shift_of_statistics, some, has_batch_norm, "; statistics from 500 training images"),
    "subnetworks": Measurement(random_parts, some, lambda chain: has_skips(chain) and len(chain) >= min(ACTIVE)),
}
"""What is measured on one network, by the name of the file that holds the results."""



def without_members(chains: Sequence[Chain], test: Split, *_: object) -> pd.DataFrame:
    """Return the results of `unravelling.ensemble.remove_members` for networks, or for the members of a joint one."""
    members = chains[0].units[0].branch.members if is_joint(chains[0]) else chains
    return ensemble.remove_members(*ensemble.predictions(members, test), range(len(members)))


ENSEMBLE = {"ensemble": Measurement(without_members)}
"""What is measured on several networks together, or on a joint one: what deleting blocks is compared with."""


def is_joint(chain: Chain) -> bool:
    """Return whether a network is an average of members that were trained as one."""
    return isinstance(chain.units[0].branch, Average)


def applicable(chain: Chain) -> list[str]:
    """Return the names of the measurements that make sense for a network."""
    return [*ENSEMBLE] if is_joint(chain) else [name for name, one in TABLE.items() if one.applies(chain)]


def _losses(chain: Chain, test: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return every image's loss ``(images,)`` in the intact chain, and ``(n, images)`` without each unit."""
    intact = tuple(range(len(chain)))
    variants = [intact, *((*intact[:i], ~i, *intact[i + 1 :]) for i in intact)]
    _, loss = lesion.evaluate_variants(chain, test, variants)
    return loss[0], loss[1:]


def _spectrum_batch(data: Dataset) -> int:
    return 128 if data.name == "cifar10" else 64


def _healed(chain: Chain, data: Dataset, images: int = 1000) -> Chain:
    """Return a chain with batch norm re-estimated on the first training images, in batches of 250."""
    return lesion.reestimate_batch_norm(chain, first(data.train, images).batches(250, device_of(chain)))
