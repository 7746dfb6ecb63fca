"""Diagnoses: known causes of non-finite losses and gradients, each with advice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.data.batch import as_tensor, count_examples
from trainer.diagnostics.nonfinite.probe import Finding, Origin
from trainer.diagnostics.nonfinite.serialize import batch_fields, data_and_lengths
from trainer.texts import first_names
from trainer.tree import leaves

MAX_NAMED = 5  # Examples named in a message.
LARGE = 1e9  # A power of a larger number overflows.
# Names of fields that hold targets.
TARGETS = re.compile(r"tok|target|label|char|phn|phon|text|word|trans|y$")
# Autograd functions, and the reason why their derivative is not finite.
BACKWARD = (
    (r"Sqrt|Norm|Std|Var|Cdist|Dist", "the derivative of a square root (or norm, or standard "
     "deviation) at 0 is infinite: add a small number under the root, or clamp"),
    (r"Log", "the derivative of a logarithm at 0 is infinite: clamp its argument, "
     "as in x.clamp(min=1e-8).log()"),
    (r"Div|Reciprocal", "a division by zero, or by a number whose square is 0: clamp the divisor"),
    (r"Pow", "the derivative of a power below 1 at 0 is infinite: clamp its base"),
    (r"Exp|Cosh|Sinh", "an exponential overflows: bound its argument"),
    (r"Acos|Asin|Atan", "the derivative of an arc function at its end is infinite: clamp its "
     "argument a little inside of [-1, 1]"),
    (r"Softmax|Attention", "a softmax over nothing but masked positions: an all-padding row"),
)  # fmt: skip


def diagnose(
    finding: Finding, batch: Any, ids: Sequence[str], finite_in_fp32: bool = False
) -> list[str]:
    """Return the known causes that fit, as sentences, most certain first.

    Args:
        finding: result of the rerun.
        batch: the batch that was rerun.
        ids: ids of its examples; empty if it has none.
        finite_in_fp32: True if an fp16 batch was finite when it was rerun in fp32.
    """
    found = [*_in_batch(batch, ids), *_in_ctc(finding, ids), *_in_padding(finding, batch, ids)]
    origin = finding.first
    if finite_in_fp32:
        what = "a value" if origin is None else f"the result of {origin.operation}"
        found.append(
            f"fp16 overflow: {what} is above 65504, the largest number of half precision; the same "
            "batch is finite in fp32. Use precision bf16, or compute that part within "
            "torch.autocast(…, enabled=False)"
        )
    elif origin is not None and origin.phase == "forward" and not found:
        found += _in_operation(origin)
    elif not found:
        function = origin.operation if origin is not None else ""
        found += [text for names, text in BACKWARD if re.search(names, function)][:1]
    if finding.kind is not None:
        found += _in_lengths(batch, ids)
    return found


def _names(rows: Sequence[int], ids: Sequence[str]) -> str:
    """Return the ids of examples, or their numbers."""
    known = ids and max(rows) < len(ids)
    return first_names([ids[row] if known else f"example {row}" for row in rows], MAX_NAMED)


def _true(flags: Tensor) -> list[int]:
    """Return the indices of the True elements of a vector."""
    found: list[int] = flags.nonzero().flatten().tolist()
    return found


def _in_batch(batch: Any, ids: Sequence[str]) -> list[str]:
    """Find NaN and infinities in the batch itself."""
    found, size = [], count_examples(batch)
    for name, value in batch_fields(batch).items():
        number, total, rows = 0, 0, set[int]()
        for path, leaf in leaves(value):
            bad = _bad_values(leaf)
            if bad is None or not bad.any():
                continue
            number, total = number + int(bad.sum()), total + bad.numel()
            if bad.dim() and len(bad) == size:
                rows.update(_true(bad.reshape(size, -1).any(1)))
            elif isinstance(value, list) and len(value) == size:  # One entry for each example.
                rows.add(int(path.partition(".")[0]))
        if number:
            names = f" ({_names(sorted(rows), ids)})" if rows else ""
            found.append(
                f"the batch itself is not finite: {number} of {total} values of {name!r}{names}. "
                "Look at that file, and at what prepares it"
            )
    return found


def _bad_values(leaf: Any) -> Tensor | None:
    """Return flags of the NaN and infinite values of a leaf; None if it cannot have any."""
    tensor = None if isinstance(leaf, int) else as_tensor(leaf)  # An int may exceed 64 bits.
    if tensor is None or not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    return ~torch.isfinite(tensor) if tensor.layout is torch.strided else None


def _in_ctc(finding: Finding, ids: Sequence[str]) -> list[str]:
    """Find CTC targets that do not fit in their frames."""
    found: list[str] = []
    if finding.first is not None and "ctc" not in finding.first.operation.lower():
        return found  # The CTC loss was finite.
    for frames, lengths, repeats in finding.ctc:
        rows = range(len(frames))
        if long := [row for row in rows if lengths[row] + repeats[row] > frames[row]]:
            row = long[0]
            found.append(
                f"a CTC target is longer than its input: {_names(long, ids)} (the first has "
                f"{lengths[row]} tokens and {repeats[row]} repeats in {frames[row]} frames; a "
                "repeat needs a blank between). Leave such utterances out, subsample less, or pass "
                "zero_infinity=True to the loss"
            )
        if empty := [row for row in rows if lengths[row] == 0]:
            found.append(
                f"an empty target: that of {_names(empty, ids)} has no token. Leave it out: a loss "
                "divided by the length of this target is 0/0"
            )
    return list(dict.fromkeys(found))


def _in_padding(finding: Finding, batch: Any, ids: Sequence[str]) -> list[str]:
    """Find a softmax over only masked positions."""
    first = finding.first
    if first is None or not (
        "attention" in first.operation or ("softmax" in first.operation and first.minus_infinity)
    ):
        return []
    rows = [
        row
        for value in batch_fields(batch).values()
        if (padded := data_and_lengths(value)) is not None
        for row, length in enumerate(padded[1].tolist())
        if length == 0
    ]
    names = f" ({_names(sorted(set(rows)), ids)} has length 0)" if rows else ""
    return [
        f"an all-padding row: every position that a softmax looks at is masked{names}, so that it "
        "divides 0 by 0. Leave one position unmasked, or drop empty examples"
    ]


def _in_operation(origin: Origin) -> list[str]:
    """Find a function outside its domain or range."""
    name, low = origin.operation, origin.lowest
    if re.match(r"log(2|10|1p)?_?$|xlogy", name) and low is not None:
        edge = -1.0 if "log1p" in name else 0.0
        if low < edge:
            return [
                f"the logarithm of a negative number ({low:.3g}): check whether its argument is a "
                "logarithm already, or may be below zero"
            ]
        return [
            f"the log of zero: {origin.zeros} of {origin.elements} values are 0. Clamp them, as in "
            "x.clamp(min=1e-8).log(), or use log_softmax or logsigmoid on what comes before"
        ]
    if re.match(r"(div|true_divide|reciprocal|floor_divide)_?$", name) and origin.zeros:
        return [
            f"a division by zero ({origin.zeros} of the divisors are 0): clamp them, or drop "
            "such examples"
        ]
    if re.match(r"(mean|var|std|var_mean|median|nanmean)", name) and not origin.elements:
        return [f"the {name} of an empty tensor: check for an empty mask or target"]
    if low is None or origin.highest is None:
        return []
    largest = max(low, origin.highest, key=abs)
    if re.match(r"(exp|expm1|exp2|cosh|sinh)_?$", name) or (
        name.startswith("pow") and abs(largest) > LARGE
    ):
        return [f"{name} of {largest:.3g} overflows: bound its argument"]
    if re.match(r"r?sqrt_?$|pow", name) and low <= 0.0:
        return [f"{name} of {low:.3g}: clamp its argument, or add a small number to it"]
    return []


def _in_lengths(batch: Any, ids: Sequence[str]) -> list[str]:
    """Find empty targets and silent examples, which are possible causes."""
    found = []
    for name, value in batch_fields(batch).items():
        padded = data_and_lengths(value)
        if padded is not None:
            data, lengths = padded
            empty = _true(lengths == 0)
            silent = _true((data.reshape(len(data), -1) == 0).all(1))
            if empty:
                found.append(f"{name!r} is empty in {_names(empty, ids)}")
            elif silent and data.is_floating_point():
                found.append(
                    f"{name!r} is 0 everywhere in {_names(silent, ids)}: an all-padding row"
                )
        elif isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value):
            empty = [row for row, text in enumerate(value) if not text.strip()]
            if empty and TARGETS.search(name.lower()):
                found.append(f"an empty target: {name!r} of {_names(empty, ids)} has no text")
    return found
