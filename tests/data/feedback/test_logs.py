"""Which files are logs, and whose: files by name, folders, and what lies beside logs."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from align_pipeline.data.feedback.logs import find_logs
from align_pipeline.data.feedback.settings import Settings
from align_pipeline.pipeline.errors import ConfigError, InputError
from thumbs import Make, rating

PAIR = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one log of two events."""
    write(tmp_path / "logs" / "log.jsonl", rating(1), rating(-1))
    return tmp_path / "logs"


def write(path: Path, *records: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), "utf-8")


def found(path: Path, **settings: Any) -> tuple[dict[str, str], list[str]]:
    """Return the logs of a path with whose they are, and what is said of other files."""
    notes: list[str] = []
    logs = find_logs([(path, path.name)], Settings(**settings), notes.append)
    return {log.name: log.adapter.name for log in logs}, notes


def test_what_is_nobodys_log_in_a_folder_is_named_and_left_out(folder: Path) -> None:
    write(folder / "more" / "other.jsonl", {"a": 1})
    write(folder / "readme.txt", "Votes of May.")
    (folder / "package.json").write_text('{"name": "shop"}\n', "utf-8")
    logs, notes = found(folder)
    assert logs == {"logs/log.jsonl": "events"}
    assert notes == [
        "logs/more/other.jsonl: no log that is known (records have a); left out",
        "logs/package.json: no log that is known (no array of records); left out",
    ]


def test_a_folder_of_nobodys_logs_and_a_file_by_its_name_are_questions(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "strange" / "a.jsonl", {"a": 1})
    write(tmp_path / "strange" / "empty.jsonl")
    write(folder / "readme.txt", "Votes of May.")
    with pytest.raises(ConfigError, match=r"^strange/a.jsonl: no log that is known \(records have a\); name it"):
        found(tmp_path / "strange")
    with pytest.raises(ConfigError, match=r"^a.jsonl: no log that is known"):
        found(tmp_path / "strange" / "a.jsonl")
    with pytest.raises(ConfigError, match=r"^readme.txt: plain text is no log; logs end in .jsonl"):
        found(folder / "readme.txt", format="events")


def test_a_file_of_two_products_is_asked_about(folder: Path) -> None:
    write(folder / "both.jsonl", rating(1), PAIR)
    with pytest.raises(ConfigError, match=r"^logs/both.jsonl: can be read as events and trl-preference \(records have"):
        found(folder)
    write(folder / "both.jsonl", rating(1), {"a": 1})
    with pytest.raises(ConfigError, match=r"^both.jsonl: no log that is known"):
        found(folder / "both.jsonl")


def test_what_was_written_here_and_what_is_hidden_are_no_logs(folder: Path) -> None:
    for place in (folder, folder / "out"):
        write(place / "pairs.train.jsonl", PAIR)
        write(place / "rejects.jsonl", {"where": "log.jsonl:1", "cause": "bad_json", "problem": "x", "row": None})
        write(place / "report.json", {"schema": 1, "dataset": "sha256:0"})
    write(folder / ".out.making" / "pairs.train.jsonl", PAIR)
    write(folder / ".log.jsonl.swp.jsonl", rating(1))
    write(folder / "report" / "report.json", {"schema": 1})
    logs, notes = found(folder)
    assert logs == {"logs/log.jsonl": "events"} and [note.partition(":")[0] for note in notes] == [
        "logs/report/report.json"
    ]
    with pytest.raises(InputError, match=r"^out: holds what align feedback wrote, and no logs; give the folder of"):
        found(folder / "out")


def test_a_store_and_what_it_keeps_of_people_are_no_logs(folder: Path) -> None:
    for name in ("runs/store/kto-0", "runs/locks", "only"):
        (folder / name).mkdir(parents=True)
    write(folder / "runs" / "store" / "kto-0" / "rows.jsonl", PAIR)
    write(folder / "runs" / "private" / "datasets.jsonl", {"place": "out"})
    write(folder / "only" / "private" / "lineage" / "a.jsonl", {"kind": "pair"})
    (folder / "only" / "private" / "salt").write_text("s")
    write(folder / "private" / "mine.jsonl", rating(1))
    assert found(folder) == ({"logs/log.jsonl": "events", "logs/private/mine.jsonl": "events"}, [])
    with pytest.raises(InputError, match=r"^runs: a folder without logs"):
        found(folder / "runs")


@pytest.mark.parametrize(
    "cell",
    [
        '[{"role": "user", "content": "hello, this was cut',
        "[{'role': 'user', 'content': 'q'}]",
        '{"role":"user","content":"q"}',
        ' [ {"role": "user"}]',
    ],
)
def test_a_prompt_of_a_table_that_is_half_a_list_is_invalid_at_its_line(make: Make, tmp_path: Path, cell: str) -> None:
    texts = ["[not json", "[]", "123", "null", "{role}", "[see {x}]"]
    with (tmp_path / "events.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("event_type", "prompt", "response", "label"))
        table.writerows(("rating", prompt, "A", 1) for prompt in [*texts, cell])
    (log,) = find_logs([(tmp_path / "events.csv", "events.csv")], Settings())
    events = list(log)
    assert [event["prompt"] for _, event in events[:-1]] == texts
    where, bad = events[-1]
    assert where == "events.csv:8" and str(bad).startswith("prompt: ") and "begins as a list of messages" in str(bad)
    made = make((tmp_path / "events.csv").read_bytes().splitlines(), "log.csv")
    assert made.events["used"] == len(texts)
    (first,) = made.events["invalid"]["wrong_type"]["first"]
    assert first.startswith("log.csv:8: prompt: ")


def test_standard_input_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^-: standard input is not read; save it \(\.\.\. > events.jsonl\)"):
        find_logs([(Path("-"), "-")], Settings())


def test_a_table_of_events_holds_lists_as_json_and_ids_as_pandas_writes_them(make: Make, tmp_path: Path):
    said = {"system": "Be brief.", "user": "Sort.", "assistant": "What?"}
    talk = [*({"role": role, "content": text} for role, text in said.items()), {"role": "user", "content": "A list."}]
    sides = [{"response": "sorted(a)"}, {"response": "a.sort()", "model": "m"}]
    log = [
        {"event_type": "rating", "prompt": talk, "response": "sorted(a)", "label": 1, "user_id": "7"},
        {"event_type": "comparison", "prompt": talk, "alternatives": sides, "winner": 0, "user_id": "8"},
        {"event_type": "rating", "prompt": "[1, 2]", "response": "a list", "label": -1, "user_id": "7"},
    ]
    columns = ("event_type", "prompt", "response", "label", "alternatives", "winner", "user_id")
    with (tmp_path / "events.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for event in log:
            cells = [event.get(name, "") for name in columns[:-1]]
            user = f"{event['user_id']}.0"
            table.writerow([*(json.dumps(cell) if type(cell) is list else cell for cell in cells), user])
    (table_of_events,) = find_logs([(tmp_path / "events.csv", "events.csv")], Settings())
    events = [event for _, event in table_of_events]
    assert [event["user_id"] for event in events] == ["7", "8", "7"]
    assert [event["prompt"] for event in events] == [talk, talk, "[1, 2]"]
    assert events[1]["alternatives"] == sides
    made = make(events)
    assert made.texts == [("sorted(a)", "a.sort()")] and made.labels == [("a list", False)]
