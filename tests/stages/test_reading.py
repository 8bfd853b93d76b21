"""Rows of a stage: encoded once and found again, split and mixed by content, judged, reported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align_pipeline.data.chat import encode_all
from align_pipeline.data.load import read
from align_pipeline.pipeline.errors import DataError
from align_pipeline.pipeline.stage import Resolved, Work
from align_pipeline.stages import models, reading, training
from align_pipeline.stages.dpo import DPO
from align_pipeline.stages.sft import SFT

from .conftest import NAMES, chats, pairs, rows_file

Make = Callable[..., Work]


def stage(**changes: Any) -> SFT:
    return SFT(**{"data": "file:rows.jsonl", "model": "file:base", "held_out": 0, **changes})


def prepared(sft: SFT, base: Resolved, data: Resolved | dict[str, Resolved], made: Work) -> training.Rows:
    several = {"data": data} if isinstance(data, Resolved) else {f"data.{name}": one for name, one in data.items()}
    return training.prepare(sft, {"model": base, **several}, models.load_tokenizer(base), made)


def plain(rows: Any) -> list[dict[str, Any]]:
    return [dict(row) for row in rows]


def numbered(count: int, word: str = "left") -> list[dict[str, Any]]:
    return [{"prompt": f"{NAMES[n % 12]} {n} ", "completion": f"{word} {n}"} for n in range(count)]


# --- the cache --------------------------------------------------------------------------------------------------------


def test_rows_are_those_that_one_process_encodes(base: Resolved, work: Make, tmp_path: Path) -> None:
    """More rows than one process takes alone, so that others encode: the same rows, in the same order."""
    data = rows_file(tmp_path, numbered(reading.ALONE + 3 * reading.CHUNK + 7))
    made = prepared(stage(), base, data, work())
    expected, stats = encode_all(read(Path(data.path or ""), "sft"), "sft", models.load_tokenizer(base), max_length=256)
    assert plain(made.train) == expected
    assert (made.tokens, made.truncated) == (stats.tokens, 0)


def test_a_second_stage_reads_what_the_first_encoded(
    base: Resolved, work: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = rows_file(tmp_path, pairs())
    dpo = DPO(data="file:rows.jsonl", policy="file:base", held_out=0.3)
    tokenizer = models.load_tokenizer(base)
    one = training.prepare(dpo, {"policy": base, "data": data}, tokenizer, work("one"))
    monkeypatch.setattr(reading, "encode_chunk", None)  # nothing is encoded again
    two = training.prepare(dpo, {"policy": base, "data": data}, models.load_tokenizer(base), work("two"))
    assert plain(one.train) == plain(two.train) and plain(one.held_out) == plain(two.held_out)
    reports = [json.loads((work(name).scratch / "rows.json").read_text()) for name in ("one", "two")]
    assert reports[0] == reports[1]
    assert reports[0]["data"]["rows"] == 12


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "rows are cut short": lambda entry: _cut(entry / "rows.arrow"),
    "rows are missing": lambda entry: (entry / "rows.arrow").unlink(),
    "one bit of the rows": lambda entry: _flip(entry / "rows.arrow"),
    "rejected rows are missing": lambda entry: (entry / "rejects.jsonl").unlink(),
    "what the gate found is cut short": lambda entry: _cut(entry / "gate.json"),
    "what the gate found is missing": lambda entry: (entry / "gate.json").unlink(),
    "what the gate found is something else": lambda entry: (entry / "gate.json").write_text("[]"),
    "a number of the gate's": lambda entry: (entry / "gate.json").write_text(
        (entry / "gate.json").read_text().replace('"rows": 12', '"rows": 13')
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_made_again(damage: str, base: Resolved, work: Make, tmp_path: Path) -> None:
    data = rows_file(tmp_path, [*numbered(12), BAD])
    sft = stage(on_bad_row="skip", max_bad_share=0.1)
    whole = plain(prepared(sft, base, data, work("whole")).train)
    assert notes(work("whole"))[1:] == []
    prepared(sft, base, data, work("again"))
    assert notes(work("again"))[0] == "rows.jsonl: rows from the cache"
    (entry,) = (path for path in (work().cache / "rows").iterdir() if path.is_dir())
    DAMAGE[damage](entry)
    made = prepared(sft, base, data, work())
    assert plain(made.train) == whole
    said = f"rows.jsonl: its entry in the cache is damaged ({entry.name}), it is discarded and made again"
    assert notes(work()) == [said, *notes(work("whole"))]
    assert len((work().out / "rejects.jsonl").read_text().splitlines()) == 1


def notes(made: Work) -> list[str]:
    lines = map(json.loads, (made.folder / "progress.jsonl").read_text().splitlines())
    return [line["note"] for line in lines if "note" in line]


CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "rows": lambda given: given | {"rows": numbered(13)},
    "max_length": lambda given: given | {"max_length": 7},
    "loss_on": lambda given: given | {"loss_on": "all"},
    "the chat template": lambda given: given | {"template": "{{ messages[0].content }}<|im_end|>"},
    "columns": lambda given: given | {"columns": {"prompt": "prompt"}},
    "format": lambda given: given | {"format": "prompt-completion"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_the_ids_is_in_the_key(change: str, base: Resolved, work: Make, tmp_path: Path) -> None:
    def entries(given: dict[str, Any]) -> set[str]:
        source = reading.Source(rows_file(tmp_path, given["rows"]), given.get("format"), given.get("columns", {}))
        tokenizer = models.load_tokenizer(base)
        tokenizer.chat_template = given.get("template", tokenizer.chat_template)
        how = {"max_length": given.get("max_length", 64), "loss_on": given.get("loss_on", "assistant")}
        reading.encode([source], "sft", tokenizer, work(), **how)
        return {path.name for path in (work().cache / "rows").iterdir() if path.is_dir()}

    before = entries({"rows": numbered(12)})
    assert entries({"rows": numbered(12)}) == before and len(before) == 1
    assert len(entries(CHANGES[change]({"rows": numbered(12)}))) == 2


@pytest.mark.slow
def test_a_killed_encoding_leaves_nothing_that_is_taken_for_whole(base: Resolved, work: Make, tmp_path: Path) -> None:
    data = rows_file(tmp_path, numbered(60_000))
    script = (
        "import sys; from pathlib import Path; from align_pipeline.pipeline.stage import Resolved, Work\n"
        "from align_pipeline.stages import models, reading\n"
        "base, data = (Resolved.model_validate_json(text) for text in sys.argv[1:3])\n"
        "print('encoding', flush=True)\n"
        "tokenizer = models.load_tokenizer(base)\n"
        "reading.encode([reading.Source(data)], 'sft', tokenizer, Work(Path(sys.argv[3])), max_length=64)\n"
    )
    command = [sys.executable, "-c", script, base.model_dump_json(), data.model_dump_json(), str(work().folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == b"encoding\n"
    folder = work().cache / "rows"
    deadline = time.monotonic() + 60
    while not list(folder.glob(".*/rows.arrow")) or len(_group(process.pid)) < 2:
        assert time.monotonic() < deadline and process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.kill()
    process.wait()
    while _group(process.pid):
        assert time.monotonic() < deadline, "a child outlives the process that started it"
        time.sleep(0.05)
    assert not list(folder.glob("[!.]*/gate.json"))
    made = prepared(stage(), base, data, work())
    assert len(made.train) == 60_000


def _group(pid: int) -> list[int]:
    """Return the living processes of a session."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[3] == str(pid) and fields[0] != "Z":
                found.append(int(folder.name))
    return found


# --- bad rows ---------------------------------------------------------------------------------------------------------

BAD = {"prompt": "a ", "completion": ""}


def test_skipped_rows_are_kept_beside_the_result(base: Resolved, work: Make, tmp_path: Path) -> None:
    long = {"prompt": "bread " * 400, "completion": "b"}
    rows = [*numbered(20), BAD, *numbered(18, "right"), long]
    data = rows_file(tmp_path, rows)
    with pytest.raises(DataError) as caught:
        prepared(stage(), base, data, work("strict"))
    assert [problem.split(": ")[0] for problem in caught.value.problems] == ["rows.jsonl:21", "rows.jsonl:40"]
    with pytest.raises(DataError, match=r"5.0% of the rows are bad, max_bad_share allows 0.04; mend the file"):
        prepared(stage(on_bad_row="skip", max_bad_share=0.04), base, data, work("few"))
    made = prepared(stage(on_bad_row="skip", max_bad_share=0.05), base, data, work())
    assert len(made.train) == 38
    left_out = [json.loads(line) for line in (work().out / "rejects.jsonl").read_text().splitlines()]
    assert [(one["where"], one["cause"], one["row"]) for one in left_out] == [
        ("rows.jsonl:21", "empty", BAD),
        ("rows.jsonl:40", "no room", long),
    ]
    report = json.loads((work().scratch / "rows.json").read_text())["data"]
    assert (report["rows"], report["bad"]) == (38, 2)
    assert {cause: entry["rows"] for cause, entry in report["causes"].items()} == {"empty": 1, "no room": 1}
    assert "- empty: 1" in (work().out / "report.md").read_text()


def test_each_source_is_judged_by_its_own_share(base: Resolved, work: Make, tmp_path: Path) -> None:
    """Three bad rows of a hundred are few, but not where they are all rows of their source."""
    data = {
        "large": rows_file(tmp_path, numbered(97), "large.jsonl"),
        "small": rows_file(tmp_path, [BAD] * 3, "small.jsonl"),
        "half": rows_file(tmp_path, [BAD, *numbered(1)], "half.jsonl"),
    }
    sft = stage(data={name: one.ref for name, one in data.items()}, on_bad_row="skip", max_bad_share=0.1)
    with pytest.raises(DataError) as caught:
        prepared(sft, base, data, work("sft"))
    rule = "of the rows are bad, max_bad_share allows 0.1; mend the file, or raise max_bad_share"
    said = [f"small.jsonl: 100.0% {rule}", f"half.jsonl: 50.0% {rule}"]
    assert [problem for problem in caught.value.problems if "max_bad_share" in problem] == said
    with pytest.raises(DataError) as caught:
        given = {f"data.{name}": one for name, one in data.items()}
        reading.read_rows(given, "data", "sft", work("rows"), on_bad_row="skip", max_bad_share=0.1)
    assert [problem for problem in caught.value.problems if "max_bad_share" in problem] == said


def test_a_source_that_gives_no_rows_is_named(base: Resolved, work: Make, tmp_path: Path) -> None:
    data = {
        "large": rows_file(tmp_path, numbered(20), "large.jsonl"),
        "few": rows_file(tmp_path, numbered(3, "right"), "few.jsonl"),
        "none": rows_file(tmp_path, [], "none.jsonl"),
    }
    sft = stage(data={name: one.ref for name, one in data.items()}, data_weights={"few": 1e-6})
    with pytest.raises(DataError) as caught:
        prepared(sft, base, data, work())
    assert caught.value.problems == (
        "few.jsonl: data_weights: 1e-06 leaves none of 3 rows to train on, each is drawn by chance; raise it, or leave "
        "the source out",
        "none.jsonl: no rows, at least one is needed; check how the file was written",
    )


def test_the_length_of_a_pair_is_that_of_its_longer_side(base: Resolved, work: Make, tmp_path: Path) -> None:
    """So that a report beside `max_length` says how near rows come to it; the tokens of both sides are summed up."""
    rows = [{"prompt_ids": [5] * 10, "chosen_ids": [6] * n, "rejected_ids": [7] * (40 - n)} for n in range(1, 40)]
    dpo = DPO(data="file:rows.jsonl", policy="file:base", held_out=0, max_length=50)
    found = training.prepare(
        dpo, {"policy": base, "data": rows_file(tmp_path, rows)}, models.load_tokenizer(base), work()
    )
    report = json.loads((work().scratch / "rows.json").read_text())["data"]
    assert (report["lengths"]["min"], report["lengths"]["max"], found.truncated) == (10 + 20, 10 + 39, 0)
    assert report["lengths"]["total"] == found.tokens == 39 * (2 * 10 + 40)


def test_prompts_in_two_dialects_are_told(base: Resolved, work: Make, tmp_path: Path) -> None:
    data = {"a": rows_file(tmp_path, chats(), "a.jsonl"), "b": rows_file(tmp_path, numbered(5), "b.jsonl")}
    prepared(stage(data={name: one.ref for name, one in data.items()}), base, data, work())
    report = json.loads((work().scratch / "rows.json").read_text())["data"]
    assert report["dialects"] == {"messages": 12, "text": 5}
    assert sum(report["writing"].values()) == report["writing"]["Latin"] <= 17
    assert report["notes"][0].startswith("12 prompts are messages and 5 plain text, which a model reads as two")


def test_rows_of_an_array_on_one_line_have_addresses_of_their_own(base: Resolved, work: Make, tmp_path: Path) -> None:
    rows = [{**pair, "margin": 1.0} for pair in pairs()]
    dpo = DPO(data="file:rows.json", policy="file:base", held_out=0)

    def prepare(name: str, *rows: dict[str, Any]) -> training.Rows:
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        data = Resolved(ref="file:rows.json", digest=f"sha256:{name}", path=str(tmp_path / f"{name}.json"))
        return training.prepare(dpo, {"policy": base, "data": data}, models.load_tokenizer(base), work(name))

    assert len(prepare("good", *rows, rows[3]).train) == 13
    report = json.loads((work("good").scratch / "rows.json").read_text())["data"]
    assert report["duplicates"]["first"] == ["rows.json:1[12]: says what rows.json:1[3] says"]
    with pytest.raises(DataError) as caught:
        prepare("bad", rows[0] | {"chosen": []}, *rows[1:7], rows[7] | {"chosen": []})
    assert [problem.split(": ")[0] for problem in caught.value.problems] == ["rows.json:1", "rows.json:1[7]"]
    with pytest.raises(DataError, match=r"^rows.json:1\[12\]: margin: missing"):
        prepare("margins", *rows, pairs()[0])


def test_pairs_that_differ_only_where_they_are_cut_are_bad_rows(base: Resolved, work: Make, tmp_path: Path) -> None:
    same = {"prompt": "where is milk ", "chosen": "left shelf " * 40 + "b", "rejected": "left shelf " * 40 + "c"}
    data = rows_file(tmp_path, [*pairs(), same])
    long, short = (DPO(data="file:rows.jsonl", policy="file:base", held_out=0, max_length=n) for n in (256, 64))
    tokenizer = models.load_tokenizer(base)
    assert len(training.prepare(long, {"policy": base, "data": data}, tokenizer, work("long")).train) == 13
    with pytest.raises(DataError) as caught:
        training.prepare(short, {"policy": base, "data": data}, tokenizer, work("short"))
    said = "chosen: equals rejected up to max_length (64 tokens), a pair must differ; raise max_length or drop the row"
    assert caught.value.problems == (f"rows.jsonl:13: {said}",)


def test_ids_are_held_against_the_models_embedding(
    base: Resolved, base_folder: Path, work: Make, tmp_path: Path
) -> None:
    """An embedding may be larger than the vocabulary of its tokenizer: what it takes can be trained on."""
    known = len(models.load_tokenizer(base))
    ids = [5, known, known + 3]
    data = rows_file(tmp_path, [{"prompt_ids": [5], "completion_ids": ids}, {"prompt_ids": [5], "completion_ids": [6]}])
    with pytest.raises(DataError) as caught:
        prepared(stage(), base, data, work())
    assert str(caught.value).startswith(
        f"rows.jsonl:1: completion_ids[1]: {known}, the vocabulary has {known} ids (0 to {known - 1}); "
    )
    shutil.copytree(base_folder, wider := tmp_path / "wider")
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps(config | {"vocab_size": known + 4}))
    made = prepared(stage(), Resolved(ref="file:wider", digest="sha256:0", path=str(wider)), data, work())
    assert made.train[0]["labels"] == [-100, *ids]


def test_rows_of_one_prompt_are_trained_on(base: Resolved, work: Make, tmp_path: Path) -> None:
    data = rows_file(tmp_path, [{"prompt": "bread ", "completion": f"shelf {n}"} for n in range(4)])
    made = prepared(stage(held_out=0.9), base, data, work())
    assert (len(made.train), len(made.held_out)) == (4, 0)


def test_margins_are_given_to_all_pairs_or_to_none(base: Resolved, work: Make, tmp_path: Path) -> None:
    rows = pairs()
    with_margin = [{**row, "margin": 1.0} for row in rows]
    dpo = DPO(data={"a": "file:a.jsonl", "b": "file:b.jsonl"}, policy="file:base", held_out=0)
    given = {"policy": base, "data.a": rows_file(tmp_path, with_margin, "a.jsonl")}
    found = training.prepare(
        dpo, {**given, "data.b": rows_file(tmp_path, with_margin, "b.jsonl")}, models.load_tokenizer(base), work("all")
    )
    assert {row["margin"] for row in found.train} == {1.0}
    given["data.b"] = rows_file(tmp_path, rows, "b.jsonl")
    with pytest.raises(DataError, match=r"b.jsonl:1: margin: missing, other rows have one"):
        training.prepare(dpo, given, models.load_tokenizer(base), work("some"))


# --- split and mixture ------------------------------------------------------------------------------------------------


def answers(rows: Any, base: Resolved) -> list[str]:
    tokenizer = models.load_tokenizer(base)
    return [tokenizer.decode([token for token in row["labels"] if token != -100]).strip() for row in rows]


def test_adding_rows_moves_none(base: Resolved, work: Make, tmp_path: Path) -> None:
    few = prepared(stage(held_out=0.2), base, rows_file(tmp_path, numbered(300), "few.jsonl"), work())
    many = prepared(stage(held_out=0.2), base, rows_file(tmp_path, numbered(600), "many.jsonl"), work())
    assert 30 < len(few.held_out) < 90
    assert set(answers(few.held_out, base)) < set(answers(many.held_out, base))
    assert set(answers(few.train, base)) < set(answers(many.train, base))


def test_sources_are_mixed_by_weight_and_seed(base: Resolved, work: Make, tmp_path: Path) -> None:
    data = {
        name: rows_file(tmp_path, numbered(1000, name), f"{name}.jsonl") for name in ("once", "twice", "some", "more")
    }
    refs = {name: one.ref for name, one in data.items()}

    def mixed(**changes: Any) -> training.Rows:
        weights = {"twice": 2, "some": 0.3, "more": 1.5}
        return prepared(stage(data=refs, data_weights=weights, **changes), base, data, work())

    made = mixed(held_out=0.1)
    seen = {name: Counter(text for text in answers(made.train, base) if text.startswith(name)) for name in refs}
    held = Counter(text.split()[0] for text in answers(made.held_out, base))
    assert set(seen["once"].values()) == {1} and set(seen["twice"].values()) == {2}
    assert set(seen["some"].values()) == {1} and set(seen["more"].values()) == {1, 2}
    # 1,000 rows, a tenth held out: binomial, so within four standard deviations.
    for name, expected in (("once", 900), ("twice", 1800), ("some", 270), ("more", 1350)):
        assert abs(sum(seen[name].values()) - expected) < 60, name
    assert held["once"] == 1000 - len(seen["once"]) and held["twice"] == 1000 - len(seen["twice"]), "never repeated"
    assert not set(answers(made.held_out, base)) & set(answers(made.train, base))
    assert abs(held["some"] - 30) < 25

    assert answers(mixed(held_out=0.1).train, base) == answers(made.train, base)
    other = set(answers(mixed(seed=1).train, base))
    same = {text for text in seen["some"] if text in other}
    assert 0 < len(same) < len(seen["some"]), "another seed takes other rows"
    report = json.loads((work().scratch / "rows.json").read_text())["data"]
    assert [source["weight"] for source in report["sources"]] == [1.0, 2.0, 0.3, 1.5]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a weight of no source": ({"data_weights": {"a": 2}}, "data_weights: 'a' is no source of data"),
    "a misspelt source": (
        {"data": {"shop": "file:a", "web": "file:b"}, "data_weights": {"wbe": 2}},
        "data_weights: 'wbe' is no source of data; did you mean web?",
    ),
    "a weight of 0": (
        {"data": {"shop": "file:a"}, "data_weights": {"shop": 0}},
        "data_weights: shop must be above 0 and at most 100, got 0",
    ),
    "no source": ({"data": {}}, "data: names no source; give at least one"),
    "another task's format": ({"format": "hh-rlhf"}, "format: hh-rlhf is no format of sft"),
    "an unknown column": (
        {"columns": {"promt": "q"}}, "columns: promt is no field of rows for sft; did you mean prompt?"
    ),
    "one column for two fields": (
        {"columns": {"prompt": "q", "completion": "q"}},
        "columns: q is mapped to prompt and to completion, a column is one field; name another column",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_settings_are_checked_before_anything_is_read(name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(ValueError) as caught:
        stage(**changes)
    assert message in str(caught.value)


@pytest.mark.slow
def test_several_ranks_encode_once(base: Resolved, work: Make, tmp_path: Path) -> None:
    """Two processes want the same rows at the same time: one encodes, both read, and rank 0 alone reports."""
    data = rows_file(tmp_path, numbered(9000))
    script = (
        "import sys; from pathlib import Path; from align_pipeline.pipeline.stage import Resolved, Work\n"
        "from align_pipeline.stages import models, reading\n"
        "base, data = (Resolved.model_validate_json(text) for text in sys.argv[1:3])\n"
        "made, chunk = [], reading._make\n"
        "reading._make = lambda *given: (made.append(1), chunk(*given))\n"
        "tokenizer = models.load_tokenizer(base)\n"
        "(entry,) = reading.encode([reading.Source(data)], 'sft', tokenizer, Work(Path(sys.argv[3])), max_length=64)\n"
        "print(len(made), len(entry.table))\n"
    )
    command = [sys.executable, "-c", script, base.model_dump_json(), data.model_dump_json(), str(work().folder)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate(timeout=120)[0].strip() for process in both)
    assert said == ["0 9000", "1 9000"]


def test_a_stage_says_what_it_read(base: Resolved, work: Make, tmp_path: Path) -> None:
    stage(max_steps=1).run({"model": base, "data": rows_file(tmp_path, [*chats(), chats(1)[0]])}, work())
    lines = [json.loads(line) for line in (work().folder / "progress.jsonl").read_text().splitlines()]
    assert notes(work()) == ["rows.jsonl read as messages: 13 rows"]
    assert [line["warning"] for line in lines if "warning" in line] == [
        "1 row says what an earlier row says; each counts each time"
    ]
