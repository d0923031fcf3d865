"""What runs on a GPU, without one: PyTorch's fake CUDA tensors refuse to give a value to the host."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from layerlens.analysis.cka import StreamingCKA
from layerlens.analysis.projection import Projection
from layerlens.reduction import make_reduction


def on_device(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda", dtype=dtype)


def test_fake_tensors_would_show_a_transfer():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        on_device(3).sum().item()


@pytest.mark.parametrize(
    "options",
    [{}, {"check": True}, {"influence": True}, {"permutations": 3}, {"kernel": "rbf"}, {"positions": True}],
    ids=str,
)
def test_no_batch_of_streaming_cka_brings_a_value_to_the_host(options):
    with FakeTensorMode():
        state = StreamingCKA(["maps", "pooled"], **options)
        for _ in range(3):
            state.take(0, on_device(16, 8, 4, 4, dtype=torch.bfloat16))
            state.take(1, on_device(16, 20))
            state.end_batch()
        assert {block.device.type for block in state._blocks} == {"cuda"}
        assert all(block.dtype == torch.float64 for block in state._blocks)


@pytest.mark.parametrize("kind", ["flatten", "pool", "positions", "positions,grid=2"])
def test_reduction_and_projection_stay_on_the_device(kind):
    with FakeTensorMode():
        rows = make_reduction(kind)(on_device(6, 8, 4, 4))
        assert rows.device.type == "cuda"
        assert Projection(16)(0, rows).device.type == "cuda"
