"""Call options and HGA_* variables: forms, precedence, refusals."""

import pytest

from hga_compile.configs.loader import ProfileError, load_profile, resolve_profile
from hga_compile.configs.profile import Budget, LayerOverride, Profile, Routing


def test_nothing_given_is_the_default_profile():
    assert resolve_profile(None, {}) == resolve_profile({}, {}) == load_profile("default")


def test_the_process_environment_is_read_by_default(monkeypatch):
    monkeypatch.setenv("HGA_TIER", "nvme")
    assert resolve_profile().offload.tier == "nvme"


@pytest.mark.parametrize("level", range(4))
def test_call_beats_environment_beats_profile_beats_default(level):
    options, environ, profile = {"tier": "gpu"}, {"HGA_TIER": "nvme"}, {"offload": {"tier": "host"}}
    given = {"profile": profile if level < 3 else {}} | (options if level < 1 else {})
    expected = ("gpu", "nvme", "host", "auto")[level]
    assert resolve_profile(given, environ if level < 2 else {}).offload.tier == expected


def test_the_calls_profile_beats_the_environments():
    assert resolve_profile({}, {"HGA_PROFILE": "paper"}).name == "paper"
    assert resolve_profile({"profile": "default"}, {"HGA_PROFILE": "paper"}).name == "default"
    assert resolve_profile({"profile": None}, {"HGA_PROFILE": ""}).name == "default"


@pytest.mark.parametrize(
    "profile", [Profile(name="x", routing=Routing(sinks=7)), {"name": "x", "routing": {"sinks": 7}}]
)
def test_a_profile_or_mapping_serves_as_profile(profile):
    assert resolve_profile({"profile": profile}, {}) == Profile(name="x", routing=Routing(sinks=7))


@pytest.mark.parametrize(
    ("value", "budget"),
    [
        (0.03, Budget(fraction=0.03)),
        (1.0, Budget(fraction=1.0)),
        (512, Budget(tokens=512)),
        (Budget(fraction=0.1, tokens=9), Budget(fraction=0.1, tokens=9)),
        ({"fraction": 0.1}, Budget(fraction=0.1)),
    ],
)
def test_budget_shorthand_replaces_the_whole_budget(value, budget):
    assert resolve_profile({"budget": value}, {}).routing.budget == budget


@pytest.mark.parametrize("value", [True, 0, -1, 0.0, 1.5, float("nan"), "3%", None, [0.1]])
def test_budget_shorthand_refuses_the_rest(value):
    with pytest.raises(
        ProfileError, match=r"^option budget: expected a share above 0.0 and at most 1.0 or a whole"
    ):
        resolve_profile({"budget": value}, {})


def test_a_budget_of_one_token_is_told_from_the_whole_context():
    with pytest.raises(
        ProfileError, match=r"option budget: .* got 4 sinks and a budget of 1 tokens.*fraction 1\.0"
    ):
        resolve_profile({"budget": 1}, {})


@pytest.mark.parametrize(
    "options",
    [
        {"routing.budget.fraction": 0.05},
        {"routing": {"budget": {"fraction": 0.05}}},
        {"routing": {"budget.fraction": 0.05}},
        {"routing.budget": {"fraction": 0.05}},
    ],
)
def test_fields_set_alone_leave_their_neighbours(options):
    assert resolve_profile(options, {}).routing.budget == Budget(fraction=0.05, tokens=256)


def test_all_shorthands_reach_their_field():
    profile = resolve_profile(
        {"tier": "gpu", "inner": "eager", "strict": True, "prefill": "dense", "kernels": "native"}, {}
    )
    assert (profile.offload.tier, profile.compile.inner) == ("gpu", "eager")
    assert (profile.compile.strict, profile.routing.prefill) == (True, "dense")
    assert profile.compile.kernels == "native"


def test_models_tuples_and_empty_sections_are_taken():
    profile = resolve_profile(
        {
            "routing.overrides": (LayerOverride(layers=(0, -1), sinks=1), {"layers": [2], "bits": 8}),
            "routing.dense_layers": (3,),
            "model": {"layers": 30},
        },
        {},
    )
    assert profile.routing.overrides[0] == LayerOverride(layers=(0, -1), sinks=1)
    assert profile.routing.overrides[1].bits == 8
    assert (profile.routing.dense_layers, profile.model.layers) == ((3,), 30)
    assert resolve_profile({"routing": Routing(sinks=9)}, {}).routing == Routing(sinks=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buget": 0.03}, "option buget: unknown option; did you mean 'budget'?"),
        ({"profil": "x"}, "option profil: unknown option; did you mean 'profile'?"),
        ({"group_size": 8}, "option group_size: unknown option; did you mean 'routing.group_size'?"),
        ({"routing.grup_size": 8}, "unknown option; did you mean 'routing.group_size'?"),
        (
            {"routing": {"grup_size": 8}},
            "option routing.grup_size: unknown option; did you mean 'routing.group_size'?",
        ),
        ({"routing": {3: 8}}, "option routing"),
        (
            {"zzz": 1},
            "option zzz: unknown option; known: budget, tier, inner, strict, prefill, kernels, profile",
        ),
        ({"": 1}, "unknown option"),
        ({"..": 1}, "unknown option"),
        ({3: 1}, "option 3: expected a field name, got type int"),
        (
            {"budget": 0.1, "routing.budget.tokens": 5},
            "sets the same field as option budget; give one of them",
        ),
        ({"routing.sinks": 1, "routing": {"sinks": 2}}, "sets the same field"),
        ({"tier": object()}, "option tier: expected plain data, got type object"),
        (
            {"tier": "disk"},
            "option tier: offload.tier: expected 'auto', 'gpu', 'host' or 'nvme', got \"disk\"",
        ),
        ({"strict": "yes"}, "option strict: compile.strict: expected a valid boolean"),
        (
            {"kernels": "cuda"},
            "compile.kernels: expected 'auto', 'triton', 'native' or 'reference', got \"cuda\"",
        ),
        ({"strict": 1}, "option strict: compile.strict: expected a valid boolean"),
        ({"routing.group_size": "8"}, 'option routing.group_size: expected a valid integer, got "8"'),
        (
            {"routing.group_size": 24},
            "option routing.group_size: group_size must divide chunk_size, got 24 and 64",
        ),
        (
            {"routing.chunk_size": 30},
            'profile "default" with option routing.chunk_size: routing.group_size: group_size',
        ),
        ({"routing": None}, "option routing: expected a mapping with summary"),
        (
            {"routing.overrides": [{"layers": [0], "sinkz": 1}]},
            "routing.overrides[0].sinkz: unknown field; did you",
        ),
        (
            {"profile": {"routing": {"sinkz": 7}}},
            "option profile: routing.sinkz: unknown field; did you mean 'sinks'?",
        ),
        ({"profile": 3}, "option profile: expected a name, a path, a Profile or a mapping, got type int"),
        ({"profile": ".."}, "expected a name of letters"),
        ("budget", "options: expected a mapping, got type str"),
    ],
)
def test_wrong_options_get_one_clear_line(options, message):
    with pytest.raises(ProfileError) as caught:
        resolve_profile(options, {})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_endless_options_are_refused():
    endless = []
    endless.append(endless)
    with pytest.raises(ProfileError, match="must not nest deeper than 32 levels"):
        resolve_profile({"routing.overrides": endless}, {})


@pytest.mark.parametrize(
    ("environ", "path", "value"),
    [
        ({"HGA_BUDGET": "0.05"}, "routing.budget", Budget(fraction=0.05)),
        ({"HGA_BUDGET": "512"}, "routing.budget", Budget(tokens=512)),
        ({"HGA_BUDGET": "1e-2"}, "routing.budget", Budget(fraction=0.01)),
        ({"HGA_TIER": "host"}, "offload.tier", "host"),
        ({"HGA_INNER": "aot_eager"}, "compile.inner", "aot_eager"),
        ({"HGA_STRICT": "1"}, "compile.strict", True),
        ({"HGA_STRICT": "TRUE"}, "compile.strict", True),
        ({"HGA_STRICT": "off"}, "compile.strict", False),
        ({"HGA_COMPILE__STRICT": "yes"}, "compile.strict", True),
        ({"HGA_PREFILL": "dense"}, "routing.prefill", "dense"),
        ({"HGA_KERNELS": "reference"}, "compile.kernels", "reference"),
        ({"HGA_ROUTING__GROUP_SIZE": "8"}, "routing.group_size", 8),
        ({"HGA_ROUTING__CHUNK_STAGE": "on"}, "routing.chunk_stage", "on"),
        ({"HGA_ROUTING__BUDGET__FRACTION": "0.1"}, "routing.budget", Budget(fraction=0.1, tokens=256)),
        ({"HGA_ROUTING__DENSE_LAYERS": "[0, -1]"}, "routing.dense_layers", (0, -1)),
        ({"HGA_OFFLOAD__HOST_BUDGET": "1KiB"}, "offload.host_budget", 1024),
        ({"HGA_OFFLOAD__NVME_FOLDER": "/data: x"}, "offload.nvme_folder", "/data: x"),
        ({"HGA_GPU": "5090"}, "gpu", "5090"),
        ({"HGA_MODEL__LAYERS": "30"}, "model.layers", 30),
        ({"HGA_TIER": "", "HGA_ROUTING__SINKS": ""}, "offload.tier", "auto"),
        ({"HGA_MODELS": "/models", "HGA_CACHE": "/cache"}, "offload.tier", "auto"),
    ],
)
def test_variables_set_their_field(environ, path, value):
    found = resolve_profile({}, environ)
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"HGA_BUDGE": "1"}, "HGA_BUDGE: unknown variable; did you mean 'HGA_BUDGET'?"),
        (
            {"HGA_ROUTING__GRUP_SIZE": "8"},
            "HGA_ROUTING__GRUP_SIZE: unknown variable; did you mean 'HGA_ROUTING__GROUP",
        ),
        ({"HGA_ZZ__QQ": "8"}, "HGA_ZZ__QQ: unknown variable"),
        (
            {"HGA_BUDGET": "lots"},
            'HGA_BUDGET: expected a share above 0.0 and at most 1.0 or a whole number of tokens, got "',
        ),
        ({"HGA_STRICT": "maybe"}, "HGA_STRICT: compile.strict: expected a valid boolean"),
        ({"HGA_TIER": "disk"}, "HGA_TIER: offload.tier: expected 'auto'"),
        (
            {"HGA_ROUTING__GROUP_SIZE": "24"},
            "HGA_ROUTING__GROUP_SIZE: routing.group_size: group_size must divide",
        ),
        (
            {"HGA_ROUTING__GROUP_SIZE": "'8'"},
            'HGA_ROUTING__GROUP_SIZE: routing.group_size: expected a valid integer, got "8"',
        ),
        ({"HGA_ROUTING__DENSE_LAYERS": "[0"}, "HGA_ROUTING__DENSE_LAYERS:"),
        ({"HGA_ROUTING__DENSE_LAYERS": "*x"}, "anchors and aliases"),
        ({"HGA_ROUTING__SINKS": "!!python/name:os.system"}, "is not allowed"),
        ({"HGA_BUDGET": "\udcff"}, "HGA_BUDGET:1: expected UTF-8 text"),
        ({"HGA_BUDGET": "0.1", "HGA_ROUTING__BUDGET__TOKENS": "9"}, "sets the same field as HGA_BUDGET"),
        ({"HGA_PROFILE": "papr"}, "did you mean 'paper'?"),
    ],
)
def test_wrong_variables_get_one_clear_line(environ, message):
    with pytest.raises(ProfileError) as caught:
        resolve_profile({}, environ)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
