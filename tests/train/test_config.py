"""Configuration: presets, validation, files, assignments."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from spd_fast.errors import UserError
from spd_fast.train import Config, TrainConfig, load_config, parse_config, set_keys
from spd_fast.train.config import MinimalityConfig, _models

BASE = {
    "name": "toy",
    "preset": "paper",
    "target": {"kind": "tms", "features": 5, "hidden": 2},
    "sites": {"linear1": 4, "hidden_layers.0": 3},
    "losses": {"importance_minimality": {"coeff": 1e-3, "p": 1}},
    "lr": 1e-3,
    "steps": 10,
    "batch_size": 8,
}


def parse(*assignments: str) -> Config:
    return parse_config(set_keys(copy.deepcopy(BASE), list(assignments)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepss": 3}, "unknown key 'stepss'; nearest valid key: 'steps'"),
        ({"losses": {"faithfulnes": 1}}, "unknown key 'losses.faithfulnes'; nearest valid key: "
         "'faithfulness'"),
        ({"steps": 0}, "steps: input should be greater than or equal to 1, got 0"),
        ({"self": 1}, "unknown key 'self'; nearest valid key: 'seed'"),
    ],
)  # fmt: skip
def test_mistakes_in_keyword_arguments_are_one_line_too(change, message):
    data = {
        "steps": 20, "batch_size": 2, "lr": 1e-3, "lr_schedule": "cosine",
        "warm_up": {"steps": 0},
        "losses": {"faithfulness": 1, "importance_minimality": {"coeff": 1, "p": 1}},
    }  # fmt: skip
    assert TrainConfig(**data).steps == 20
    with pytest.raises(UserError) as caught:
        TrainConfig(**data | change)
    assert str(caught.value) == message


def error(*assignments: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(*assignments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_paper_preset_is_the_papers_code():
    config = parse()
    assert (config.sigmoid, config.init, config.delta) == ("paper", "paper", False)
    assert config.lr_schedule == "quarter_cosine"
    assert config.losses.faithfulness == 1
    assert config.warm_up.steps == 0


def test_the_2026_preset_is_the_later_code():
    config = parse("preset='2026'")
    assert (config.sigmoid, config.init, config.delta) == ("2026", "2026", True)
    assert config.lr_schedule == "cosine"
    assert config.losses.faithfulness == 0
    assert config.warm_up.model_dump() == {"steps": 200, "lr": 0.01, "weight_decay": 0.1}


def test_a_setting_overrides_its_preset():
    config = parse("preset=2026", "warm_up.steps=3", "delta=false", "losses.faithfulness=0.5")
    assert (config.warm_up.steps, config.warm_up.weight_decay) == (3, 0.1)
    assert not config.delta
    assert config.losses.faithfulness == 0.5


@pytest.mark.parametrize("key", ["preset", "sigmoid", "init"])
def test_2026_needs_no_quotes(key):
    assert getattr(parse(f"{key}=2026"), key) == "2026"


def test_losses_with_coefficient_zero_take_no_part():
    config = parse("losses.faithfulness=0", "losses.stochastic_recon=2")
    assert config.losses.coefficients() == {
        "stochastic_recon": 2.0, "stochastic_recon_layerwise": 1.0, "importance_minimality": 1e-3,
    }  # fmt: skip


def test_what_is_written_as_yaml_reads_back_the_same():
    config = parse("preset=2026", "lr=1e-5", "target.path=/some/where")
    assert parse_config(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "'1e-3'"])
def test_every_way_to_write_a_number_counts(text):
    assert parse(f"lr={text}").lr == 1e-3


# Every key that is not known, and the nearest one.
@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("stepz", "'steps'"),
        ("batchsize", "'batch_size'"),
        ("target.featurs", "'features'"),
        ("losses.stochastic_recn", "'stochastic_recon'"),
        ("losses.importance_minimality.coef", "'coeff'"),
        ("warm_up.step", "'steps'"),
    ],
)
def test_an_unknown_key_names_the_nearest(key, near):
    assert error(f"{key}=1") == f"unknown key {key!r}; nearest valid key: {near}"


def test_keys_of_the_other_target_kind_are_unknown():
    data = copy.deepcopy(BASE)
    data["target"] = {"kind": "resid_mlp", "features": 5, "d_mlp": 3, "layers": 1, "hidden": 2}
    with pytest.raises(UserError, match=r"unknown key 'target.hidden'"):
        parse_config(data)


def test_a_mistyped_key_comes_before_the_one_it_leaves_missing():
    data = copy.deepcopy(BASE)
    data["losse"] = data.pop("losses")
    with pytest.raises(UserError, match="unknown key 'losse'; nearest valid key: 'losses'"):
        parse_config(data)


def test_an_unknown_preset_comes_before_what_it_leaves_missing():
    assert error("preset=papr") == "preset: input should be 'paper' or '2026', got 'papr'"


@pytest.mark.parametrize("key", ["name", "preset", "target", "sites", "losses", "lr", "steps"])
def test_a_missing_key_is_named(key):
    data = {k: v for k, v in BASE.items() if k != key}
    with pytest.raises(UserError, match=f"missing key '{key}"):
        parse_config(data)


def test_a_target_without_a_kind_misses_it():
    with pytest.raises(UserError, match=r"^missing key 'target.kind'$"):
        parse_config(BASE | {"target": {"features": 5}})


def nested(kind: type[BaseModel], path: tuple[str, ...] = ()) -> list[str]:
    """The dotted keys of every configuration object in a configuration."""
    found = []
    for name, field in kind.model_fields.items():
        for model in _models(field.annotation):
            found += [".".join((*path, name)), *nested(model, (*path, name))]
    return sorted(set(found))


# A loss that has no options of its own may be a number instead of a mapping.
ALWAYS_MAPPINGS = [
    key
    for key in nested(Config)
    if key.count(".") == 0 or key.endswith("minimality") or "pgd" in key
]


@pytest.mark.parametrize("key", ALWAYS_MAPPINGS)
def test_a_number_where_a_mapping_is_needed_is_answered_with_its_keys(key):
    assert "losses.pgd_recon" in ALWAYS_MAPPINGS
    message = error(f"{key}=2")
    assert re.fullmatch(rf"{key}: input should be a mapping with keys '\w+', .*, got 2", message)
    assert "instance" not in message


def test_of_many_keys_some_are_told():
    assert error("losses=2").endswith(", 'ci_masked_recon_layerwise', …, got 2")
    assert "…" not in error("ci_transformer=2")


def test_a_number_where_a_list_is_needed_says_so():
    assert error("ci_hidden=16") == "ci_hidden: input should be a list, got 16"


def test_losses_that_train_nothing_are_an_error():
    nothing = ["faithfulness", "stochastic_recon", "stochastic_recon_layerwise"]
    changes = [f"losses.{n}=0" for n in [*nothing, "importance_minimality.coeff"]]
    assert error(*changes) == ("losses: every coefficient is 0, so that nothing would be trained")
    parse(*changes[1:])
    parse(*changes, "losses.faithfulness={coeff: 0, coeff_final: 1}")


def test_a_missing_nested_key_is_named_with_its_path():
    data = copy.deepcopy(BASE)
    del data["target"]["hidden"]
    with pytest.raises(UserError, match=r"^missing key 'target.hidden'$"):
        parse_config(data)


@pytest.mark.parametrize(
    ("assignment", "key", "given"),
    [
        ("steps=ten", "steps", "'ten'"),
        ("steps=10.5", "steps", "10.5"),
        ("steps=true", "steps", "True"),
        ("steps=0", "steps", "0"),
        ("steps=[1]", "steps", "[1]"),
        ("steps=", "steps", "None"),
        ("steps=2147483648", "steps", "2147483648"),
        ("lr=true", "lr", "True"),
        ("lr=-1", "lr", "-1"),
        ("lr=0", "lr", "0"),
        ("lr=.nan", "lr", "nan"),
        ("lr=.inf", "lr", "inf"),
        ("lr=1e999", "lr", "'1e999'"),
        ("seed=-1", "seed", "-1"),
        ("seed=4294967296", "seed", "4294967296"),
        ("name=3", "name", "3"),
        ("delta=maybe", "delta", "'maybe'"),
        ("divergence=l2", "divergence", "'l2'"),
        ("lr_schedule=linear", "lr_schedule", "'linear'"),
        ("sigmoid=papr", "sigmoid", "'papr'"),
        ("sigmoid=true", "sigmoid", "True"),
        ("gate_eval=interpolate", "gate_eval", "'interpolate'"),
        ("ci_fn=mlpp", "ci_fn", "'mlpp'"),
        ("ci_hidden=16", "ci_hidden", "16"),
        ("ci_hidden=[16, 0]", "ci_hidden.1", "0"),
        ("sites.linear1=0", "sites.linear1", "0"),
        ("sites.hidden_layers.0=x", "sites.hidden_layers.0", "'x'"),
        ("target.features=-3", "target.features", "-3"),
        ("target.identity_layers=-1", "target.identity_layers", "-1"),
        ("target.probability=1.5", "target.probability", "1.5"),
        ("target.probability=.nan", "target.probability", "nan"),
        ("target=5", "target", "5"),
        ("losses=3", "losses", "3"),
        ("losses.faithfulness=-1", "losses.faithfulness", "-1"),
        ("losses.importance_minimality.p=0", "losses.importance_minimality.p", "0"),
        ("losses.importance_minimality.p=.nan", "losses.importance_minimality.p", "nan"),
    ],
)
def test_a_wrong_value_names_its_key_and_what_was_given(assignment, key, given):
    message = error(assignment)
    assert message.startswith(f"{key}: ")
    assert message.endswith(f", got {given}")


def test_an_unknown_kind_of_target_lists_the_known_ones():
    assert "'tms', 'resid_mlp'" in error("target.kind=transformer")


def test_no_sites_are_an_error():
    with pytest.raises(UserError, match=r"^sites: "):
        parse_config(BASE | {"sites": {}})


@pytest.mark.parametrize("data", [None, 3, "text", [1], [["steps", 3]]])
def test_what_is_no_mapping_is_an_error(data):
    with pytest.raises(UserError, match="a configuration is a mapping of keys, got"):
        parse_config(data)


def test_keys_that_are_no_text_are_an_error():
    with pytest.raises(UserError, match=r"^a configuration's keys are text, got 1$"):
        parse_config(BASE | {1: 2})


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        parse().steps = 3


def minimality(**keys) -> MinimalityConfig:
    return MinimalityConfig(coeff=1, p=2, **keys)


def test_p_is_constant_without_a_final_value():
    assert [minimality().p_at(f) for f in (0, 0.5, 1)] == [2, 2, 2]


@pytest.mark.parametrize(("fraction", "p"), [(0, 2), (0.25, 1.75), (0.5, 1.5), (1, 1), (2, 1)])
def test_p_anneals_linearly_to_its_final_value(fraction, p):
    assert minimality(p_final=1).p_at(fraction) == pytest.approx(p)


@pytest.mark.parametrize(("fraction", "p"), [(0, 2), (0.2, 2), (0.4, 1.5), (0.6, 1), (0.9, 1)])
def test_p_anneals_between_two_fractions_of_the_run(fraction, p):
    annealed = minimality(p_final=1, p_anneal_start=0.2, p_anneal_end=0.6)
    assert annealed.p_at(fraction) == pytest.approx(p)


def test_p_jumps_where_both_fractions_are_the_same():
    annealed = minimality(p_final=1, p_anneal_start=0.5, p_anneal_end=0.5)
    assert annealed.p_at(0.6) == 1


def test_p_does_not_jump_before_its_fraction():
    annealed = minimality(p_final=1, p_anneal_start=0.5, p_anneal_end=0.5)
    assert annealed.p_at(0.4) == 2


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_file_is_a_mapping(tmp_path):
    assert load_config(write(tmp_path, "a: 1\nb: {c: [2]}\n")) == {"a": 1, "b": {"c": [2]}}


def test_a_python_tag_is_an_error_and_runs_nothing(tmp_path):
    made = tmp_path / "made"
    text = f"name: !!python/object/apply:os.mkdir ['{made}']"
    with pytest.raises(UserError, match=r"is not plain YAML: .*python/object/apply"):
        load_config(write(tmp_path, text))
    assert not made.exists()


@pytest.mark.parametrize(
    "text", ["a: [1", "a: 2020-13-45", "[" * 5000, "a: b: c", "a: 1" + "0" * 5000, "\t", "a: \x00"]
)
def test_what_yaml_cannot_read_is_an_error_of_one_line(tmp_path, text):
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "3", "- 1", "null"])
def test_a_file_without_a_mapping_is_an_error(tmp_path, text):
    with pytest.raises(UserError, match="does not hold a mapping of keys"):
        load_config(write(tmp_path, text))


def test_a_file_that_is_no_text_is_an_error(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        load_config(write(tmp_path, b"\xff\xfe\x00"))


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("a: 1\nb: 2\na: 3\n", "a", "lines 1 and 3"),
        ("b:\n  x: 1\n  y: 2\n  'y': 3\n", "y", "lines 3 and 4"),
        ("b: [{c: 1, c: 2}]", "c", "line 1"),
    ],
)
def test_a_key_that_stands_twice_is_an_error(tmp_path, text, key, lines):
    with pytest.raises(UserError, match=rf"run.yaml: key '{key}' stands twice, in {lines}$"):
        load_config(write(tmp_path, text))


def test_a_merged_key_may_be_overridden(tmp_path):
    text = "c: &c {x: 0}\na: {b: &b {<<: *c, x: 1}}\nd: {<<: *b, x: 2}\ne: {<<: *c, <<: {z: 3}}\n"
    assert load_config(write(tmp_path, text)) == {
        "c": {"x": 0}, "a": {"b": {"x": 1}}, "d": {"x": 2}, "e": {"x": 0, "z": 3},
    }  # fmt: skip


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        load_config(tmp_path / "none.yaml")


def message_of(function, argument) -> str:
    """What a UserError says, or nothing; any other exception goes through."""
    try:
        function(argument)
    except UserError as error:
        return str(error)
    return ""


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.sampled_from("a1:-.,[]{}&*!|>'\"%@` \n\t#?~") | st.characters()))
def test_any_text_is_a_mapping_or_an_error_of_one_line(tmp_path, text):
    message = message_of(load_config, write(tmp_path, text.encode("utf-8", "replace")))
    assert "\n" not in message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(key=st.sampled_from(sorted({*Config.model_fields})), value=JSON)
def test_any_value_of_any_key_is_accepted_or_an_error_that_names_it(key, value):
    message = message_of(parse_config, BASE | {key: value})
    assert "\n" not in message
    assert message == "" or key in message


def test_assignments_reach_nested_keys():
    data = set_keys({"a": {"b": 1, "c": 2}}, ["a.b=3", "d.e=[1, x]"])
    assert data == {"a": {"b": 3, "c": 2}, "d": {"e": [1, "x"]}}


def test_a_mapping_takes_the_place_of_the_whole_mapping():
    assert set_keys({"a": {"b": 1, "c": 2}}, ["a={c: 3}"]) == {"a": {"c": 3}}
    assert set_keys({"a": {"b": 1}}, ["a={}", "a.c=2"]) == {"a": {"c": 2}}
    assert parse("sites={linear1: 4}").sites == {"linear1": 4}
    assert error("sites={}").startswith("sites: ")


def test_a_mapping_is_still_filled_up_by_the_preset():
    config = parse("losses={importance_minimality: {coeff: 1, p: 2}}", "warm_up={}")
    assert config.losses.faithfulness == 1
    assert config.warm_up.steps == 0


def test_an_assignment_below_what_is_no_mapping_makes_one():
    assert set_keys({"a": 1}, ["a.b=2"]) == {"a": {"b": 2}}


def test_assignments_leave_their_input_alone():
    data = {"a": {"b": 1}}
    set_keys(data, ["a.b=3"])
    assert data == {"a": {"b": 1}}


def test_a_later_assignment_wins():
    assert set_keys({}, ["a=1", "a=2"]) == {"a": 2}


def test_the_dots_of_a_site_belong_to_its_name():
    assert set_keys({}, ["sites.layers.0.mlp_in=3"]) == {"sites": {"layers.0.mlp_in": 3}}


def test_a_value_may_hold_an_equals_sign():
    assert set_keys({}, ["name=a=b"]) == {"name": "a=b"}


@pytest.mark.parametrize("assignment", ["steps", "=3", ""])
def test_an_assignment_without_key_or_equals_sign_is_an_error(assignment):
    with pytest.raises(UserError, match="--set needs key=value"):
        set_keys({}, [assignment])


@pytest.mark.parametrize("text", ["[1", "!!python/name:os.system", "2020-13-45", "{"])
def test_an_assigned_value_that_is_not_plain_yaml_is_an_error(text):
    with pytest.raises(UserError, match=r"--set steps: the value .* is not plain YAML"):
        set_keys({}, [f"steps={text}"])
