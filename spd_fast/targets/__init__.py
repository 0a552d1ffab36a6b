"""Target networks with known mechanisms, and their data."""

from spd_fast.targets.authors import import_run
from spd_fast.targets.build import (
    feature_data,
    load_target,
    make_target,
    save_target,
    train_target,
)
from spd_fast.targets.data import SparseFeatures
from spd_fast.targets.hf import load_hf
from spd_fast.targets.resid_mlp import ResidMLP
from spd_fast.targets.tms import TMS

__all__ = [
    "TMS",
    "ResidMLP",
    "SparseFeatures",
    "feature_data",
    "import_run",
    "load_hf",
    "load_target",
    "make_target",
    "save_target",
    "train_target",
]
