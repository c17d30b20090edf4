"""Real ensembles, and the sub-networks of one chain treated as one, to compare a residual network with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.special import log_softmax, logsumexp

from .batches import Batches
from .chain import Chain, check_chain, check_number, listed
from .data import Split
from .lesion import score, summarize, variant_logits


def predictions(chains: Sequence[Chain], data: Split | Batches) -> tuple[np.ndarray, np.ndarray]:
    """Return logits ``(members, images, K)`` of several networks on the same images, and labels ``(images,)``."""
    members = [check_chain(chain) for chain in listed(chains=chains)]
    logits = [variant_logits(chain, data, [range(len(chain))]) for chain in members]
    if not all(np.array_equal(labels, logits[0][1]) for _, labels in logits):
        raise ValueError("the batches come in another order for each member: take a loader without shuffle=True")
    if len({member.shape for member, _ in logits}) > 1:
        raise ValueError("the members do not have the same classes: their logits differ in shape")
    return np.concatenate([member for member, _ in logits]), logits[0][1]


def average(logits: np.ndarray) -> np.ndarray:
    """Return the log of the members' mean class probabilities, ``(images, K)``, for logits ``(members, images, K)``."""
    logits = _members(logits)
    return logsumexp(log_softmax(logits, axis=-1), axis=0) - np.log(len(logits))


def _members(logits: np.ndarray, least: int = 1) -> np.ndarray:
    logits = np.asarray(logits)
    if logits.dtype.kind not in "iuf" or logits.ndim < 2 or not logits.size or not np.isfinite(logits).all():
        expected = "(members, images, K), not empty and finite, such as predictions returns"
        raise ValueError(f"logits has shape {logits.shape} and type {logits.dtype}: expected {expected}")
    if len(logits) < least:
        raise ValueError(f"disagreement needs at least two members, but logits has {len(logits)}")
    return logits.astype(float)


def remove_members(
    logits: np.ndarray, labels: np.ndarray, removed: Iterable[int], trials: int | None = None, seed: int = 0
) -> pd.DataFrame:
    """Remove members of an ensemble and average the rest: what deleting blocks is compared with.

    Args:
        logits: of the members, ``(members, images, K)``, from `predictions`.
        labels: ``(images,)``.
        removed: numbers of members to remove.
        trials: random choices for each number; every choice once when None.
        seed: of the random choices.

    Returns:
        One row a choice, with ``removed``, ``trial``, ``kept`` (members that are left, from 0, separated by spaces),
        their ``disagreement`` (NaN for one), ``confidence`` (the mean probability of the class that their average
        chooses; calibrated ones have one minus the error), then the columns of `unravelling.lesion.summarize`, where
        the intact network is the whole ensemble.

    Raises ValueError where nothing would be left, or there are no trials.
    """
    check_number(1, trials=1 if trials is None else trials)
    logits = _members(logits)
    labels = np.asarray(labels)
    if labels.shape[:1] != logits.shape[1:2] or labels.dtype.kind not in "iu":
        raise ValueError(f"labels is {labels!r:.80}: expected a whole number for each of {logits.shape[1]} images")
    members, random = len(logits), np.random.default_rng(check_number(seed=seed))
    rows, averages = [], [average(logits)]
    for number in listed(removed=removed):
        left = members - check_number(None, removed=number)
        if not 0 < left <= members:
            raise ValueError(f"cannot remove {number} of {members} members: leave at least one")
        drawn = (sorted(random.choice(members, left, replace=False).tolist()) for _ in range(trials or 0))
        for trial, kept in enumerate(map(list, combinations(range(members), left)) if trials is None else drawn):
            averages.append(average(logits[kept]))
            row = {"removed": number, "trial": trial, "kept": " ".join(map(str, kept))}
            row |= {"disagreement": disagreement(logits[kept]) if left > 1 else np.nan}
            rows.append(row | {"confidence": np.exp(averages[-1].max(-1)).mean()})
    return pd.DataFrame(rows).join(summarize(*score(np.stack(averages), labels)))


def random_subnetworks(
    chain: Chain, data: Split | Batches, active: int, members: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Run sub-networks of one chain, each with ``active`` units chosen at random and the other units deleted.

    Args:
        chain: a trained network.
        data: a split, or batches of normalised images ``(B, C, H, W)`` and labels ``(B,)`` that can be iterated over.
        active: units that stay; transition units count as the others.
        members: how many sub-networks.
        seed: of the choices.

    Returns:
        Logits ``(members, images, K)`` and labels ``(images,)``, as of an ensemble.

    Raises ValueError for more active units than there are, or for no members.
    """
    check_number(1, members=members)
    if check_number(active=active) > len(check_chain(chain)):
        raise ValueError(f"cannot keep {active} units: this chain has {len(chain)}")
    random = np.random.default_rng(check_number(seed=seed))
    kept = [set(random.choice(len(chain), active, replace=False).tolist()) for _ in range(members)]
    return variant_logits(chain, data, [[i if i in some else ~i for i in range(len(chain))] for some in kept])


def disagreement(logits: np.ndarray) -> float:
    """Return the share of images on which two different members disagree, averaged over all pairs of members.

    Args:
        logits: of the members, ``(members, images, K)``; a ValueError for fewer than two.
    """
    logits = _members(logits, 2)
    members, classes = len(logits), logits.shape[-1]
    votes = np.eye(classes)[logits.argmax(-1)].sum(0)  # (images, K): members that choose each class
    agreeing = (votes * (votes - 1)).sum(-1) / (members * (members - 1))
    return float(1 - agreeing.mean())
