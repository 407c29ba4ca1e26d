"""Low-bit keys as group summaries (the default): every key in 1 to 8 bits, centred and rotated.

A key is centred by its head's mean key (a shift that the softmax cannot see), rotated by a Hadamard matrix so
that no channel stands out, and rounded to ``2**bits`` levels that are symmetric about zero, with one scale a
token. A group's score is the log-sum-exp of its tokens' low-bit scores. With `routing.centre: block` a key is
coded about a centre that moves along with the keys (see `centres`).
"""

import torch
from torch import Tensor

from hga_compile.configs.profile import Kernels
from hga_compile.configs.routing import Routing
from hga_compile.kernels.centres import BlockCentres
from hga_compile.kernels.coarse import BLOCK, SINGLES, Coarse, TileKeys, average, exact, to_eight_bits
from hga_compile.kernels.dispatch import preferred, triton_serves
from hga_compile.kernels.gpu import encode, follow_centre
from hga_compile.kernels.gpu_tiles import tile_keys
from hga_compile.kernels.levels import decode_levels
from hga_compile.kernels.native import routed_groups, routed_steps, scan_scores
from hga_compile.kernels.rotation import rotation
from hga_compile.kernels.summaries import Scorer, grown, register_summary

__all__ = ["LowBitSummary", "decode_keys", "encode_keys"]

# Step between levels, in standard deviations, that rounds a normal variable with the least square error
# (J. Max, Quantizing for minimum distortion, 1960). A rotated key is close to normal; its scale is refitted.
_STEP = {1: 1.5958, 2: 0.9957, 4: 0.3352, 8: 0.0308}


def encode_keys(keys: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round rotated keys to `bits` bits a channel.

    Parameters
    ----------
    keys : Tensor
        ``[rows, tokens, dim]``, float32, centred and rotated.
    bits : int
        1, 2, 4 or 8.

    Returns
    -------
    codes : Tensor
        ``[rows, ceil(dim * bits / 8), tokens]`` uint8. Byte ``b`` holds channels ``b * 8 / bits`` onwards,
        lowest bits first. Tokens are innermost, so that a scan over tokens reads runs.
    scales : Tensor
        ``[rows, tokens]`` float16: the least-squares fit of the levels to the key,
        ``sum(x * level) / sum(level ** 2)``. Not finite where the key is not.
    """
    rows, tokens, dim = keys.shape
    levels, per_byte = 2**bits, 8 // bits
    top = (levels - 1) / 2
    start = keys.square().mean(-1, keepdim=True).sqrt() * _STEP[bits]
    start = torch.where(start > 0, start, torch.ones_like(start))
    index = torch.floor(keys / start + levels / 2).clamp(0, levels - 1)
    value = index - top
    scales = (keys * value).sum(-1) / value.square().sum(-1)
    scales = scales.clamp(max=torch.finfo(torch.float16).max)  # a huge key is not a broken one
    index = torch.where(torch.isfinite(index), index, torch.zeros_like(index)).to(torch.int32)
    if dim % per_byte:
        index = torch.nn.functional.pad(index, (0, per_byte - dim % per_byte))
    shifts = torch.arange(per_byte, device=keys.device, dtype=torch.int32) * bits
    packed = (index.view(rows, tokens, -1, per_byte) << shifts).sum(-1)
    return packed.to(torch.uint8).transpose(1, 2), scales.to(torch.float16)


def decode_keys(codes: Tensor, scales: Tensor, bits: int, dim: int) -> Tensor:
    """Return the rotated keys that the codes stand for, ``[rows, tokens, dim]`` float32."""
    top = (2**bits - 1) / 2
    keys: Tensor = (decode_levels(codes, bits, dim) - top).transpose(1, 2) * scales.float()[..., None]
    return keys


class LowBitSummary:
    """Low-bit codes of all tokens of complete groups of one layer (see `summaries.Summary`).

    Parameters
    ----------
    routing : Routing
        `bits`, `group_size` and `centre` are used.
    centre : Tensor
        ``[rows, dim]`` float32.
    kernels : {"auto", "triton", "native", "reference"}
        What encodes and scores, as far as there is a choice.
    """

    def __init__(self, routing: Routing, centre: Tensor, kernels: Kernels = "auto") -> None:
        self.kernels = kernels
        self.bits, self.group_size = routing.bits, routing.group_size
        self.centre = centre
        self.centres = BlockCentres(centre.float()) if routing.centre == "block" else None
        self.groups = 0
        rows, self.dim = centre.shape
        packed = -(-self.dim * self.bits // 8)
        # A GPU multiplies a token's codes as they lie; a CPU scans many tokens at a time.
        self._bytes_last = triton_serves(kernels, centre.device, torch.float32, self.dim)
        shape = (rows, 0, packed) if self._bytes_last else (rows, packed, 0)
        self._turned_centre = self.turned(centre.float()) if self._bytes_last else None
        self._codes = torch.empty(shape, dtype=torch.uint8, device=centre.device)
        self.scales = torch.empty(rows, 0, dtype=torch.float16, device=centre.device)

    @property
    def codes(self) -> Tensor:
        """``[rows, bytes, tokens]``: those of all groups, and slack."""
        return self._codes.transpose(1, 2) if self._bytes_last else self._codes

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        """What kernels for a GPU score by: codes and scales."""
        return self.codes, self.scales

    def expect(self, tokens: int) -> None:
        """See `summaries.Summary`."""
        used = self.groups * self.group_size
        self._codes = grown(self._codes, used, tokens, 1 if self._bytes_last else 2, slack=False)
        self.scales = grown(self.scales, used, tokens, 1, slack=False)
        if self.centres is not None:
            self.centres.reserve(tokens)

    def append(self, keys: Tensor) -> None:
        """Encode the keys of complete groups; ``[rows, tokens, dim]``."""
        used, new = self.groups * self.group_size, keys.shape[1]
        self._codes = grown(self._codes, used, used + new, 1 if self._bytes_last else 2)
        self.scales = grown(self.scales, used, used + new, 1)
        if self._bytes_last and triton_serves(self.kernels, keys.device, keys.dtype, self.dim):
            self._encode(keys, used)
        else:
            rotated = (keys.float() - self.centre[:, None]) @ rotation(self.dim, keys.device)
            if self.centres is not None:
                rotated -= self.centres.of_tokens(used, used + new)
            codes, scales = encode_keys(rotated, self.bits)
            self.codes[:, :, used : used + new] = codes
            self.scales[:, used : used + new] = scales
        self.groups += new // self.group_size

    def reserve(self, keys: Tensor, tokens: int) -> None:
        """Make room for `tokens` tokens, and encode keys after the last group, which stay uncounted.

        With `encode_last`, whose tokens are not counted either, kernels can score groups that are not there
        yet: their scales are 0. Only where codes lie as a GPU reads them.

        Parameters
        ----------
        keys : Tensor
            ``[rows, n, dim]``: those of a group that is not complete; `n` may be 0.
        tokens : int
            Of the sequence at most.
        """
        used, new = self.groups * self.group_size, keys.shape[1]
        self.expect(tokens)
        self.scales[:, used:] = 0
        if new:
            self._encode(keys, used)

    def follow(self, pages: Tensor, end: Tensor) -> None:
        """Make the centre of the block that the last of as many tokens as `end` says begins, if it does.

        Parameters
        ----------
        pages : Tensor
            ``[groups, rows, page]`` of these tokens (see `store.pages.Pages`), which the GPU reaches.
        end : Tensor
            int32 on the GPU.
        """
        if self.centres is not None and self._turned_centre is not None:
            follow_centre(pages, self.centres.values, self._turned_centre, end, self.group_size)

    def encode_last(self, keys: Tensor, end: Tensor) -> None:
        """Encode ``[rows, n, dim]`` keys of the last tokens of as many as `end` says, int32 on the GPU."""
        self._encode(keys, end)

    def _encode(self, keys: Tensor, begin: int | Tensor) -> None:
        encode(
            keys, self.centre, self.codes, self.scales, begin, self.bits, _STEP[self.bits],
            self._turned_centre, self._moved,
        )  # fmt: skip

    def truncate(self, groups: int) -> None:
        """Forget every group from number `groups` on."""
        self.groups = min(self.groups, groups)
        if self.centres is not None:
            self.centres.truncate(self.groups * self.group_size)

    def scorer(self, groups: int) -> Scorer:
        """Return the scoring function of the first `groups` groups."""
        codes, scales = self._coded(groups)
        top, levels = (2**self.bits - 1) / 2, list[Tensor]()

        def score(query: Tensor, limit: int) -> Tensor:
            rows, heads, queries, _ = query.shape
            flat, end = self._turned(query), limit * self.group_size
            token = None
            if queries == 1 and preferred(self.kernels, codes.device) == "native" and codes.is_cpu:
                # Unpacking alone costs more than this does.
                token = scan_scores(codes, scales[:, :end], flat, self.bits, self._moved)
            if token is None:
                if not levels:
                    levels.append(decode_levels(codes, self.bits, self.dim))
                token = torch.bmm(flat, levels[0][:, :, :end])
                # The levels are centred through the query: one pass less over the codes.
                token.sub_(flat.sum(-1, keepdim=True) * top).mul_(scales[:, None, :end])
                if self.centres is not None:
                    self.centres.add_scores(token, flat)
            return token.view(rows, heads, queries, limit, self.group_size)

        return score

    def steps(
        self, pages: Tensor, scaled: Tensor, query: Tensor, spans: Tensor, vote: str, scale: float
    ) -> Tensor | None:
        """Route queries and attend, each on its own, on a CPU (see `routed_steps`).

        Parameters
        ----------
        pages : Tensor
            ``[groups, rows, page]`` float32.
        scaled, query : Tensor
            ``[rows, heads, queries, dim]`` float32, with the softmax scale applied and without.
        spans : Tensor
            ``[queries, 5]`` int64: which groups are fixed, and how many to choose; all before the windows are
            summarised.
        vote, scale
            `routing.vote` and the softmax scale.

        Returns
        -------
        Tensor or None
            ``[rows, heads, queries, v_dim]``; None where there is no such way.
        """
        codes, scales = self._coded(int(spans[:, 2].max()))
        turned = self._turned(scaled).view(scaled.shape)
        out = routed_steps(
            pages, codes, scales, turned.transpose(1, 2), query.transpose(1, 2), spans,
            bits=self.bits, group_size=self.group_size, vote=vote, scale=scale, centres=self._moved,
        )  # fmt: skip
        return None if out is None else out.transpose(1, 2)

    def routes(self, scaled: Tensor, spans: Tensor, vote: str) -> Tensor | None:
        """List the groups that `steps` would attend to from one query a row, in its order.

        Parameters
        ----------
        scaled : Tensor
            ``[rows, heads, 1, dim]`` float32, softmax scale applied.
        spans, vote
            As `steps` takes them, of one query.

        Returns
        -------
        Tensor or None
            ``[rows, n]`` int64; None where there is no such way.
        """
        codes, scales = self._coded(int(spans[:, 2].max()))
        turned = self._turned(scaled).view(scaled.shape)[:, :, 0]
        return routed_groups(
            codes, scales, turned, spans[0], bits=self.bits, group_size=self.group_size, vote=vote,
            centres=self._moved,
        )  # fmt: skip

    def tile_keys(self, groups: int, starts: Tensor | None, fused: bool) -> TileKeys:
        """Return what tiles are routed by (see `summaries.Summary`), rotated."""
        if fused:
            return tile_keys(
                self.codes, self.scales, groups, self.group_size, self.bits, self.dim, starts, self._moved
            )
        tokens = groups * self.group_size
        codes, scales = self.codes[:, :, :tokens], self.scales[:, :tokens]
        keys = decode_keys(codes, scales, self.bits, self.dim)
        moved = None
        if self.centres is not None:
            keys += self.centres.of_tokens(0, tokens)
            moved = exact(self.centres.values.float())
        from_start = torch.arange(max(tokens, SINGLES), device=keys.device).expand(len(keys), -1)
        if starts is not None:
            from_start = from_start + starts[:, None]
        shifted = keys[torch.arange(len(keys))[:, None], from_start.clamp(max=tokens - 1)]
        rest = shifted[:, SINGLES:]
        rest = rest[:, : rest.shape[1] // BLOCK * BLOCK]
        parts = (to_eight_bits(shifted[:, :SINGLES]), average(rest, BLOCK))
        anchors = Coarse(torch.cat([p.values for p in parts], 1), torch.cat([p.steps for p in parts], 1))
        means = average(keys, self.group_size)
        return TileKeys(means, anchors, codes, scales, self.bits, self.dim, centres=moved)

    def turned(self, query: Tensor) -> Tensor:
        """Rotate queries ``[..., dim]`` as the keys are."""
        return query @ rotation(self.dim, query.device)

    def select_rows(self, rows: Tensor) -> None:
        """Replace the rows by `rows`."""
        rows = rows.to(self.codes.device)
        self._codes, self.scales = self._codes[rows], self.scales[rows]
        self.centre = self.centre[rows]
        if self._turned_centre is not None:
            self._turned_centre = self._turned_centre[rows]
        if self.centres is not None:
            self.centres.select_rows(rows)

    def bytes_per_token(self) -> float:
        """Return the bytes of one token's codes and scale, and of its share of a centre that moves."""
        moved = 0.0 if self.centres is None else self.centres.bytes_per_token()
        return self.codes.shape[1] + self.scales.element_size() + moved

    def nbytes(self) -> int:
        """Return the bytes allocated."""
        moved = 0 if self.centres is None else self.centres.nbytes()
        return self.codes.nbytes + self.scales.nbytes + self.centre.nbytes + moved

    @property
    def _moved(self) -> Tensor | None:
        """Centres ``[rows, >= blocks, dim]`` that move; None: there are none."""
        return None if self.centres is None else self.centres.values

    def _coded(self, groups: int) -> tuple[Tensor, Tensor]:
        """Codes ``[rows, bytes, tokens]`` and float32 scales ``[rows, tokens]`` of the first groups."""
        tokens = groups * self.group_size
        return self.codes[:, :, :tokens], self.scales[:, :tokens].float()

    def _turned(self, query: Tensor) -> Tensor:
        """Rotate queries as the keys are, to ``[rows, heads * queries, dim]``."""
        return self.turned(query.reshape(query.shape[0], -1, query.shape[3]))


@register_summary("lowbit")
def _make(routing: Routing, centre: Tensor, kernels: Kernels) -> LowBitSummary:
    return LowBitSummary(routing, centre, kernels)
