"""Accuracy of norms at every scale, and limits of the norm and of elements."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trainer.checks import by_name
from trainer.clipping import AdaGC, Gradients, NormClip, ValueClip, norms
from trainer.clipping.gradients import limit_of

HALF = {torch.float16: 65504.0, torch.bfloat16: 3e38, torch.float32: 3e38}
SCALES = [1e-30, 1e-22, 1e-15, 1e-8, 1e-3, 1.0, 1e3, 1e4, 1e15, 1e19, 1e30]


def measured(*grads: Tensor, clip: Any = None, **group: Any) -> Gradients:
    """Return the gradients of an optimizer with one group, measured as in a step."""
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    return take(Gradients([{"params": params, **group}], clip))


def take(gradients: Gradients) -> Gradients:
    gradients.take(gradients.measure().tolist())
    return gradients


def truth(*grads: Tensor) -> float:
    """Return the joint L2 norm in float64, without overflow."""
    wide = [grad.double().reshape(-1) for grad in grads]
    largest = max(float(each.abs().max()) for each in wide)
    return largest * math.hypot(*(float((each / largest).norm()) for each in wide))


# --- measuring -----------------------------------------------------------------------------------


def test_the_norm_is_that_of_float64_in_every_dtype_and_scale() -> None:
    torch.manual_seed(0)
    covered = 0
    for dtype, most in HALF.items():
        for scale in SCALES:
            if dtype is torch.float16 and scale < 1e-3:
                continue  # Most values of that scale are 0 in it.
            for size in (1, 1000, 1025, 10_000, 70_000):
                grad = (torch.randn(size) * scale).clamp(-most, most).to(dtype)
                # Many values of half precision are equal, which float32 sums less well.
                exact = size < 10_000 or (size == 10_000 and dtype is torch.float32)
                rel = 1e-6 if exact else 1e-5
                assert measured(grad).norm == pytest.approx(truth(grad), rel=rel)
                covered += 1
    assert covered == (11 + 11 + 7) * 5


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_the_norm_of_large_tensors_and_of_equal_numbers_is_as_accurate_as_that_of_torch(
    p: float,
) -> None:
    torch.manual_seed(0)
    covered = 0
    for size in (65, 10_000, 32_769, 1_000_003):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for grad in (torch.randn(size), torch.full((size,), 1.7)):
                grad = grad.to(dtype)
                wide = torch.promote_types(dtype, torch.float32)
                theirs = float(torch.linalg.vector_norm(grad, p, dtype=wide))
                assert norms([grad, torch.ones(2)], p).tolist() == pytest.approx(
                    [theirs, 2 ** (1 / p)], rel=1e-7
                )
                if p == 2.0:
                    assert theirs == pytest.approx(truth(grad), rel=1e-3)
                covered += 1
    assert covered == 4 * 4 * 2


@given(
    exponents=st.lists(st.integers(-30, 30), min_size=1, max_size=5),
    dtypes=st.lists(st.sampled_from([*HALF, torch.float64]), min_size=5, max_size=5),
    sizes=st.lists(st.sampled_from([1, 3, 257, 3000]), min_size=5, max_size=5),
)
@settings(max_examples=60, deadline=None)
def test_tensors_of_any_scales_and_dtypes_have_one_right_norm(
    exponents: list[int], dtypes: list[torch.dtype], sizes: list[int]
) -> None:
    grads = []
    for exponent, dtype, size in zip(exponents, dtypes, sizes, strict=False):
        most = HALF.get(dtype, math.inf)
        grads.append((torch.randn(size, dtype=torch.float64) * 10.0**exponent).clamp(-most, most))
        grads[-1] = grads[-1].to(dtype)
    if any(grad.any() for grad in grads):
        assert measured(*grads).norm == pytest.approx(truth(*grads), rel=1e-6)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_each_norm_is_in_its_place_whatever_shares_a_shape(p: float) -> None:
    torch.manual_seed(0)
    shapes = [(), (0,), (3,), (40, 50), (10_007,), (64, 3, 50), (2000,), (9000,)]
    for number in (1, 3, 4, 9, 60):
        order = torch.randint(len(shapes), (number,)).tolist()
        order += [3] * number + [4] * number
        grads = [torch.randn(shapes[n]) * 10 ** torch.randn(()) for n in order]
        grads[::7] = [grad.double() for grad in grads[::7]]
        grads[::5] = [grad.half() for grad in grads[::5]]
        expected = [
            float(torch.linalg.vector_norm(g.double(), p)) if g.numel() else 0.0 for g in grads
        ]
        rel = 1e-5 if p == 3.0 else 1e-6  # Cubes of half precision torch sums less well.
        assert norms(grads, p).tolist() == pytest.approx(expected, rel=rel)


def test_gradients_of_any_layout_are_measured() -> None:
    torch.manual_seed(0)
    plain, waves = torch.randn(120, 100), torch.randn(80, 70, dtype=torch.complex64)
    layouts = {
        "transposed": plain.T,
        "every other row": plain[::2],
        "every third column": plain[:, ::3],
        "one number, repeated": torch.tensor([1.7]).expand(1000),
        "without dimensions": torch.tensor(-3.0),
        "with a graph": (plain * nn.Parameter(torch.ones(100))),
        "complex": waves,
        "conjugate": waves.conj(),
        "negative": waves.conj().imag,
        "half, transposed": plain.half().T,
    }
    assert layouts["negative"].is_neg()
    for name, grad in layouts.items():
        expected = torch.linalg.vector_norm(grad.detach().to(torch.complex128)).item()
        for number in (1, 6):
            found = norms([grad] * number).tolist()
            # Equal numbers, and numbers with gaps between them, torch sums less well.
            assert found == pytest.approx([expected] * number, rel=1e-5), name


def test_a_gradient_that_autograd_gives_as_a_conjugate_view_is_clipped_and_stepped_with() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))
    (weight.mH @ torch.randn(4, 4, dtype=torch.complex64)).abs().sum().backward()
    assert weight.grad is not None
    assert weight.grad.is_conj()
    expected = nn.Parameter(weight.detach().clone())
    expected.grad = weight.grad.resolve_conj()
    nn.utils.clip_grad_norm_([expected], 0.1)
    assert NormClip(0.1)(take(Gradients([{"params": [weight]}])))
    for each in (weight, expected):
        torch.optim.Adam([each]).step()
    torch.testing.assert_close(weight, expected)


def test_zero_is_zero_and_what_is_not_finite_is_not_finite() -> None:
    assert measured(torch.zeros(5), torch.zeros(70_000)).norm == 0.0
    assert measured().norm == 0.0
    for bad in (math.nan, math.inf, -math.inf):
        for size in (3, 70_000):
            grad = torch.ones(size)
            grad[-1] = bad
            gradients = measured(torch.ones(4), grad, torch.full((2,), 1e30))
            assert not gradients.finite
            assert [math.isfinite(norm) for norm in gradients.norms] == [True, False, True]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_finite_gradients_have_to_the_bit_the_norms_that_they_have_without_others(
    scale: float,
) -> None:
    torch.manual_seed(0)
    for size in (3, 1000, 1025, 3000, 50_000):
        for bad in (math.nan, math.inf):
            for number in range(1, 7):
                good = [torch.randn(size) * scale for _ in range(number)]
                good[0] *= 10.0 ** -(10 * number % 40)  # by itself, its squares may vanish
                beside = measured(torch.full((size,), bad), *good, torch.full((2,), bad))
                first, *kept, last = beside.norms
                assert not math.isfinite(first)
                assert not math.isfinite(last)
                assert kept == measured(*good).norms
                beside.keep([math.isfinite(norm) for norm in beside.norms])
                assert beside.norm == measured(*good).norm


def test_a_sparse_gradient_is_measured_over_its_coalesced_values() -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1, 1, 2])).sum().backward()
    for factor in (1.0, 1e20):
        assert embedding.weight.grad is not None
        embedding.weight.grad *= factor
        gradients = take(Gradients([{"params": list(embedding.parameters())}]))
        assert gradients.norm == pytest.approx(math.sqrt(15) * factor, rel=1e-6)
    NormClip(2.0)(gradients)
    assert float(gradients.tensors[0].to_dense().norm()) == pytest.approx(2.0, rel=1e-5)


# --- clipping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(HALF))
@pytest.mark.parametrize("limit", [5.0, 0.1])
def test_finite_huge_gradients_are_scaled_to_the_limit_and_never_to_zero(
    dtype: torch.dtype, limit: float
) -> None:
    torch.manual_seed(0)
    covered = 0
    for scale in (scale for scale in SCALES if scale >= 1):
        plain = [torch.randn(100), torch.randn(20, 30) * 1e-3]
        grads = [(grad * scale).clamp(-HALF[dtype], HALF[dtype]).to(dtype) for grad in plain]
        gradients = measured(*grads)
        assert NormClip(limit)(gradients)
        for after, grad in zip(gradients.tensors, grads, strict=True):
            expected = grad.double() / truth(*grads) * limit
            torch.testing.assert_close(after, expected.to(dtype))
            assert after.any()
        assert gradients.norm_after == pytest.approx(limit, rel=1e-5)
        covered += 1
    assert covered == 6


def test_adagc_learns_the_norm_of_a_tiny_tensor_beside_a_large_one() -> None:
    params = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(50))]
    clip = AdaGC(warmup_steps=1, lambda_abs=math.inf)
    for factor in (1.0, 3.0):
        for param, size in zip(params, (1.0, 1e-25), strict=True):
            param.grad = torch.full_like(param, size * factor)
        gradients = take(Gradients([{"params": params}], clip))
        assert clip(gradients) == (factor == 3.0)
    for tensor, size in zip(gradients.tensors, (1.0, 1e-25), strict=True):
        torch.testing.assert_close(tensor, torch.full_like(tensor, 1.05 * size), rtol=1e-5, atol=0)


def test_even_the_largest_gradients_of_float32_keep_their_direction() -> None:
    grad = torch.linspace(-3, 3, 4097) * 1e38
    gradients = measured(grad)
    assert NormClip(1e-3)(gradients)
    expected = grad.double() / truth(grad) * 1e-3
    torch.testing.assert_close(gradients.tensors[0].double(), expected, rtol=1e-5, atol=1e-12)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
@settings(max_examples=50, deadline=None)
def test_clipping_is_that_of_torch(limit: float, scale: float) -> None:
    torch.manual_seed(0)
    grads = [torch.randn(30) * scale, torch.randn(4, 5) * scale]
    theirs = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(theirs, grads, strict=True):
        param.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_(theirs, limit)
    ours = measured(*grads)
    assert NormClip(limit)(ours) == (ours.norm > limit)
    for mine, param in zip(ours.tensors, theirs, strict=True):
        assert param.grad is not None
        torch.testing.assert_close(mine, param.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("off", [None, math.inf, 0, 0.0, -1, -math.inf])
@pytest.mark.parametrize("kind", [NormClip, ValueClip])
def test_no_limit_measures_and_leaves_every_bit(
    kind: Callable[[float | None], NormClip | ValueClip], off: float | None
) -> None:
    grad = torch.tensor([3e4, -4e4])
    clip = kind(off)
    gradients = measured(grad, clip=clip)
    assert clip.limit == math.inf
    assert not clip(gradients)
    assert torch.equal(gradients.tensors[0], grad)
    assert gradients.norm == gradients.norm_after == pytest.approx(5e4)


def test_a_limit_that_is_no_number_is_refused() -> None:
    for bad in (math.nan, "5", True, [1.0]):
        with pytest.raises(
            ValueError, match=r"max_grad_norm is .*; allowed: a number; null, inf, 0"
        ):
            limit_of(bad)  # type: ignore[arg-type]


def groups_of(**limits: float | None) -> list[dict[str, Any]]:
    """Return three groups with gradients of norm 10; "a" and "b" have a limit if given."""
    made: list[dict[str, Any]] = []
    for name in ("a", "b", "rest"):
        param = nn.Parameter(torch.zeros(4))
        param.grad = torch.full((4,), 5.0)
        made.append({"params": [param, nn.Parameter(torch.zeros(2))]})  # One without a gradient.
        if name in limits:
            made[-1]["max_grad_norm"] = limits[name]
    return made


def norms_of(groups: list[dict[str, Any]]) -> list[float]:
    return [float(group["params"][0].grad.norm()) for group in groups]


def test_one_limit_is_over_every_group() -> None:
    groups = groups_of()
    gradients = take(Gradients(groups))
    assert NormClip(1.0)(gradients)
    assert math.hypot(*norms_of(groups)) == pytest.approx(1.0, rel=1e-5)


def test_a_group_with_a_limit_of_its_own_is_clipped_alone() -> None:
    groups = groups_of(a=1.0, b=None)
    gradients = take(Gradients(groups))
    assert NormClip(2.0)(gradients)
    assert norms_of(groups) == pytest.approx([1.0, 10.0, 2.0], rel=1e-5)
    assert gradients.norm == pytest.approx(math.hypot(10, 10, 10))
    assert gradients.norm_after == pytest.approx(math.hypot(1, 10, 2), rel=1e-5)


def test_limits_of_groups_hold_where_the_optimizer_has_none() -> None:
    groups = groups_of(b=3.0)
    assert NormClip(None)(take(Gradients(groups)))
    assert norms_of(groups) == pytest.approx([10.0, 3.0, 10.0], rel=1e-5)
    groups = groups_of(a=-1, b=20.0)
    assert not NormClip(0)(take(Gradients(groups)))
    assert norms_of(groups) == [10.0, 10.0, 10.0]


def test_clipping_by_value_clamps_each_element_and_says_truly_whether_it_did() -> None:
    grad = torch.tensor([-7.0, 0.5, 3.0])
    gradients = measured(grad, torch.full((2000,), 0.9), clip=ValueClip())
    assert ValueClip(2.0)(gradients)
    assert gradients.tensors[0].tolist() == [-2.0, 0.5, 2.0]
    assert gradients.norm_after is None  # Not measured again.
    # The norm is above the limit, but no element is.
    untouched = measured(torch.full((2000,), 0.9), clip=ValueClip())
    assert untouched.norm > 2.0
    assert not ValueClip(2.0)(untouched)
    assert untouched.norm_after == untouched.norm


def test_a_group_with_a_limit_of_its_own_is_clamped_to_that() -> None:
    groups = groups_of(a=1.0, b=None)
    assert ValueClip(3.0)(take(Gradients(groups, ValueClip())))
    assert [float(group["params"][0].grad.max()) for group in groups] == [1.0, 5.0, 3.0]


def test_leaving_parameters_out_and_rescaling_keep_the_norms_true() -> None:
    torch.manual_seed(0)
    grads = [torch.randn(5), torch.full((3,), math.nan), torch.randn(2000)]
    gradients = measured(*grads, clip=ValueClip())
    gradients.keep([math.isfinite(norm) for norm in gradients.norms])
    gradients.rescale(0.25)
    assert gradients.norm == pytest.approx(truth(grads[0], grads[2]) / 4, rel=1e-6)
    assert gradients.norm == pytest.approx(truth(*gradients.tensors), rel=1e-6)
    assert gradients.extra[0] == pytest.approx(
        [4 * float(t.abs().max()) for t in gradients.tensors]
    )


def test_a_setting_by_optimizer_must_name_those_that_exist() -> None:
    assert by_name(2.0, "generator", ["generator", "critic"], "max_grad_norm") == 2.0
    assert by_name({"critic": None}, "critic", ["critic"], "max_grad_norm", 5.0) is None
    assert (
        by_name({"critic": 1.0}, "generator", ["generator", "critic"], "max_grad_norm", 5.0) == 5.0
    )
    with pytest.raises(
        ValueError, match="max_grad_norm names the optimizer 'genrator', which does not"
    ):
        by_name({"genrator": 1.0}, "generator", ["generator"], "max_grad_norm")
