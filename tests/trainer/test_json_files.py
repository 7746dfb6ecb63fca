"""Whatever is in the JSON files of a run, no other error than the project's own comes out."""

import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer import Brain, Stage, json_files
from trainer.checkpoint import Checkpointer, storage
from trainer.json_files import BadJson
from trainer.loggers import JsonlLogger
from trainer.report import render

from .checkpoint_torture import Uniform, two_checkpoints

HOSTILE = (
    b"", b" ", b"[" * 100_000, b'{"a":' * 100_000, b"[" * 900 + b"]" * 900,
    b'{"a":' * 60 + b"1" + b"}" * 60, b"NaN", b"-Infinity", b'{"step": NaN}', b'{"step": 1e999999}',
    b'{"step": ' + b"1" * 5000 + b"}", b'{"step": -' + b"9" * 400 + b"}", b"\0", b'{"step": "\0"}',
    b"\xff\xfe", b'{"a": "\xe9"}', '{"step": 1}'.encode("utf-16"), b"{'a': 1}", b'{"step": 1',
    b'{"step": 1} {"step": 2}', b"nul", b'"\\ud800', b'{"step": 01}',
)  # fmt: skip
ODD = (  # JSON, and of odd shapes.
    b"1", b"[]", b"null", b'"x"', b"true", b'"\\ud800"', b"\xef\xbb\xbf{}", b'{"step": true}',
    b'{"step": 1, "step": 2}', b'{"step": "1"}', b'{"step": [1]}', b'{"step": -1e300}',
    b'{"kind": "step", "step": 1e14}',
    b'{"kind": "step", "step": 1, "loss": {"a": [1], "b": null}}',
    b'{"kind": "monitor", "step": 1, "layers": [1]}', b'{"stage": {"a": 1}, "epoch": [2]}',
    b'{"kind": "monitor", "step": 2, "optimizers": {"a": {"norms": [1, "x", null]}}}',
    b'{"kind": "monitor", "step": 2, "layers": {"\\ud800": {"grad": 1e308}}, "warnings": [1, "x"]}',
    b'{"stage": "valid", "epoch": 1e300, "loss": 1e308, "wer": -1e308}',
    b'{"stage": "\\ud800", "epoch": 1, "step": 3, "loss": {"a": {"b": 1}}}',
)  # fmt: skip

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**320), 10**320) | st.floats()
    | st.text(max_size=5),
    lambda part: st.lists(part, max_size=4)
    | st.dictionaries(
        st.sampled_from(["step", "kind", "stage", "epoch", "loss", "layers", "optimizers", "x"]),
        part,
        max_size=5,
    ),
    max_leaves=12,
)  # fmt: skip
KINDS = st.sampled_from(["step", "monitor", "stage", "valid", "\ud800", ""])
RECORDS = st.fixed_dictionaries(
    {}, optional={"kind": KINDS, "stage": KINDS | VALUES, "step": VALUES, "epoch": VALUES,
                  "loss": VALUES, "layers": VALUES, "optimizers": VALUES, "warnings": VALUES},
).map(lambda record: json.dumps(record).encode())  # fmt: skip
LINES = st.lists(
    st.binary(max_size=40)
    | st.sampled_from(HOSTILE[3:] + ODD)
    | VALUES.map(lambda value: json.dumps(value).encode())
    | RECORDS,
    max_size=8,
)
MANY = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("data", HOSTILE, ids=lambda data: repr(data[:20]))
def test_what_is_no_strict_json_is_one_kind_of_error(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(BadJson):
        json_files.parse(data)
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(BadJson, match=r"x\.json: it is not JSON \("):
        json_files.read(tmp_path / "x.json")
    assert json_files.mapping(data) == {}
    assert json_files.read_mapping(tmp_path, tmp_path / "x.json") == {}


@pytest.mark.parametrize("data", ODD, ids=lambda data: repr(data[:20]))
def test_json_of_any_shape_is_read(data: bytes) -> None:
    value = json_files.parse(data)
    assert value == json.loads(data.decode("utf-8-sig"))
    assert json_files.mapping(data) == (value if isinstance(value, dict) else {})


def test_a_line_that_is_too_long_is_an_empty_one() -> None:
    long = b"x" * (json_files.MAX_LINE + 5)
    for end in (b"\n", b""):
        file = io.BytesIO(b"1\n" + long + b"\n2\n" + long + end)
        assert list(json_files.lines(file)) == [b"1\n", b"", b"2\n", b""]


@given(data=st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
@MANY
def test_any_bytes_are_a_value_or_that_error(data: bytes) -> None:
    try:
        value = json_files.parse(data)
    except BadJson:
        return
    json.dumps(value, allow_nan=False)


# metrics.jsonl


@given(found=LINES, ends=st.booleans(), step=st.integers(-1, 5), kept=st.none() | st.integers(0, 9))
@MANY
def test_a_run_resumes_and_reports_from_any_metrics_file(
    tmp_path_factory: pytest.TempPathFactory,
    found: list[bytes], ends: bool, step: int, kept: int | None,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("run")
    path = folder / "metrics.jsonl"
    path.write_bytes(b"\n".join(found) + (b"\n" if ends else b""))
    render(folder)
    log = JsonlLogger(folder)
    log.resume(step, kept)
    log.scalars("step", {"loss": 1.0}, step + 1)
    log.close()
    *rest, last = path.read_bytes().splitlines(keepends=True)
    assert json.loads(last) == {"kind": "step", "loss": 1.0, "step": step + 1}
    for line in rest:
        record = json_files.parse(line)
        assert not isinstance(record.get("step"), (int, float)) or record["step"] <= step
    render(folder)


VALID = b"".join(
    json.dumps(record).encode() + b"\n"
    for step in (1, 2, 3)
    for record in (
        {"kind": "step", "step": step, "loss": {"a": 1.5, "b": None}, "seconds": 1.0,
         "optimizers": {"main": {"lr": 0.1, "norm": 2.0, "stepped": 1, "clipped": 0.5}}},
        {"kind": "monitor", "step": step, "layers": {"net": {"grad": 1.0, "ratio": 0.1}},
         "optimizers": {"main": {"norms": [1.0, 2.0], "limits": [3.0, None]}}, "warnings": ["w"]},
        {"kind": "stage", "stage": "valid", "epoch": step, "step": step, "loss": 1.0, "wer": 2.0},
    )
)  # fmt: skip


@given(
    places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), st.binary(max_size=4)),
                    min_size=1, max_size=4),
    step=st.integers(0, 4),
)  # fmt: skip
@MANY
def test_a_run_resumes_and_reports_from_a_metrics_file_that_was_changed(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[float, int, bytes]], step: int
) -> None:
    folder, data = tmp_path_factory.mktemp("run"), VALID
    for place, cut, new in places:
        at = int(place * len(data))
        data = data[:at] + new + data[at + cut :]
    (folder / "metrics.jsonl").write_bytes(data)
    render(folder)
    log = JsonlLogger(folder)
    log.resume(step)
    log.close()
    for line in (folder / "metrics.jsonl").read_bytes().splitlines():
        place = json_files.parse(line).get("step")
        assert not isinstance(place, (int, float)) or place <= step
    render(folder)


class Line(Brain):
    def compute_forward(self, batch: Any, stage: Stage) -> Any:
        return self.modules.net(batch["x"])

    def compute_objectives(self, predictions: Any, batch: Any, stage: Stage) -> Any:
        return predictions.square().mean()


@pytest.mark.parametrize("data", [*HOSTILE, *ODD], ids=lambda data: repr(data[:20]))
def test_training_goes_on_beside_any_line(tmp_path: Path, data: bytes) -> None:
    def fit(epochs: int) -> None:
        brain = Line(
            {"net": torch.nn.Linear(3, 1)},
            lambda params: torch.optim.SGD(params, lr=0.1),
            run_opts={"device": "cpu", "progressbar": False, "output_folder": str(tmp_path)},
            checkpointer=Checkpointer(tmp_path / "checkpoints"),
        )
        brain.fit(range(1, epochs + 1), [{"x": torch.ones(2, 3)}] * 3)

    fit(1)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(data + b"\n" + path.read_bytes() + data + b"\n")
    fit(2)
    records = [json_files.parse(line) for line in path.read_bytes().splitlines()]
    stages = [r["epoch"] for r in records if isinstance(r, dict) and r.get("stage") == "train"]
    assert stages[-1] == 2


# manifests


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    two_checkpoints(folder)
    return folder


def _falls_back(folder: Path, data: bytes, sealed: bool) -> None:
    """A run with this newest manifest uses it, or falls back with a warning that names it."""
    path = folder / "step-00000002" / "manifest.json"
    whole = path.read_bytes()
    path.write_bytes(data)
    thing = Uniform()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = Checkpointer(folder, recoverables={"brain": thing}).recover_if_possible()
    finally:
        path.write_bytes(whole)
    assert found is not None
    if thing.value == 1:
        assert any(str(path.parent) in str(each.message) for each in caught)
    else:
        assert thing.value == 2
        assert sealed or data == whole


@given(data=st.binary(max_size=100) | st.sampled_from(HOSTILE + ODD))
@MANY
def test_any_bytes_as_a_manifest_are_told(saved: Path, data: bytes) -> None:
    _falls_back(saved, data, sealed=False)


@given(place=st.floats(0, 1), new=st.binary(max_size=3), cut=st.integers(0, 5))
@MANY
def test_a_manifest_that_was_changed_is_told(
    saved: Path, place: float, new: bytes, cut: int
) -> None:
    whole = (saved / "step-00000002" / "manifest.json").read_bytes()
    at = int(place * len(whole))
    _falls_back(saved, whole[:at] + new + whole[at + cut :], sealed=False)


FIELDS = st.sampled_from([*storage.FIELD_TYPES, "files", "path", "surprise"])
SHAPES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False,
        allow_infinity=False) | st.text(max_size=5) | st.sampled_from(["../x", "brain.pt"]),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=5), part, max_size=3)
    | st.fixed_dictionaries({"brain.pt": part}),
    max_leaves=6,
)  # fmt: skip


@given(changes=st.dictionaries(FIELDS, SHAPES, min_size=1, max_size=3))
@MANY
def test_a_sealed_manifest_of_any_content_is_used_or_told(
    saved: Path, changes: dict[str, Any]
) -> None:
    content = storage.manifest_content(storage.read_manifest(saved / "step-00000002"))
    try:
        data = storage.encode_manifest({**content, **changes})
    except UnicodeEncodeError:  # Half a surrogate pair, which nobody can seal.
        return
    # What is sealed and fits may still be refused for what it says: that, too, is a sentence.
    told = str(saved)
    try:
        _falls_back(saved, data, sealed=True)
    except ValueError as error:
        told = str(error)
    assert str(saved) in told
