"""The published JSON schema: current, accepting the built-in profiles, refusing what the loader refuses."""

from importlib import resources

import jsonschema
import pydantic
import pytest

from hga_compile.configs.loader import builtin_names
from hga_compile.configs.schema import profile_schema, schema_text, shipped_schema
from hga_compile.configs.yaml_source import read_yaml


@pytest.fixture(scope="module")
def validator():
    jsonschema.Draft202012Validator.check_schema(profile_schema())
    return jsonschema.Draft202012Validator(profile_schema())


# Older releases write the same schema differently ("allOf" around a reference).
@pytest.mark.skipif(
    tuple(map(int, pydantic.VERSION.split(".")[:2])) < (2, 10),
    reason="pydantic words its schemas differently",
)
def test_the_shipped_schema_is_current():
    assert shipped_schema() == schema_text(), "run: python -m hga_compile.configs.schema"


@pytest.mark.parametrize("name", builtin_names())
def test_builtin_profiles_validate_and_name_the_schema(name, validator):
    file = resources.files("hga_compile.configs") / "profiles" / f"{name}.yaml"
    assert file.read_text().startswith("# yaml-language-server: $schema=../profile.schema.json\n")
    validator.validate(read_yaml(file).data)


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"name": "x", "schema_version": 2},
        {"name": "x", "rooting": {}},
        {"name": "x", "routing": {"bits": 3}},
        {"name": "x", "routing": {"budget": {}}},
        {"name": "x", "routing": {"budget": {"fraction": None}}},
        {"name": "x", "routing": {"budget": {"fraction": 0}}},
        {"name": "x", "routing": {"group_size": "4"}},
        {"name": "x", "routing": {"overrides": [{"sinks": 1}]}},
        {"name": "x", "offload": {"host_budget": "64"}},
    ],
)
def test_the_schema_refuses_wrong_documents(document, validator):
    assert not validator.is_valid(document)


def test_every_field_has_a_description():
    schema = profile_schema()
    for part in (schema, *schema["$defs"].values()):
        for name, field in part["properties"].items():
            assert field.get("description"), name
