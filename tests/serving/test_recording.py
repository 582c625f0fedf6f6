from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import RecordingError
from serving.recording import MAX_FIELD, Recorded, Recording, read_recording


def written(tmp_path: Path, content: str | bytes, name: str = "r.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_csv_with_all_columns(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "text,teacher,gold,latency_s,model,logprobs,ignored\n"
        '"Where, please,\nis it?",where,there,0.25,big-1,"[{""token"": ""where"", ""logprob"": -0.1}]",x\n'
        "\n"
        "Thanks,other,,,,,\n",
    )
    recording = read_recording(path)
    assert recording.rows == (
        Recorded(
            "Where, please,\nis it?", "where", "there", 0.25, "big-1", [{"token": "where", "logprob": -0.1}]
        ),
        Recorded("Thanks", "other"),
    )
    assert recording.model == "big-1"


def test_jsonl_answers_that_are_objects_become_compact_json(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        '{"text": "a", "answer": {"intent": "x", "n": 1}}\n\n{"text": "b", "teacher": "plain"}\r\n'
        '{"text": "c", "teacher": null, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}\n',
    )
    rows = read_recording(path).rows
    assert [row.teacher for row in rows] == ['{"intent":"x","n":1}', "plain", None]
    assert rows[2].tool_calls == [{"function": {"name": "f", "arguments": "{}"}}]


def test_gold_can_stand_in_for_the_teacher(tmp_path: Path) -> None:
    path = written(tmp_path, "text,gold\na,x\n")
    assert read_recording(path, answers="gold").rows == (Recorded("a", "x", "x"),)
    with pytest.raises(RecordingError, match=r"no column `teacher`.*--answers gold.*found: text, gold"):
        read_recording(path)


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    assert len(read_recording(written(tmp_path, b"\xef\xbb\xbftext,teacher\na,b\n"))) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("text,teacher\n", "has a header but no rows"),
        ("message,teacher\na,b\n", "line 2: there is no column `text`; found: message, teacher"),
        ("text,label\na,b\n", "line 2: there is no column `teacher`.*found: text, label"),
        ("text,teacher\na,b\nc\n", "line 3: 1 fields where the header has 2"),
        ('text,teacher\n"two\nlines",b\nc,d,e\n', "line 4: 3 fields"),
        ("text,teacher,text\na,b,c\n", "line 1: the column `text` occurs twice"),
        ('text,teacher\na,b\n"open,c\n', "line 3: not valid CSV"),
        ("text,teacher\na,\n", "line 2: column `teacher` is empty"),
        ("text,teacher\n,b\n", "line 2: column `text` must be a non-empty string"),
        (b"text,teacher\na,b\nc,\xff\n", "line 3: not UTF-8"),
        (f"text,teacher\n{'x' * (MAX_FIELD + 1)},b\n", "line 2: .*field limit"),
        (
            '{"text": "a", "teacher": "%s"}' % ("x" * (MAX_FIELD + 1)),
            "column `teacher` has 131,073 characters",
        ),
        ("text,teacher,latency_s\na,b,soon\n", "line 2: column `latency_s` must be seconds.*'soon'"),
        ("text,teacher,latency_s\na,b,-1\n", "column `latency_s`"),
        ("text,teacher,logprobs\na,b,{\n", "column `logprobs` isn't valid JSON"),
        ('{"text":"a","teacher":"b","logprobs":[{"logprob":-1}]}', "`logprobs` has no `token`"),
        ('{"text":"a","tool_calls":"[1]"}', "column `tool_calls` must be a JSON list of objects"),
        ('{"text":"a","teacher":"b"}\n{"text":', "line 2: not valid JSON"),
        ('{"text":"a","teacher":"b"}\n["a"]', "line 2: expected a JSON object, got a list"),
        ('{"text":7,"teacher":"b"}', "line 1: column `text` must be a non-empty string, got a number"),
        ('{"text":"a","teacher":"b","model":7}', "column `model` must be a string"),
    ],
)
def test_bad_files_are_refused_with_the_place(tmp_path: Path, content: str | bytes, says: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(RecordingError, match=says) as raised:
        read_recording(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.csv", tmp_path):
        with pytest.raises(RecordingError, match="can't be read"):
            read_recording(path)


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)


@given(
    st.lists(st.builds(Recorded, words, words, st.none() | words, st.none() | st.floats(0, 9)), min_size=1)
)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, rows: list[Recorded]) -> None:
    path = tmp_path_factory.mktemp("written") / "r.jsonl"
    Recording(path, tuple(rows)).write(path)
    assert read_recording(path).rows == tuple(rows)
