"""Checkpoints of the authors' code, written here in both of its formats from our own models."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
import yaml
from torch import nn

from spd_fast import cli
from spd_fast.errors import UserError
from spd_fast.model import DecomposedModel, Stochastic
from spd_fast.model.authors import decomposition_of, read_run
from spd_fast.ops import make_key
from spd_fast.targets import TMS, ResidMLP, import_run, load_target
from spd_fast.train.config import TMSTarget
from tests import toys

TMS_SITES = {"linear1": 4, "hidden_layers.0": 3, "linear2": 4}


def tms(layers=1):
    torch.manual_seed(3)
    return TMS(5, 2, layers)


def of_tms(**options):
    return DecomposedModel(tms(), TMS_SITES, backend="reference", **options)


def target_state(model, network):
    state = network.state_dict()
    if isinstance(network, ResidMLP):
        embedding = state.pop("embedding.weight").T
        state |= {"W_E": embedding, "W_U": embedding.T.clone()}
    return {f"target_model.{n}": t for n, t in state.items()}


def state_2026(model):
    """The names that the authors' torch code of 2026 gives its tensors."""
    state = target_state(model, model.target)
    for name, site in model.sites.items():
        key = name.replace(".", "-")
        state[f"_components.{key}.V"] = model.V(name).detach().clone()
        state[f"_components.{key}.U"] = model.U(name).detach().clone()
        if site.bias is not None:
            state[f"_components.{key}.bias"] = site.bias.clone()
        for n, p in model.ci_fns[key].named_parameters():
            state[f"_ci_fns.{key}.{n}"] = p.detach().clone()
    return state


def state_paper(model):
    state = target_state(model, model.target)
    for name in model.sites:
        key = name.replace(".", "-")
        state[f"components.{key}.A"] = model.V(name).detach().clone()
        state[f"components.{key}.B"] = model.U(name).detach().clone()
        gate = model.ci_fn(name)
        W, b = gate.weights, gate.biases
        if len(W) == 1:
            state |= {f"gates.{key}.weight": W[0][:, 0, 0], f"gates.{key}.bias": b[0][:, 0]}
        else:
            state |= {
                f"gates.{key}.mlp_in": W[0][:, 0], f"gates.{key}.in_bias": b[0],
                f"gates.{key}.mlp_out": W[1][:, :, 0], f"gates.{key}.out_bias": b[1][:, 0],
            }  # fmt: skip
    return {n: t.detach().clone() for n, t in state.items()}


def write(folder, state, step=100, **config):
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / f"model_{step}.pth")
    (folder / "final_config.yaml").write_text(yaml.safe_dump({"seed": 0} | config))
    return folder


FORMATS = {"2026": state_2026, "paper": state_paper}


def output(model, x):
    ci = model.causal_importances(model.clean_forward(x))
    return model.masked_forward(x, Stochastic(ci, make_key(1, 2), delta=True))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("ci", ["mlp", "linear"])
def test_a_run_comes_through_unchanged(tmp_path, kind, ci):
    model = of_tms(sigmoid=kind, init=kind, ci_fn=ci, ci_hidden=(6,))
    source = write(tmp_path / "run", FORMATS[kind](model), C=4, steps=100)
    import_run(source, tmp_path / "out")
    config = TMSTarget(features=5, hidden=2, identity_layers=1)
    target = load_target(config, tmp_path / "out/target")
    again = DecomposedModel.from_pretrained(tmp_path / "out", target, backend="reference")
    assert again.sigmoid == kind
    assert again.delta == (kind == "2026")
    x = torch.rand(9, 5)
    assert torch.equal(output(again, x), output(model, x))
    source_config = yaml.safe_load((tmp_path / "out/source_config.yaml").read_text())
    assert source_config == {"C": 4, "seed": 0, "steps": 100}


@pytest.mark.parametrize("ci", ["vector_mlp", "shared_mlp"])
def test_networks_of_the_2026_code_come_through(tmp_path, ci):
    model = of_tms(sigmoid="2026", ci_fn=ci, ci_hidden=(6, 5))
    source = write(tmp_path, state_2026(model), ci_fn_type=ci)
    again = decomposition_of(read_run(source), tms(), backend="reference")
    assert again.options["ci_fn"] == ci
    assert again.options["ci_hidden"] == [6, 5]
    x = torch.rand(9, 5)
    assert torch.equal(output(again, x), output(model, x))


def test_a_residual_mlp_comes_through(tmp_path):
    network = ResidMLP(6, 8, 3, 2, seed=1)
    model = DecomposedModel(network, {"layers.*": 5}, backend="reference")
    write(tmp_path / "run", state_2026(model))
    again = import_run(tmp_path / "run", tmp_path / "out")
    x = torch.rand(4, 6)
    assert torch.equal(again.target(x), network(x))
    assert list(again.sites) == list(model.sites)
    assert torch.equal(again.V("layers.1.mlp_out"), model.V("layers.1.mlp_out"))


def test_the_latest_checkpoint_is_read_unless_one_is_named(tmp_path):
    for step in (9, 100, 20):
        write(tmp_path, state_2026(of_tms(seed=step)), step)
    assert read_run(tmp_path).step == 100
    assert read_run(tmp_path / "model_20.pth").step == 20


def test_a_target_may_be_given(tmp_path):
    model = toys.decomposed()
    state = {n: t for n, t in state_2026(model).items() if not n.startswith("target_model.")}
    again = decomposition_of(read_run(write(tmp_path, state)), toys.Net(), backend="reference")
    assert torch.equal(again.U("blocks.1.down"), model.U("blocks.1.down"))


def test_the_outputs_name_comes_along(tmp_path):
    class Named(toys.Net):
        def forward(self, x):
            return (super().forward(x),)

    source = write(tmp_path, state_2026(toys.decomposed()), pretrained_model_output_attr="idx_0")
    again = decomposition_of(read_run(source), Named(), backend="reference")
    assert again.clean_forward(toys.batch(1)).output.shape == (9, 3)


def test_a_target_with_other_weights_is_an_error(tmp_path):
    source = write(tmp_path, state_2026(toys.decomposed()))
    with pytest.raises(UserError, match=r"made of another target: the weights at 'blocks.0.up'"):
        decomposition_of(read_run(source), toys.Net(seed=1))


def test_a_target_without_the_sites_is_an_error(tmp_path):
    source = write(tmp_path, state_2026(toys.decomposed()))
    with pytest.raises(UserError, match="the target has no module 'blocks-0-up'"):
        decomposition_of(read_run(source), nn.Linear(2, 2))


class Runs:
    """Unpickling it writes a file: what a checkpoint must not be able to do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    write(tmp_path, state_2026(of_tms()))
    marker = tmp_path / "ran"
    torch.save({"_components.a.V": Runs(marker)}, tmp_path / "model_200.pth")
    with pytest.raises(UserError, match=r"model_200.pth is not a plain state dict.*nothing in it"):
        read_run(tmp_path)
    (tmp_path / "model_200.pth").write_bytes(pickle.dumps(Runs(marker)))
    with pytest.raises(UserError, match="is not a plain state dict"):
        read_run(tmp_path)
    assert not marker.exists()


def test_a_config_that_would_run_code_is_refused(tmp_path):
    write(tmp_path, state_2026(of_tms()))
    marker = tmp_path / "ran"
    text = f"seed: !!python/object/apply:builtins.open ['{marker}', 'w']\n"
    (tmp_path / "final_config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"final_config.yaml cannot be read as plain YAML"):
        read_run(tmp_path)
    assert not marker.exists()


def damaged(change):
    def state():
        entries = state_2026(of_tms())
        change(entries)
        return entries

    return state


def drop(prefix):
    def change(entries):
        for name in [n for n in entries if n.startswith(prefix)]:
            del entries[name]

    return damaged(change)


def narrow(entries):
    entries["_components.linear1.V"] = entries["_components.linear1.V"][:, :2]


def untie(entries):
    entries["_components.linear2.V"] = entries["_components.linear2.V"] + 1


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (drop("_components."), r"holds no components of the authors' code \(neither format\)"),
        (drop("_components.linear1.U"), "the components of site 'linear1' lack 'U'"),
        (drop("_ci_fns.linear1"), "site 'linear1' has no importance function"),
        (drop("_ci_fns.linear1.layers.2.b"), "of site 'linear1' lacks 'layers.2.b'"),
        (drop("target_model."), "does not say what network it was made of: name it with --target"),
        (drop("target_model.linear2"), "is no toy that this program knows"),
        (damaged(narrow), "tied and need the same C, got 2 and 4"),
        (damaged(untie), "'linear1' and 'linear2' are each other's transpose in one storage"),
    ],
)
def test_a_checkpoint_that_lacks_something_is_an_error(tmp_path, state, message):
    with pytest.raises(UserError, match=message):
        import_run(write(tmp_path / "run", state()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_sigmoid_is_an_error(tmp_path):
    source = write(tmp_path / "run", state_2026(of_tms()), sigmoid_type="leakiest")
    with pytest.raises(UserError, match="sigmoid_type 'leakiest' of the run is not supported"):
        import_run(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda d: None, "no folder"),
        (lambda d: d.mkdir(), r"holds no checkpoint model_<step>.pth"),
        (lambda d: (d.mkdir(), torch.save({}, d / "model_1.pth")), "final_config.yaml cannot be"),
    ],
)
def test_a_folder_without_a_run_is_an_error(tmp_path, prepare, message):
    prepare(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        import_run(tmp_path / "run", tmp_path / "out")


def test_a_folder_that_holds_something_is_not_written_to(tmp_path):
    source = write(tmp_path / "run", state_2026(of_tms()))
    with pytest.raises(UserError, match="is not an empty folder"):
        import_run(source, source)


def test_the_command_line_imports(tmp_path, capsys):
    source = write(tmp_path / "run", state_paper(of_tms()))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["import", str(source), "--out", str(tmp_path / "out")])
    assert stopped.value.code in (0, None)
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 3 sites, 11 components\n"
    assert json.loads((tmp_path / "out/config.json").read_text())["sites"] == TMS_SITES


def test_the_command_line_takes_a_target_of_ours(tmp_path):
    source = write(tmp_path / "run", state_2026(of_tms()))
    import_run(source, tmp_path / "first")
    cut = {n: t for n, t in state_2026(of_tms()).items() if not n.startswith("target_model.")}
    bare = write(tmp_path / "bare", cut)
    again = import_run(bare, tmp_path / "second", str(tmp_path / "first/target"))
    assert torch.equal(again.target.linear1.weight, tms().linear1.weight)


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["import", str(tmp_path / "no"), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"spd-fast: error: no folder {tmp_path / 'no'}\n"
