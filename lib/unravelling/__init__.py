"""Take residual networks apart: delete and reorder blocks, and follow the gradient along all 2^n paths."""

from .chain import Chain, Unit
from .data import Dataset, Split, cifar10, digits
from .from_model import block_units, unravel
from .lesion import delete_each, delete_random, reestimate_batch_norm, reorder, replace_branches, taylor_importance
from .nets import build, plain, resnet, vgg
from .paths import (
    canonical_split,
    gradient_by_length,
    gradient_norms,
    mean_length,
    path_gradients,
    path_norms,
    sample_path_gradients,
    spectrum,
    weight_spectrum,
)
from .train import RECIPES, Recipe, evaluate, fit
from .weights import load, save

__version__ = "0.1.0"

__all__ = [
    "RECIPES", "Chain", "Dataset", "Recipe", "Split", "Unit", "block_units", "build", "canonical_split", "cifar10",
    "delete_each", "delete_random", "digits", "evaluate", "fit", "gradient_by_length", "gradient_norms", "load",
    "mean_length", "path_gradients", "path_norms", "plain", "reestimate_batch_norm", "reorder", "replace_branches",
    "resnet", "sample_path_gradients", "save", "spectrum", "taylor_importance", "unravel", "vgg", "weight_spectrum",
]
