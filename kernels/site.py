"""What an attention op needs to know of its site, as text that travels in the graph."""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal

from hga_compile.configs.profile import Kernels, Offload
from hga_compile.configs.routing import Routing

__all__ = ["SiteConfig"]


@cache
def _version() -> str:
    """Digest of the sources of the ops, so that a cached graph of another version never fits."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class SiteConfig:
    """Settings of one attention site.

    They are part of the graph: a changed profile changes the graph, and with it every compile cache's key.
    """

    layer: int
    """Number of the layer, for reports."""
    tier: Literal["gpu", "host", "nvme"]
    """Where its token K/V lives."""
    routing: Routing
    """Routing of the layer, overrides merged."""
    kernels: Kernels = "auto"
    """What it runs in."""
    place: Offload = field(default_factory=Offload)
    """Budgets and sizes of the tier."""

    def to_text(self) -> str:
        """Return the text that `from_text` reads."""
        routing = self.routing.model_dump(mode="json")
        fields = {"version": _version(), "layer": self.layer, "tier": self.tier, "routing": routing}
        fields |= {"kernels": self.kernels, "place": self.place.model_dump(mode="json")}
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=4096)
    def from_text(text: str) -> "SiteConfig":
        """Read what `to_text` wrote.

        Raises
        ------
        ValueError
            Text of another version.
        """
        fields = json.loads(text)
        if fields["version"] != _version():
            raise ValueError(
                f"the graph was compiled by another version of hga-compile (site {fields['version']}, "
                f"expected {_version()}); clear the compile cache"
            )
        routing = Routing.model_validate_json(json.dumps(fields["routing"]))
        place = Offload.model_validate_json(json.dumps(fields["place"]))
        return SiteConfig(fields["layer"], fields["tier"], routing, fields["kernels"], place)
