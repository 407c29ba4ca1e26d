"""Milliseconds a token: measured where the target is the present device, else by the hardware model."""

from __future__ import annotations

from dataclasses import replace
from threading import Lock

import torch

from hga_compile.configs.cards import GpuCard, ModelCard
from hga_compile.configs.profile import Profile
from hga_compile.tuning.hardware import Step, decode_ms, full_layers, hot_us
from hga_compile.tuning.timing import measured_us

__all__ = ["Latency"]


class Latency:
    """Decode latency of a model on a GPU at one context.

    Parameters
    ----------
    card, gpu : ModelCard, GpuCard
        What runs where.
    context : int
        Tokens.
    device : torch.device or None
        The present device, if it is the target: steps of a layer are measured there. None: they are modelled.
    """

    def __init__(self, card: ModelCard, gpu: GpuCard, context: int, device: torch.device | None) -> None:
        self.card, self.gpu, self.context, self.device = card, gpu, context, device
        self._measured: dict[Step, float] = {}
        # Two measurements at a time would measure each other.
        self._one = Lock()

    @property
    def how(self) -> str:
        """Where the numbers come from, for a reader."""
        if self.device is None:
            return "hardware model, weights by their bytes alone"
        return "attention of each layer measured here, weights by their bytes, a hot cache's misses modelled"

    def milliseconds(self, profile: Profile) -> float:
        """Return the milliseconds of one token."""
        modelled = decode_ms(self.card, self.gpu, profile, self.context)
        if self.device is None:
            return modelled
        shape, routing = self.card.geometry, profile.routing
        cuda = self.gpu.kind == "cuda"
        tier = "host" if cuda and profile.offload.tier != "gpu" else "gpu"
        found = 0.0
        plain = profile.model_copy(
            update={"routing": routing.model_copy(update={"dense_layers": tuple(range(shape.layers))})}
        )
        rest = decode_ms(self.card, self.gpu, plain, 1)
        for layer in full_layers(self.card):
            own = routing.for_layer(layer, shape.layers)
            item = 2 if cuda else 4
            step = Step(
                self.context, shape.kv_heads, shape.heads // shape.kv_heads, shape.head_dim, own, tier, item,
                profile.offload.hot_cache if tier == "host" else None,
            )  # fmt: skip
            if step.hot is None:
                found += self._step(step)
            else:
                # Drawn lists would say nothing of its hits.
                found += self._step(replace(step, tier="gpu", hot=None)) + hot_us(step, self.gpu)
        return found / 1e3 + rest

    def _step(self, step: Step) -> float:
        with self._one:
            if step not in self._measured:
                assert self.device is not None  # the caller checked
                self._measured[step] = measured_us(step, self.device)
            return self._measured[step]
