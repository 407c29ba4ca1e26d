"""What an attention op needs to know of its site, as text that travels in the graph."""

import json
from dataclasses import dataclass
from functools import lru_cache

from hga_compile.configs.routing import Routing

__all__ = ["SiteConfig"]

# Raised whenever the text or the ops' meaning changes, so that a cached graph of another version never fits.
_VERSION = 1


@dataclass(frozen=True)
class SiteConfig:
    """Settings of one attention site.

    They are part of the graph: a changed profile changes the graph, and with it every compile cache's key.
    """

    layer: int
    """Number of the layer, for reports."""
    tier: str
    """Where its token K/V lives: `gpu` or `host`."""
    routing: Routing
    """Routing of the layer, overrides merged."""

    def to_text(self) -> str:
        """Return the text that `from_text` reads."""
        routing = self.routing.model_dump(mode="json")
        fields = {"version": _VERSION, "layer": self.layer, "tier": self.tier, "routing": routing}
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
        if fields["version"] != _VERSION:
            raise ValueError(
                f"the graph was compiled by another version of hga-compile (site {fields['version']}, "
                f"expected {_VERSION}); clear the compile cache"
            )
        routing = Routing.model_validate_json(json.dumps(fields["routing"]))
        return SiteConfig(fields["layer"], fields["tier"], routing)
