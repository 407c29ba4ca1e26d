"""The nvme tier's RAM: single groups of the pages that are read."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hga_compile.configs.profile import Offload
from hga_compile.store.nvme import NvmePages

ROWS, DIM, SIZE, TOKENS = 2, 16, 4, 2000
GROUP = SIZE * 2 * DIM * 4
CPU = torch.device("cpu")


@pytest.fixture
def kv() -> tuple[Tensor, Tensor]:
    key, value = torch.randn(2, ROWS, TOKENS, DIM, generator=torch.Generator().manual_seed(0)).unbind()
    return key, value


def stored(kv: tuple[Tensor, Tensor], folder: Path, groups: int, **more: object) -> NvmePages:
    place = Offload(tier="nvme", nvme_folder=str(folder), nvme_cache=groups * GROUP, **more)
    tier = NvmePages(ROWS, DIM, DIM, SIZE, torch.float32, CPU, "auto", place)
    tier.write(*kv, 0)
    tier._reader.drop(0)
    return tier


def expected(kv: tuple[Tensor, Tensor], groups: Tensor) -> Tensor:
    """Pages of ``[rows, n]`` groups, ``[n, rows, page]``."""
    parts = [part.unflatten(1, (-1, SIZE)).flatten(2) for part in kv]
    rows = torch.arange(ROWS)[:, None]
    return torch.cat([part[rows, groups] for part in parts], 2).transpose(0, 1)


def test_what_was_asked_for_is_kept_and_nothing_around_it(kv: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    tier = stored(kv, tmp_path, groups=60)
    groups = torch.stack([torch.arange(0, 440, 25), torch.arange(3, 440, 25)])
    for again in (False, True):
        assert torch.equal(tier.fetch(groups), expected(kv, groups))
        # 63 groups a page: seven pages of each row, once; the eighth is not complete.
        assert (tier.traffic.misses, tier.traffic.reads) == (36, 14)
        assert tier.traffic.hits == 36 * again
    assert tier._reader.held() == 36 * GROUP
    tier.close()


def test_a_group_may_be_listed_twice(kv: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    tier = stored(kv, tmp_path, groups=60)
    groups = torch.tensor([[7, 300, 7, 499, 0], [450, 1, 2, 1, 450]])
    assert torch.equal(tier.fetch(groups), expected(kv, groups))
    tier.close()


def test_more_than_there_is_room_for_drives_nothing_out(kv: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    tier = stored(kv, tmp_path, groups=20)
    few, every = torch.arange(5).expand(2, -1), torch.arange(499).expand(2, -1)
    tier.fetch(few)
    assert torch.equal(tier.fetch(every), expected(kv, every))
    before = tier.traffic.misses
    assert torch.equal(tier.fetch(few), expected(kv, few))
    assert tier.traffic.misses == before
    tier.close()


def test_what_is_replaced_is_read_anew(kv: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    tier = stored(kv, tmp_path, groups=200)
    groups = torch.arange(0, 450, 10).expand(2, -1)
    tier.fetch(groups)
    other = tuple(-part for part in kv)
    tier.write(*(part[:, 1000:] for part in other), 1000)
    mixed = tuple(torch.cat([old[:, :1000], new[:, 1000:]], 1) for old, new in zip(kv, other, strict=True))
    assert torch.equal(tier.fetch(groups), expected(mixed, groups))
    tier.close()


def test_groups_that_gave_way_are_read_ahead(kv: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    tier, other = stored(kv, tmp_path, groups=40), stored(kv, tmp_path, groups=40)
    groups = torch.arange(0, 300, 15).expand(2, -1)
    tier.fetch(groups)
    other.fetch(groups)  # takes the slots that both share
    reads = tier.traffic.reads
    tier.write(*(part[:, :1] for part in kv), TOKENS)
    assert torch.equal(tier.fetch(groups), expected(kv, groups))
    assert tier.traffic.prefetched > 0
    assert tier.traffic.reads == reads
    tier.close()
    other.close()
