"""Tables and lists: what does not fit gets a sentence with the file and the line."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipes.common.librispeech import read_parts
from recipes.common.tables import Row, TableError, read_lines, read_rows
from recipes.separation.folders import wsj0mix
from recipes.separation.speech import librispeech, listed
from recipes.tacotron2.data import readings
from recipes.tacotron2.infer import _texts
from trainer.data import BadItem

RATE = 8000
Reader = tuple[str, Callable[[Path], Any], str]  # The table, its reader, and what is in it.


def sound(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(800, 0.1), RATE)


def gap_of(text: str) -> str:
    return next((gap for gap in "|, " if gap in text), " ")


READERS: dict[str, Reader] = {
    "listed": (
        "utterances.csv",
        lambda root: listed(str(root), max_bad=0.6),
        "id,split,speaker\na0,train,x\na1,train,y\na2,valid,z\na3,test,w\n",
    ),
    "listed by bars": (
        "utterances.csv",
        lambda root: listed(str(root), max_bad=0.6),
        "id|split|speaker\na0|train|x\na1|train|y\na2|valid|z\na3|test|w\n",
    ),
    "mixtures": (
        "mixed.csv",
        lambda root: wsj0mix(str(root), {"train": "mixed.csv"}, max_bad=0.6),
        "ID,mix_wav,s1_wav,s2_wav\n"
        + "".join(f"m{n},audio/a{n}.wav,/x/audio/a{n}.wav,a{n}.wav\n" for n in range(4)),
    ),
    "readings": (
        "metadata.csv",
        lambda root: readings(str(root), 1, 1, spell=False, max_bad=0.6),
        "a0|one.\na1|two.\na2|three.\na3|four.\n",
    ),
    "transcripts": (
        "part/1/1/1-1.trans.txt",
        lambda root: read_parts(root, ["part"], max_bad=0.6),
        "a0 ONE\na1 TWO\na2 THREE\na3 FOUR\n",
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    for number in range(4):
        for place in ("audio", "wavs", "part/1/1", "."):
            sound(folder / place / f"a{number}.wav")
    (folder / "audio" / "folder.wav").mkdir()
    (folder / "2speakers" / "wav8k" / "min").mkdir(parents=True)
    return folder


def read(root: Path, name: str, content: bytes) -> Any:
    table, reader, _ = READERS[name]
    (root / table).write_bytes(content)
    return reader(root)


def good(name: str) -> bytes:
    return READERS[name][2].encode()


def with_cell(name: str, row: int, cell: str, column: int = 0) -> bytes:
    """The table with another cell; rows count from 0 and have a line of names before them."""
    lines = READERS[name][2].splitlines()
    at = row + (name not in ("readings", "transcripts"))
    gap = gap_of(READERS[name][2])
    cells = lines[at].split(gap)
    cells[column] = cell
    lines[at] = gap.join(cells)
    return "\n".join(lines).encode()


def line_of(name: str, row: int) -> int:
    return row + 1 + (name not in ("readings", "transcripts"))


def test_each_reader_reads_its_table(root: Path) -> None:
    for name in READERS:
        assert read(root, name, good(name))


@pytest.mark.parametrize("name", READERS)
def test_marks_ends_of_lines_and_blank_lines_make_no_difference(name: str, root: Path) -> None:
    def shown(found: Any) -> str:
        return repr({split: [each.id for each in part] for split, part in found.items()})

    plain = shown(read(root, name, good(name)))
    for content in (
        b"\xef\xbb\xbf" + good(name),
        good(name).replace(b"\n", b"\r\n"),
        good(name).replace(b"\n", b"\r"),
        good(name).replace(b"\n", b"\n\n  \n"),
        b"\n\n" + good(name).rstrip(),
    ):
        assert shown(read(root, name, content)) == plain


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_text_is_told(name: str, root: Path) -> None:
    table = root / READERS[name][0]
    third = good(name).replace(b"a2", b"a\xe92")
    for content, sentence in (
        (b"", f"{table} is empty; expected was "),
        (b"\xef\xbb\xbf\r\n\n", f"{table} is empty; expected was "),
        (good(name).decode().encode("utf-16"), f"{table} is text in UTF-16 or UTF-32"),
        (good(name).decode().encode("utf-16-le"), f"line 1 of {table} has a NUL byte: it is no te"),
        (good(name).decode().encode("utf-32"), f"{table} is text in UTF-16 or UTF-32"),
        (good(name) + b"\0", f"of {table} has a NUL byte"),
        (third, f"line {line_of(name, 2)} of {table} has the byte 0xe9, which is not UTF-8"),
        (b"\xef\xbb\xbf" + third, f"line {line_of(name, 2)} of {table} has the byte 0xe9"),
    ):
        with pytest.raises(TableError) as caught:
            read(root, name, content)
        assert sentence in str(caught.value)
        assert "\n" not in str(caught.value)


BAD_NAMES = {
    "": "empty",
    ".": "names no file",
    "..": "names no file",
    "../": "names no file",
    "x" * 300: "has a part of more than 255 bytes",
    "é" * 200: "has a part of more than 255 bytes",
    "x/" * 600 + "a": "has more than 1024 bytes",
    "a\x07b": "contains a control character",
    "a\x7fb": "contains a control character",
}


@pytest.mark.parametrize(
    ("name", "bad"),
    [(name, bad) for name in READERS for bad in BAD_NAMES if bad or name != "transcripts"],
)
def test_what_is_no_name_is_told_with_its_line(name: str, bad: str, root: Path) -> None:
    column = 2 if name == "mixtures" else 0
    with pytest.raises(TableError, match=BAD_NAMES[bad]) as caught:
        read(root, name, with_cell(name, 2, bad, column))
    assert str(caught.value).startswith(f"line {line_of(name, 2)} of {root / READERS[name][0]} ")
    assert len(str(caught.value)) < 400 + len(str(root))


@pytest.mark.parametrize("bad", ["../a2", "/etc/passwd", "~/a2", "C:\\a2", "a/../../b"])
@pytest.mark.parametrize("name", [name for name in READERS if name != "mixtures"])
def test_names_that_lead_out_are_told_with_their_line(name: str, bad: str, root: Path) -> None:
    with pytest.raises(
        TableError, match=r"absolute path|contains '\.\.'|begins with '~'"
    ) as caught:
        read(root, name, with_cell(name, 2, bad))
    assert str(caught.value).startswith(f"line {line_of(name, 2)} of {root / READERS[name][0]} ")


@pytest.mark.parametrize("name", READERS)
def test_names_that_are_there_twice_are_told_with_both_lines(name: str, root: Path) -> None:
    again = "m0" if name == "mixtures" else "a0"
    first, second = line_of(name, 0), line_of(name, 2)
    with pytest.raises(TableError, match=f"line {second} of .*'{again}' of line {first} again"):
        read(root, name, with_cell(name, 2, again))


@pytest.mark.parametrize("name", ["listed", "listed by bars", "mixtures"])
def test_columns_that_do_not_fit_are_told(name: str, root: Path) -> None:
    text = READERS[name][2]
    head, row, *rest = text.splitlines()
    gap = gap_of(text)
    for lines, sentence in (
        ([head], "has no rows; expected was a table"),
        ([head.replace("s", "z"), row], "expected"),
        ([f"{head}{gap}{head}", f"{row}{gap}{row}"], "line 1 of .* has the column '(id|ID)' twice"),
        ([f"{'x' * 999}{gap}" * 2 + head, row], "line 1 of .* has the column 'x{80}…' twice"),
        ([head, f"{row}{gap}more"], r"line 2 of .* has \d cells for \d columns"),
        ([head, row, row.rpartition(gap)[0]], r"line 3 of .* has \d cells for \d columns"),
        ([head, row, f'"{rest[0]}', *rest[1:]], "line 3 of .* has a quote that is not closed"),
        ([head, row, f'"x"y{gap}{rest[0]}'], "line 3 of .* has cells that cannot be told apart"),
    ):
        with pytest.raises(TableError, match=sentence) as caught:
            read(root, name, "\n".join(lines).encode())
        assert str(root / READERS[name][0]) in str(caught.value)


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_told(name: str, root: Path) -> None:
    table = root / READERS[name][0]
    table.unlink(missing_ok=True)
    table.mkdir()
    try:
        with pytest.raises(ValueError, match="is a folder; expected was") as caught:
            READERS[name][1](root)
        assert str(table) in str(caught.value)
    finally:
        table.rmdir()
    os.mkfifo(table)  # Whoever opened it would wait forever.
    try:
        with pytest.raises(ValueError, match="is no regular file; expected was"):
            READERS[name][1](root)
    finally:
        table.unlink()
    with pytest.raises(ValueError, match=r"not there|no metadata.csv|another layout"):
        READERS[name][1](root)


def test_a_path_of_a_folder_is_a_missing_or_bad_file(root: Path) -> None:
    (root / "mixed.csv").write_bytes(with_cell("mixtures", 1, "audio/folder.wav", 2))
    with pytest.raises(BadItem, match="folder.wav: it is no regular file"):
        wsj0mix(str(root), {"train": "mixed.csv"}, on_bad="raise")


def test_the_list_of_speakers_is_checked_as_well(root: Path) -> None:
    (root / "part/1/1/1-1.trans.txt").write_bytes(good("transcripts"))
    (root / "SPEAKERS.TXT").write_bytes("a0 | F | caf\xe9\n".encode("latin-1"))
    with pytest.raises(TableError, match=r"line 1 of .*SPEAKERS.TXT has the byte 0xe9"):
        librispeech(str(root), {"train": ["part"]})
    (root / "SPEAKERS.TXT").write_text("a0 | F | x\n;\na1|M\na2|\n|\na3|Q|\n")
    cuts = librispeech(str(root), {"train": ["part"]})["train"]
    genders = [cut.supervisions[0].gender for cut in cuts]
    assert genders == ["female", "male", None, None]


# Whatever comes


NASTY = st.sampled_from([
    *BAD_NAMES, "/etc/passwd", "~", "~x/y", "a0", "m0", "train", "nan", "-1", "abc", "1e999",
    '"', '""', "'", '"a0"', '"a,b"', "a|b", "|", ",", " ", "\t", "\x0b", "\x85", "\u2028", "\ufeff",
    "CON", "a0.wav", "audio", "audio/folder.wav", "\\\\host\\x", "C:", "a" * 140_000, "=1+1",
    "\U0001f600", "..\\a",
])  # fmt: skip
CELL = st.one_of(NASTY, st.text(max_size=12), st.sampled_from(["a1", "a2", "audio/a1.wav"]))


@st.composite
def tables(draw: st.DrawFn, name: str) -> bytes:
    """A table that was good, with other cells, lines and bytes here and there."""
    text = READERS[name][2]
    gap = gap_of(text)
    rows = [line.split(gap) for line in text.splitlines()]
    for _ in range(draw(st.integers(0, 3))):
        row = draw(st.integers(0, len(rows) - 1))
        kind = draw(st.integers(0, 4))
        if kind == 0:
            rows.insert(row, draw(st.lists(CELL, max_size=6)))
        elif kind == 1 and rows[row]:
            rows[row].pop()
        else:
            cell = draw(st.integers(0, len(rows[row])))
            rows[row][cell : cell + 1] = [draw(CELL)]
    data = draw(st.sampled_from(["\n", "\r\n", "\r", "\n\n"])).join(map(gap.join, rows))
    coding = draw(st.sampled_from(["utf-8"] * 6 + ["utf-8-sig", "latin-1", "utf-16", "utf-16-be"]))
    found = bytearray(data.encode(coding, errors="replace"))
    if draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(found)))
        found[at:at] = draw(st.binary(max_size=4))
    return bytes(found)


def refused(use: Callable[[], Any]) -> ValueError | None:
    """The error with which the input is refused, which is of this project's own."""
    try:
        use()
    except ValueError as error:
        own = type(error) in (ValueError, TableError, BadItem)
        return error if own else pytest.fail(f"{type(error).__name__}: {error}")
    return None


@pytest.mark.parametrize("name", READERS)
def test_no_table_gets_another_error_than_a_sentence(name: str, root: Path) -> None:
    read(root, name, good(name))
    before = sorted(root.rglob("*"))
    outcomes = {"read": 0, "refused": 0}

    @settings(
        max_examples=300, deadline=None, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip
    @given(st.one_of(tables(name), tables(name), st.binary(max_size=60)))
    def check(content: bytes) -> None:
        error = refused(lambda: read(root, name, content))
        outcomes["read" if error is None else "refused"] += 1
        if isinstance(error, TableError):
            assert str(error).count(str(root / READERS[name][0])) == 1
            assert "\n" not in str(error)
            assert len(str(error)) < 1000

    check()
    assert min(outcomes.values()) > 10
    assert sorted(root.rglob("*")) == before


@settings(max_examples=300, deadline=None, database=None)
@given(
    st.lists(st.lists(CELL, max_size=5), max_size=6),
    st.sampled_from([",", "|", "\t", " "]),
    st.booleans(),
)
def test_rows_have_a_cell_for_each_column(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], gap: str, keyed: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    data = "\n".join(map(gap.join, rows))
    path.write_text(data, encoding="utf-8", errors="replace")
    found: list[Row] = []
    error = refused(
        lambda: found.extend(read_rows(path, "a table", key="id" * keyed or None, gap=",|"))
    )
    if error is not None:
        assert str(path) in str(error)
        return
    lines = {line.number: line.text for line in read_lines(path, "a table")}
    assert len(found) == len(lines) - 1
    for row in found:
        assert row.cells.keys() == found[0].cells.keys()
        whole = lines[row.line].replace('"', "")
        assert all(cell.replace('"', "") in whole for cell in row.cells.values())


@settings(max_examples=300, deadline=None, database=None)
@given(
    st.one_of(
        st.binary(max_size=80), st.text(max_size=80).map(lambda t: t.encode(errors="replace"))
    )
)
def test_texts_to_say_are_read_or_refused_with_the_name_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "say.txt"
    path.write_bytes(content)
    error = refused(lambda: _texts(None, path, path.parent))
    assert error is None or "say.txt" in str(error)


@settings(max_examples=60, deadline=None, database=None)
@given(
    st.sampled_from([",", ";", "\t", "|"]),
    st.booleans(),
    st.sampled_from(["", " "]),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.integers(0, 3),
)
def test_separators_quotes_and_marks_between_joined_files_change_nothing(
    tmp_path_factory: pytest.TempPathFactory,
    gap: str,
    quoted: bool,
    blank: str,
    end: str,
    marked: int,
) -> None:
    rows = [["id", "said"], ["a", "one"], ["b", "two"], ["c", "three"]]
    lines = [(gap + blank).join(f'"{cell}"' if quoted else cell for cell in row) for row in rows]
    lines[marked] = "\ufeff" + lines[marked]
    path = tmp_path_factory.mktemp("table") / "table.csv"
    path.write_bytes(end.join(lines).encode())
    found = read_rows(path, "a table", ("id", "said"), key="id", gap="|,;\t")
    assert [[row.cells["id"], row.cells["said"]] for row in found] == rows[1:]
