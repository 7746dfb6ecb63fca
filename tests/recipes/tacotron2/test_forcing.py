"""Teacher forcing is torchaudio's own: outputs and gradients."""

import pytest
import torch
from torch import Tensor

from recipes.tacotron2.forcing import can_force, forced
from tests.recipes.tacotron2.conftest import tacotron


def both(reduction: int, lengths: list[int], frames: int) -> list[list[Tensor]]:
    """Outputs and gradients of torchaudio's decoder and of ours, in 64 bits."""
    torch.manual_seed(0)
    decoder = tacotron(reduction).double().net.decoder
    memory = torch.randn(len(lengths), max(lengths), 8, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(len(lengths), frames, 6, dtype=torch.float64).transpose(1, 2)
    symbols = torch.tensor(lengths)
    found = []
    for force in (type(decoder).forward, forced):
        decoder.zero_grad()
        memory.grad = None
        outputs = force(decoder, memory, teacher, symbols)
        torch.manual_seed(1)
        sum((each * torch.randn(each.shape)).sum() for each in outputs).backward()
        parameters = [memory, *decoder.parameters()]
        found.append([*outputs, *(p.grad.clone() for p in parameters if p.grad is not None)])
    assert len(found[0]) == 3 + len(parameters)
    return found


@pytest.mark.parametrize(
    ("reduction", "lengths", "frames"), [(1, [5], 7), (2, [9, 7, 4], 16), (3, [1, 1], 3)]
)
@pytest.mark.usefixtures("undropped")
def test_outputs_and_gradients_are_torchaudios(
    reduction: int, lengths: list[int], frames: int
) -> None:
    theirs, ours = both(reduction, lengths, frames)
    assert len(theirs) == len(ours)
    for one, other in zip(theirs, ours, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)
    assert all(each.abs().max() > 0 for each in theirs[:3])


@pytest.mark.usefixtures("undropped")
def test_bf16_changes_outputs_and_gradients_by_its_rounding_alone() -> None:
    torch.manual_seed(0)
    decoder = tacotron(2).net.decoder
    memory, teacher = torch.randn(3, 9, 8), torch.randn(3, 16, 6).transpose(1, 2)
    found = []
    for mixed in (False, True):
        decoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            assert can_force(decoder)
            outputs = forced(decoder, memory, teacher, torch.tensor([9, 7, 4]))
            sum(each.float().square().mean() for each in outputs).backward()
        found.append([*outputs, *(each.grad for each in decoder.parameters())])
    assert found[1][2].dtype is torch.float32  # of attention, softmax is in full
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() < 0.03 * one.norm()  # bf16 rounds to 1 of 256


@pytest.mark.usefixtures("undropped")
def test_an_output_that_nothing_is_learned_from_costs_nothing() -> None:
    torch.manual_seed(0)
    decoder = tacotron(2).eval().net.decoder
    memory = torch.randn(2, 5, 8, requires_grad=True)
    attention = forced(decoder, memory, torch.randn(2, 8, 6).transpose(1, 2), torch.tensor([5, 3]))[
        2
    ]
    attention[:, :, 0].sum().backward()
    assert memory.grad is not None
    assert torch.isfinite(memory.grad).all()
    assert not memory.grad[1, 3:].any()  # padding


def test_what_has_dropout_in_its_recurrence_goes_torchaudios_way() -> None:
    decoder = tacotron(2).net.decoder
    decoder.decoder_dropout = 0.1
    assert not can_force(decoder)
    assert can_force(decoder.eval())
    decoder.train().decoder_dropout = 0.0
    decoder.attention_dropout = 0.1
    assert not can_force(decoder)
    decoder.attention_dropout = 0.0
    assert can_force(decoder)
    with torch.autocast("cpu", torch.float16):  # whose range gradients leave
        assert not can_force(decoder)
