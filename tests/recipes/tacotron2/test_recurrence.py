"""The encoder's recurrent layers are PyTorch's: outputs and gradients."""

import pytest
import torch
from torch import Tensor

from recipes.tacotron2.recurrence import encoded
from tests.recipes.tacotron2.conftest import tacotron


def both(lengths: list[int], dtype: torch.dtype, mixed: bool = False) -> list[list[Tensor]]:
    """Outputs and gradients of torchaudio's encoder in full, and of ours."""
    torch.manual_seed(0)
    encoder = tacotron(1).to(dtype).net.encoder
    embedded = torch.randn(len(lengths), 8, max(lengths), dtype=dtype, requires_grad=True)
    found = []
    for encode, low in ((type(encoder).forward, False), (encoded, mixed)):
        encoder.zero_grad()
        embedded.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            # The hooks that silence padding know it of the text at hand, which is not here.
            for layer in encoder.convolutions:
                layer[0]._forward_pre_hooks.clear()
            read = encode(encoder, embedded, torch.tensor(lengths))
        torch.manual_seed(1)
        (read.to(dtype) * torch.randn(read.shape, dtype=dtype)).sum().backward()
        parameters = [embedded, *encoder.parameters()]
        found.append([read, *(p.grad.clone() for p in parameters if p.grad is not None)])
    assert len(found[0]) == len(found[1]) == 1 + len(parameters)
    return found


@pytest.mark.parametrize("lengths", [[5], [9, 7, 7, 1], [3, 3]])
@pytest.mark.usefixtures("undropped")
def test_outputs_and_gradients_are_torchaudios(lengths: list[int]) -> None:
    theirs, ours = both(lengths, torch.float64)
    for one, other in zip(theirs, ours, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)
    for read, length in zip(ours[0], lengths, strict=True):
        assert read[:length].all()
        assert not read[length:].any()


@pytest.mark.usefixtures("undropped")
def test_bf16_rounds() -> None:
    full, low = both([9, 7, 4], torch.float32, mixed=True)
    for one, other in zip(full, low, strict=True):
        assert (one - other).norm() < 0.05 * one.norm().clamp(min=1.0)
