"""The JSON schema of profiles, for editors and other tools."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

from hga_compile.configs.profile import Profile

SCHEMA_FILE = "profile.schema.json"


def profile_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a profile's YAML.

    It knows every field, type and bound, not the rules between fields (`group_size` divides `chunk_size`):
    those are the loader's.
    """
    schema = Profile.model_json_schema()
    for part in (schema, *schema["$defs"].values()):
        part["description"] = part["description"].split("\n\n")[0].replace("\n", " ")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "hga-compile profile",
    }


def schema_text() -> str:
    """Return the schema as the text of `profile.schema.json`."""
    return json.dumps(profile_schema(), indent=2, ensure_ascii=False) + "\n"


def shipped_schema() -> str:
    """Return the text of the schema file inside the package."""
    return resources.files("hga_compile.configs").joinpath(SCHEMA_FILE).read_text(encoding="utf-8")


if __name__ == "__main__":
    Path(__file__).with_name(SCHEMA_FILE).write_text(schema_text(), encoding="utf-8")
