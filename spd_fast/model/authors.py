"""Reading checkpoints of the authors' torch code, of both formats; nothing in them is executed.

2026 code: ``_components.<site>.{V, U, bias}``, ``_ci_fns.<site>.layers.{0, 2, …}.{W, b}``,
``target_model.*``. Paper code: ``components.<site>.{A, B}`` (V and U) and
``gates.<site>.{mlp_in, in_bias, mlp_out, out_bias}`` (``weight``, ``bias`` at hidden width 0).
Both write ``final_config.yaml`` and ``model_<step>.pth``, and '-' for '.' in a site's name.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from spd_fast.errors import UserError
from spd_fast.model.decomposed import DecomposedModel
from spd_fast.model.sites import IDENTITY, submodules

__all__ = ["AuthorsRun", "decomposition_of", "read_run"]

_SIGMOIDS = {"leaky_hard": None, "hard": "hard", "normal": "normal"}


@dataclass(frozen=True)
class AuthorsRun:
    """What a run's folder of the authors' code holds.

    Attributes:
        format: ``paper`` or ``2026``, the presets of that code.
        step: of the checkpoint. config: ``final_config.yaml``.
        components: site (with '-' for '.') → V, U.
        gates: site → layers (W, b) in our shapes.
        ci_fn: ``mlp``, ``linear``, ``vector_mlp`` or ``shared_mlp``.
        target: the target's state dict, empty where the checkpoint has none.
    """

    format: str
    step: int
    config: dict[str, Any]
    components: dict[str, tuple[Tensor, Tensor]]
    gates: dict[str, list[tuple[Tensor, Tensor]]]
    ci_fn: str
    target: dict[str, Tensor]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _checkpoint(folder: Path) -> tuple[int, Path]:
    """The latest ``model_<step>.pth``."""
    if folder.suffix == ".pth" and folder.is_file():
        found = [folder]
    elif folder.is_dir():
        found = list(folder.glob("model_*.pth"))
    else:
        raise UserError(f"no folder {folder}")
    steps = [(int(m[1]), p) for p in found if (m := re.fullmatch(r"model_(\d+)\.pth", p.name))]
    if not steps:
        raise UserError(f"{folder} holds no checkpoint model_<step>.pth of the authors' code")
    return max(steps)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "final_config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as plain YAML: {_one_line(error)}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a mapping of settings")
    return config


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path} is not a plain state dict, or damaged; nothing in it was run: "
            f"{_one_line(error)}"
        ) from None
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds a {type(state).__name__}, need a state dict")
    return {str(k): v for k, v in state.items() if isinstance(v, Tensor)}


def _grouped(state: Mapping[str, Tensor], prefix: str) -> dict[str, dict[str, Tensor]]:
    """Site → rest of the name → tensor, of the entries below ``prefix``."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith(prefix):
            site, _, rest = name[len(prefix) :].partition(".")
            groups.setdefault(site, {})[rest] = tensor
    return groups


def _layers_2026(site: str, entries: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    numbers = sorted({int(m[1]) for n in entries if (m := re.fullmatch(r"layers\.(\d+)\.W", n))})
    try:
        layers = [(entries[f"layers.{i}.W"], entries[f"layers.{i}.b"]) for i in numbers]
    except KeyError as error:
        raise UserError(f"the importance function of site {site!r} lacks {error}") from None
    if not layers:
        raise UserError(f"site {site!r} has no importance function that this program knows")
    return layers


def _layers_paper(site: str, entries: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    if {"weight", "bias"} <= entries.keys():
        return [(entries["weight"][:, None, None], entries["bias"][:, None])]
    try:
        return [
            (entries["mlp_in"][:, None, :], entries["in_bias"]),
            (entries["mlp_out"][:, :, None], entries["out_bias"].reshape(-1, 1)),
        ]
    except (KeyError, IndexError) as error:
        raise UserError(f"the gate of site {site!r} is not one of the paper's: {error}") from None


def _kind(layers: list[tuple[Tensor, Tensor]], given: str | None) -> str:
    """The importance function that has such layers."""
    first = layers[0][0]
    if first.ndim == 2:
        return "shared_mlp"
    if first.shape[1] != 1 or given == "vector_mlp":
        return "vector_mlp"
    return "linear" if len(layers) == 1 else "mlp"


def _target_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The target's own entries, under the names of its modules."""
    for prefix in ("target_model.", "patched_model.", "model."):
        found = {
            n[len(prefix) :].replace(".original.", "."): t
            for n, t in state.items()
            if n.startswith(prefix)
        }
        if found:
            return found
    return {}


def read_run(folder: Path) -> AuthorsRun:
    """The latest checkpoint in a folder of the authors' code (or the checkpoint named).

    Raises:
        UserError: no such files, another format, or files that would have to run code.
    """
    step, path = _checkpoint(folder)
    config, state = _read_config(path.parent), _read_state(path)
    if any(n.startswith("_components.") for n in state):
        kind, names = "2026", ("V", "U")
        components = _grouped(state, "_components.")
        own = _grouped(state, "_ci_fns.") or _grouped(state, "ci_fn._ci_fns.")
        layers = {site: _layers_2026(site, own.get(site, {})) for site in components}
    elif any(n.startswith("components.") for n in state):
        kind, names = "paper", ("A", "B")
        components = _grouped(state, "components.")
        own = _grouped(state, "gates.")
        layers = {site: _layers_paper(site, own.get(site, {})) for site in components}
    else:
        raise UserError(f"{path} holds no components of the authors' code (neither format)")
    pairs = {}
    for site, entries in components.items():
        try:
            pairs[site] = (entries[names[0]], entries[names[1]])
        except KeyError as error:
            raise UserError(f"the components of site {site!r} lack {error}") from None
    given = config.get("ci_fn_type") or config.get("gate_type")
    kinds = {_kind(found, given) for found in layers.values()}
    if len(kinds) != 1:
        raise UserError(f"the sites have different importance functions: {', '.join(kinds)}")
    return AuthorsRun(kind, step, config, pairs, layers, kinds.pop(), _target_state(state))


def _site_names(run: AuthorsRun, target: nn.Module) -> dict[str, str]:
    """'-' name → the target's site."""
    known = {}
    for path in submodules(target):
        for name in (path, path + IDENTITY):
            known[name.replace(".", "-")] = name
    for site in run.components:
        if site not in known:
            raise UserError(f"the target has no module {site!r} ('-' for '.'), which the run has")
    return {site: known[site] for site in run.components}


def _options(run: AuthorsRun) -> dict[str, Any]:
    sigmoid = run.config.get("sigmoid_type", "leaky_hard")
    if sigmoid not in _SIGMOIDS:
        raise UserError(f"sigmoid_type {sigmoid!r} of the run is not supported")
    hidden = {tuple(b.shape[-1] for _, b in layers[:-1]) for layers in run.gates.values()}
    if len(hidden) != 1:
        raise UserError(f"the sites' importance functions have different widths: {hidden}")
    output = run.config.get("pretrained_model_output_attr")
    if isinstance(output, str) and re.fullmatch(r"idx_\d+", output):
        output = int(output[4:])
    return {
        "ci_fn": run.ci_fn,
        "ci_hidden": hidden.pop(),
        "sigmoid": _SIGMOIDS[sigmoid] or run.format,
        "init": run.format,
        "delta": bool(run.config.get("use_delta_component", run.format == "2026")),
        "output": output,
    }


def _check_weights(run: AuthorsRun, model: DecomposedModel) -> None:
    """The run's own target, where the checkpoint holds it, has to be the one it is put on."""
    for name, site in model.sites.items():
        stored = run.target.get(f"{site.module}.weight")
        module = model.target.get_submodule(site.module)
        if stored is None or site.kind == "identity":
            continue
        weight = module.weight
        assert isinstance(weight, Tensor)
        if stored.shape != weight.shape or not torch.equal(stored.to(weight), weight):
            raise UserError(f"the run was made of another target: the weights at {name!r} differ")


def decomposition_of(
    run: AuthorsRun, target: nn.Module, *, backend: str | None = None
) -> DecomposedModel:
    """The decomposition that ``run`` holds, on its target.

    Raises:
        UserError: a target that the run was not made of, or shapes that do not fit it.
    """
    names = _site_names(run, target)
    sites = {names[site]: int(V.shape[1]) for site, (V, _) in run.components.items()}
    model = DecomposedModel(target, sites, **_options(run), backend=backend)
    _check_weights(run, model)
    entries: dict[str, Tensor] = {}
    for site, (V, U) in run.components.items():
        owner = model.sites[names[site]].tied_to
        if owner is not None:
            first = run.components[owner.replace(".", "-")]
            if not (torch.equal(V, first[1].T) and torch.equal(U, first[0].T)):
                raise UserError(
                    f"the weights at {owner!r} and {names[site]!r} are each other's transpose in "
                    "one storage, but the run's components there are not"
                )
        entries |= {f"components.{site}.V": V, f"components.{site}.U": U}
        for i, (W, b) in enumerate(run.gates[site]):
            entries |= {f"ci_fns.{site}.layers.{2 * i}.{n}": t for n, t in (("W", W), ("b", b))}
    try:
        model.load_state_dict(entries)
    except RuntimeError as error:
        raise UserError(f"the run does not fit the target: {_one_line(error)}") from None
    return model
