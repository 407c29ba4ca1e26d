"""Finding, validating and saving profiles: names, paths, field errors with their line, round trip."""

import os
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hga_compile.configs.loader import (
    ProfileError,
    builtin_names,
    load_profile,
    resolve_profile,
    save_profile,
)
from hga_compile.configs.profile import (
    Budget,
    CompileSettings,
    LayerOverride,
    ModelMatch,
    Offload,
    Profile,
    Routing,
    Window,
)


@pytest.fixture
def write(tmp_path):
    def file(text: str) -> Path:
        path = tmp_path / "p.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return file


def test_default_is_all_defaults():
    profile = load_profile("default")
    assert profile == Profile(name="default", description=profile.description)


def test_paper_is_the_papers_setting():
    routing = load_profile("paper").routing
    assert (routing.chunk_size, routing.group_size, routing.summary) == (64, 16, "mean")
    assert (routing.chunk_parts, routing.chunk_stage, routing.budget.fraction) == (1, "on", 0.03)


def test_every_builtin_is_named_like_its_file():
    assert {"default", "paper"} <= set(builtin_names())
    for name in builtin_names():
        assert load_profile(name).name == name


@pytest.mark.parametrize("form", [str, Path, os.path.relpath])
def test_a_path_is_a_users_file(write, form):
    assert load_profile(form(write("name: mine\nrouting:\n  chunk_stage: on\n"))).routing.chunk_stage == "on"


def test_a_bare_yaml_file_name_is_a_path(write, monkeypatch):
    monkeypatch.chdir(write("name: mine\n").parent)
    assert load_profile("p.yaml").name == "mine"
    assert load_profile(Path("p.yaml")).name == "mine"


def test_a_home_folder_is_expanded(write, monkeypatch):
    monkeypatch.setenv("HOME", str(write("name: mine\n").parent))
    assert load_profile("~/p.yaml").name == "mine"


@pytest.mark.parametrize(
    "name", ["..", ".", "", "a..b", "..\\default", "a\0b", "default\n", "%2e%2e", "-x", "a" * 200]
)
def test_names_that_are_not_names_are_refused(name):
    with pytest.raises(ProfileError, match="expected a name of letters"):
        load_profile(name)


@pytest.mark.parametrize("name", ["../profiles/default", "../../pyproject", "/etc/passwd"])
def test_separators_never_reach_the_builtin_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProfileError):
        load_profile(name)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ProfileError, match=r"unknown profile; did you mean 'paper'\?"):
        load_profile("papr")
    with pytest.raises(ProfileError, match=r"known: default, .*paper"):
        load_profile("zzzzzz")
    with pytest.raises(ProfileError, match="got type int"):
        load_profile(3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'group_size: "5"',
            ':4: routing.group_size: expected a valid integer, got "5"; write it without quotes',
        ),
        ("group_size: true", ":4: routing.group_size: expected a valid integer, got true"),
        ("group_size: 5.0", ":4: routing.group_size: expected a valid integer, got 5.0"),
        ("group_size: 1e1", ":4: routing.group_size: expected a valid integer, got 10.0"),
        ("group_size: .nan", ":4: routing.group_size: expected a valid integer, got NaN"),
        ("group_size: -4", ":4: routing.group_size: expected a number greater than or equal to 1, got -4"),
        (
            "group_size: 017",
            ':4: routing.group_size: expected a valid integer, got "017"; write 17 for decimal',
        ),
        ("group_size: 12:30", ':4: routing.group_size: expected a valid integer, got "12:30"'),
        ("group_size: 1_6", ':4: routing.group_size: expected a valid integer, got "1_6"'),
        ("group_size:", ":4: routing.group_size: expected a valid integer, got null"),
        (
            "group_size: 24",
            ":4: routing.group_size: group_size must divide chunk_size, got 24 and 64; try 16 or 32",
        ),
        (
            "group_size: 64\n  chunk_size: 32",
            ":4: routing.group_size: group_size must not exceed chunk_size, got 64",
        ),
        ("grop_size: 4", ":4: routing.grop_size: unknown field; did you mean 'group_size'?"),
        ("bits: true", ":4: routing.bits: expected a valid integer, got true"),
        ("bits: 2.0", ":4: routing.bits: expected a valid integer, got 2.0"),
        ("bits: 3", ":4: routing.bits: expected 1, 2, 4 or 8, got 3"),
        ("summary: median", ":4: routing.summary: expected 'lowbit' or 'mean', got \"median\""),
        ("chunk_stage: true", ":4: routing.chunk_stage: expected 'auto', 'on' or 'off', got true"),
        ("dense_layers: 3", ":4: routing.dense_layers: expected a list, got 3"),
        (
            "dense_layers:\n    - 0\n    - 1.5",
            ":6: routing.dense_layers[1]: expected a valid integer, got 1.5",
        ),
        ("budget: 0.03", ":4: routing.budget: expected a mapping with fraction, tokens, got 0.03"),
        ("budget: {}", ":4: routing.budget: at least one of fraction and tokens must be set"),
        ("budget:\n    fraction: .nan", ":5: routing.budget.fraction: expected a finite number, got NaN"),
        (
            "budget:\n    fraction: .inf",
            ":5: routing.budget.fraction: expected a finite number, got Infinity",
        ),
        (
            "budget:\n    fraction: 1e999",
            ":5: routing.budget.fraction: expected a finite number, got Infinity",
        ),
        ("budget:\n    fraction: true", ":5: routing.budget.fraction: expected a valid number, got true"),
        (
            "budget:\n    fraction: 3",
            ":5: routing.budget.fraction: expected a number less than or equal to 1, got 3",
        ),
        (
            'budget:\n    fraction: "1e-3"',
            ':5: routing.budget.fraction: expected a valid number, got "1e-3"; write it',
        ),
        (
            "budget:\n    tokens: 0",
            ":5: routing.budget.tokens: expected a number greater than or equal to 1, got 0",
        ),
        ("budget:\n    tokens: 2", ":5: routing.budget.tokens: sinks must fit the budget, got 4 sinks and"),
        ("overrides:\n    - sinks: 1", ":5: routing.overrides[0].layers: this field is required"),
        (
            "overrides:\n    - layers: [0]",
            ":5: routing.overrides[0]: an override must set a field beside layers",
        ),
        (
            "overrides:\n    - layers: [0]\n      sinkz: 1",
            ":6: routing.overrides[0].sinkz: unknown field; did you",
        ),
        (
            "sinks: -1\n  bits: 3",
            ":4: routing.sinks: expected a number greater than or equal to 0, got -1 (and 1 more)",
        ),
    ],
)
def test_a_wrong_field_is_named_with_its_line(write, text, message):
    path = write(f"# comment\nname: x\nrouting:\n  {text}\n")
    start = time.perf_counter()
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    assert time.perf_counter() - start < 1.0
    assert f"{path}{message}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "schema_version: 2\nname: x",
            ":1: schema_version: expected at most 1, the newest that this hga-compile reads",
        ),
        ("schema_version: true\nname: x", ":1: schema_version: expected a valid integer, got true"),
        ('schema_version: "1"\nname: x', ":1: schema_version: expected a valid integer"),
        ("schema_version: 1", ":1: name: this field is required"),
        ("[1, 2]", ":1: expected a mapping with schema_version, name"),
        ("just text", ":1: expected a mapping with schema_version, name"),
        ("name: x\nrooting: {}", ":2: rooting: unknown field; did you mean 'routing'?"),
        ("name: x\noffload: {tier: disk}", ":2: offload.tier: expected 'auto', 'gpu', 'host' or 'nvme'"),
        (
            "name: x\noffload: {host_budget: '5'}",
            ":2: offload.host_budget: expected a number of bytes or a size",
        ),
        (
            "name: x\ncompile: {strict: yes}",
            ':2: compile.strict: expected a valid boolean, got "yes"; write true',
        ),
        ("name: x\nname: y", ":2: name: duplicate key, first on line 1"),
        ('name: x\n"a\\e[31m\\n": 1', ':2: "a\\u001b[31m\\n": unknown field'),
        ("name: 5", ":1: name: expected a valid string, got 5"),
    ],
)
def test_a_wrong_document_is_named_with_its_line(write, text, message):
    path = write(text)
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    assert f"{path}{message}" in str(caught.value)
    assert str(caught.value).isprintable()


def test_an_integer_serves_as_a_share(write):
    assert load_profile(write("name: x\nrouting: {budget: {fraction: 1}}\n")).routing.budget == Budget(
        fraction=1.0
    )


_shares = st.floats(1e-6, 1.0, allow_nan=False) | st.sampled_from([1e-3, 1e-5, 1.0])
_counts = st.integers(1, 10**9)


def _either(model):
    return st.one_of(
        st.builds(model, fraction=_shares),
        st.builds(model, tokens=_counts),
        st.builds(model, fraction=_shares, tokens=_counts),
    )


def _words():
    traps = st.sampled_from(
        ["no", "on", "1e-3", "12:30", "017", "0o17", "5", "true", "null", "~", ".nan", "a: b", "#x"]
    )
    return st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=60) | traps


_budgets = _either(Budget).filter(lambda budget: budget.fraction is not None or budget.tokens >= 8)
_overrides = st.builds(
    LayerOverride,
    layers=st.lists(st.integers(-40, 40), min_size=1, max_size=4).map(tuple),
    budget=_budgets | st.none(),
    window=_either(Window) | st.none(),
    sinks=st.integers(0, 8),
    bits=st.sampled_from([1, 2, 4, 8]) | st.none(),
    chunk_stage=st.sampled_from(["auto", "on", "off"]) | st.none(),
)
_routings = st.builds(
    Routing,
    summary=st.sampled_from(["lowbit", "mean"]),
    bits=st.sampled_from([1, 2, 4, 8]),
    group_size=st.sampled_from([1, 2, 4, 16]),
    chunk_size=st.sampled_from([16, 64, 1024]),
    chunk_stage=st.sampled_from(["auto", "on", "off"]),
    chunk_parts=st.sampled_from([1, 4, 16]),
    chunk_budget=_either(Budget),
    budget=_budgets,
    sinks=st.integers(0, 8),
    window=_either(Window),
    vote=st.sampled_from(["mass_sum", "mass_max"]),
    tail=st.sampled_from(["drop", "estimate"]),
    prefill=st.sampled_from(["routed", "dense"]),
    dense_layers=st.lists(st.integers(-40, 40), max_size=4).map(tuple),
    overrides=st.lists(_overrides, max_size=3).map(tuple),
)
_profiles = st.builds(
    Profile,
    name=_words(),
    description=st.just("") | _words(),
    model=st.none()
    | st.builds(ModelMatch, hub_id=_words(), layers=_counts, sha256=st.none() | st.just("0" * 64)),
    gpu=st.none() | _words(),
    routing=_routings,
    offload=st.builds(
        Offload, hot_cache=st.none() | _shares, host_budget=st.none() | _counts, nvme_folder=_words()
    ),
    compile=st.builds(CompileSettings, strict=st.booleans()),
)


@given(_profiles)
def test_profile_to_yaml_and_back_is_the_same_profile(tmp_path_factory, profile):
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    save_profile(profile, path)
    again = load_profile(path)
    assert again == profile and again.digest() == profile.digest()


def test_saved_yaml_means_the_same_to_a_yaml_1_1_reader(tmp_path):
    profile = Profile(
        name="no", description="1e-3", routing=Routing(chunk_stage="on", budget=Budget(fraction=1e-5))
    )
    save_profile(profile, tmp_path / "p.yaml")
    assert yaml.safe_load((tmp_path / "p.yaml").read_text()) == profile.model_dump(
        mode="json", exclude_none=True
    )


def test_saving_replaces_in_one_step_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "p.yaml"
    save_profile(Profile(name="old"), path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ProfileError, match="cannot write the profile: No space left on device"):
        save_profile(Profile(name="new"), path)
    assert load_profile(path).name == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["p.yaml"]
    monkeypatch.undo()
    save_profile(Profile(name="new"), path)
    assert load_profile(path).name == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["p.yaml"]


def test_an_unwritable_place_is_one_clear_error(tmp_path):
    for path in (tmp_path / "none" / "p.yaml", tmp_path):
        with pytest.raises(ProfileError, match="cannot write the profile"):
            save_profile(Profile(name="x"), path)
    assert list(tmp_path.iterdir()) == []


def test_a_saved_profile_resolves(tmp_path):
    save_profile(Profile(name="mine", routing=Routing(sinks=7)), tmp_path / "p.yaml")
    assert resolve_profile({"profile": tmp_path / "p.yaml"}, {}).routing.sinks == 7
