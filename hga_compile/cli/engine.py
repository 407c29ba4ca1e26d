"""A model as the commands call it: dense as it is, or compiled with hga; one face for both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

OPENING = 2  # tokens that the uncompiled model reads into a new cache
PLACES = ("accelerator_kv", "accelerator_index", "host_kv", "nvme_kv")


class Engine(Protocol):
    """How a command runs a model and asks what it read."""

    name: str
    """``dense`` or ``hga``."""
    model: Any
    """The uncompiled model."""
    call: Any
    """What is called: `model` or its compiled form."""

    def start(self, ids: torch.Tensor, new: int | None = None) -> tuple[Any, torch.Tensor]:
        """Return a new cache and the tokens that are still to be read.

        Parameters
        ----------
        ids
            Prompt, ``[batch, tokens]`` int64.
        new
            Tokens that follow it at most, for which room may be made at once; None: not known.
        """

    def reset(self) -> None:
        """Forget what was counted so far; decisions stay."""

    def reads(self, phase: str) -> dict[str, Any]:
        """Return the shares of a phase (prefill or decode), none if it did not happen.

        ``attended`` of the visible tokens; ``kv_bytes_read`` and ``summary_bytes_read`` of the bytes of K/V
        that dense attention would read.
        """

    def bytes_read(self, phase: str) -> float:
        """Return the bytes of K/V and summaries that were read in a phase, all layers."""

    def memory(self, cache: Any) -> dict[str, int]:
        """Return the bytes that a cache holds by place."""

    def sites(self) -> dict[str, Any] | None:
        """Return the numbers of graphs, routed and dense attention sites in them, and the fallbacks."""


class Dense:
    """The uncompiled model with its own cache and attention.

    Parameters
    ----------
    model
        Causal language model of transformers.
    """

    name = "dense"

    def __init__(self, model: Any) -> None:
        self.model = self.call = model
        self._cache: Any = None

    def start(self, ids: torch.Tensor, new: int | None = None) -> tuple[Any, torch.Tensor]:
        """Return an empty `DynamicCache`, which grows, and all tokens."""
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self.model.config)
        return self._cache, ids

    def reset(self) -> None:
        """Do nothing: dense attention reads everything."""

    def reads(self, phase: str) -> dict[str, Any]:
        """Return whole shares."""
        return {"attended": 1.0, "kv_bytes_read": 1.0, "summary_bytes_read": 0.0}

    def bytes_read(self, phase: str) -> float:
        """Return the bytes of the K/V: what one decoded token reads at the present length."""
        return float(sum(self.memory(self._cache).values()))

    def memory(self, cache: Any) -> dict[str, int]:
        """Return the bytes of the K/V tensors; without an accelerator they are in host memory."""
        held = dict.fromkeys(PLACES, 0)
        for layer in cache.layers:
            for tensor in (layer.keys, layer.values):
                if tensor is not None:
                    held["host_kv" if tensor.device.type == "cpu" else "accelerator_kv"] += tensor.nbytes
        return held

    def sites(self) -> None:
        """Return None: nothing was decided."""


class Routed:
    """The model compiled with backend hga.

    Parameters
    ----------
    model
        Causal language model of transformers.
    profile
        Profile to compile with.
    inner
        Compiler of the rest of the graph, instead of the profile's.
    """

    name = "hga"

    def __init__(self, model: Any, profile: Any, inner: str | None = None) -> None:
        import torch

        options: dict[str, Any] = {"profile": profile}
        if inner is not None:
            options["inner"] = inner
        torch.compiler.reset()
        self.model, self.profile = model, profile
        # Nobody changes this model's modules: looking whether they did takes 0.3 ms a token of 48 layers.
        options["guard_filter_fn"] = torch.compiler.skip_guard_on_all_nn_modules_unsafe
        # One graph for prefill steps of every length, and one for decoding.
        self.call: Any = torch.compile(model, backend="hga", dynamic=True, options=options)

        import hga_compile

        hga_compile.reset_report(sites=True)

    def start(self, ids: torch.Tensor, new: int | None = None) -> tuple[Any, torch.Tensor]:
        """Return an `HGACache` that holds the first tokens, and the tokens behind them.

        Where `new` is given it has room for all tokens from the start, unless the profile says for how many.

        The call that fills an empty cache would be a graph of its own. So the uncompiled model reads the
        first tokens, which see only each other.
        """
        import torch

        import hga_compile

        cache = hga_compile.HGACache(self.model.config, profile=self._roomy(ids.shape[1], new))
        first = min(OPENING, ids.shape[1] - 1)
        if first:
            with torch.no_grad():
                self.model(input_ids=ids[:, :first], past_key_values=cache, use_cache=True)
        return cache, ids[:, first:]

    def _roomy(self, prompt: int, new: int | None) -> Any:
        """Return the profile of a cache for so many tokens; compiled code does not depend on it."""
        from hga_compile.configs.loader import resolve_profile

        if new is None or self.profile.offload.reserve_tokens is not None:
            return self.profile
        return resolve_profile({"profile": self.profile, "offload.reserve_tokens": prompt + new})

    def reset(self) -> None:
        """Forget what was counted so far; decisions stay."""
        import hga_compile

        hga_compile.reset_report()

    def reads(self, phase: str) -> dict[str, Any]:
        """Return the shares of a phase, see `Engine.reads`."""
        use = self._totals(phase)
        if not use.calls:
            return {"attended": None, "kv_bytes_read": None, "summary_bytes_read": None}
        whole = max(1, use.dense_bytes)
        return {
            "attended": use.attended_fraction,
            "kv_bytes_read": use.kv_bytes / whole,
            "summary_bytes_read": use.summary_bytes / whole,
        }

    def bytes_read(self, phase: str) -> float:
        """Return the bytes of K/V and summaries that were read in a phase, all layers."""
        use = self._totals(phase)
        return float(use.kv_bytes + use.summary_bytes)

    def memory(self, cache: Any) -> dict[str, int]:
        """Return the bytes that a cache holds by place."""
        import hga_compile

        held = hga_compile.cache_memory(cache)
        return {place: int(getattr(held, place)) for place in PLACES}

    def sites(self) -> dict[str, Any]:
        """Return the numbers of graphs, routed and dense attention sites in them, and the fallbacks."""
        import hga_compile

        report = hga_compile.report()
        routed = sum(site.routed for site in report.sites)
        return {
            "graphs": len({site.graph for site in report.sites}),
            "routed": routed,
            "dense": len(report.sites) - routed,
            "fallbacks": dict(report.fallbacks),
        }

    def _totals(self, phase: str) -> Any:
        import hga_compile

        return hga_compile.report().totals(phase)
