import numpy as np
import pytest
import torch
from naive import hadamard

from hga_compile.kernels.rotation import rotation

DIMS = [1, 2, 3, 8, 20, 64, 80, 96, 127, 128]


@pytest.mark.parametrize("dim", DIMS)
def test_is_made_of_hadamard_blocks(dim: int, device: torch.device) -> None:
    matrix = rotation(dim, device)
    assert matrix.dtype == torch.float32 and matrix.device == device
    np.testing.assert_allclose(matrix.cpu().numpy(), hadamard(dim), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dim", DIMS)
def test_leaves_dot_products_alone(dim: int) -> None:
    matrix = rotation(dim, torch.device("cpu")).double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim).double(), rtol=0, atol=1e-6)
    assert torch.equal(matrix, matrix.T)


def test_spreads_an_outlier() -> None:
    for dim in (64, 80):
        key = torch.zeros(dim)
        key[3] = 8.0
        turned = key @ rotation(dim, torch.device("cpu"))
        assert turned.abs().max() <= 8 / 64**0.5 + 1e-6


def test_is_made_once() -> None:
    assert rotation(64, torch.device("cpu")) is rotation(64, torch.device("cpu"))
