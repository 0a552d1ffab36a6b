"""Decomposed models: sites, components, causal-importance functions, mask kinds."""

from spd_fast.model.decomposed import CleanForward, DecomposedModel
from spd_fast.model.importances import Importances, SiteImportances
from spd_fast.model.masking import Adversarial, CIMask, Given, Masking, Ones, Stochastic
from spd_fast.model.sites import Site

__all__ = [
    "Adversarial",
    "CIMask",
    "CleanForward",
    "DecomposedModel",
    "Given",
    "Importances",
    "Masking",
    "Ones",
    "Site",
    "SiteImportances",
    "Stochastic",
]
