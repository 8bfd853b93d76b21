"""Dislikes that are completed: which rows they become, how they are counted, and how they are forgotten."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow.parquet import read_table

from align_pipeline.data.feedback.complete import cleaned
from align_pipeline.data.feedback.forget import forget
from align_pipeline.data.feedback.keys import salt, user_hash
from align_pipeline.data.feedback.lineage import entries, lineage_file
from align_pipeline.data.feedback.settings import Settings
from thumbs import Make, adds_up, rating

WORDS = ("milk", "tea", "bread", "salt", "rice", "soap", "jam", "nuts", "eggs", "figs")
LOG = [
    rating(1, "A", "u1"),
    rating(-1, "B", "u2"),
    *(rating(-1, f"no {one}", f"v{i}", f"where can I find {one} here") for i, one in enumerate(WORDS)),
    *(rating(1, f"yes {one}", f"w{i}", f"is there any {one} left") for i, one in enumerate(WORDS)),
    rating(-1, "no milk", "x", "where can I find milk here"),
    rating(-1, "no milk", "y", "where can I find milk here"),
    rating(1, "no milk", "z", "where can I find milk here"),
]


def politely(rows: Iterable[dict[str, Any]]) -> Iterator[str | None]:
    """Complete every answer but those about tea, and give the disliked answer back for bread."""
    assert list(rows) == list(rows), "rows may be read again"
    for row in rows:
        text = row["completion"][0]["content"]
        yield None if "tea" in text else text if "bread" in text else f"please {text}"


def test_a_dislike_and_a_better_answer_are_a_pair_beside_the_unpaired_row(make: Make) -> None:
    alone, made = make(LOG, test=0.4), make(LOG, complete=politely, test=0.4)
    adds_up(made)
    assert made.unpaired == alone.unpaired and made.report["unpaired"] == alone.report["unpaired"]
    counted = {name: made.report["pairs"][name] for name in ("thumbs", "completed", "not_completed", "user_cap")}
    assert counted == {"thumbs": 1, "completed": 8, "not_completed": 2, "user_cap": 0}
    for side in ("train", "test"):
        pairs, own = made.files[f"pairs.{side}"], [row for row in made.files[f"unpaired.{side}"] if not row["label"]]
        assert pairs[: len(alone.files[f"pairs.{side}"])] == alone.files[f"pairs.{side}"]
        added = pairs[len(alone.files[f"pairs.{side}"]) :]
        assert added, "each side has some"
        dislikes = {row["completion"][0]["content"]: row for row in own}
        for row in added:
            dislike = dislikes[row["rejected"][0]["content"]]
            assert row["chosen"] == [{"role": "assistant", "content": f"please {row['rejected'][0]['content']}"}]
            assert (row["fb_up_r"], row["fb_down_r"]) == (dislike["fb_up"], dislike["fb_down"])
            assert row["fb_row_id"] != dislike["fb_row_id"]
            for name in ("prompt", "fb_prompt_group", "fb_confidence", "fb_weight", "fb_users", "fb_ts_min"):
                assert row[name] == dislike[name], name
    assert len({row["fb_row_id"] for row in made.pairs + made.unpaired}) == len(made.pairs + made.unpaired)
    milk = next(row for row in made.pairs if row["rejected"][0]["content"] == "no milk")
    assert (milk["fb_confidence"], milk["fb_weight"]) == (round(4 / 6, 6), round(2 / 6, 6))  # three against one
    assert "8 from dislikes that a model completed" in (made.folder / "report.md").read_text("utf-8")
    assert "2 not completed" in (made.folder / "report.md").read_text("utf-8")


def test_they_have_the_columns_of_all_pairs(make: Make) -> None:
    for margins in (False, True):
        made = make(LOG, complete=politely, test=0, margins=margins)
        (thumbs,) = (row for row in made.pairs if row["fb_source"] == "thumbs")
        added = [row for row in made.pairs if row["fb_source"] == "completed"]
        assert {tuple(row) for row in added} == {tuple(thumbs)}
        assert {(row["fb_model_c"], row["fb_on_policy"]) for row in added} == {("complete.policy", False)}


def test_nobody_is_asked_where_nothing_was_asked_for_and_nothing_is_said_of_it(make: Make) -> None:
    made = make(LOG)
    adds_up(made)
    assert "completed" not in made.report["pairs"] and len(made.pairs) == 1


def test_the_same_answers_give_the_same_bytes_whatever_the_order_of_the_log(make: Make) -> None:
    one, other = make(LOG, complete=politely), make(LOG[::-1], complete=politely)
    assert one.bytes == other.bytes and one.report["dataset"] == other.report["dataset"]


def test_a_completer_answers_every_row(make: Make) -> None:
    with pytest.raises(ValueError, match="shorter"):
        make(LOG, complete=lambda rows: iter(["please"]))


def test_one_user_completes_no_more_than_its_share(make: Make) -> None:
    log = [rating(1, "yes", f"u{i}", f"{hashlib.sha256(b'%d' % i).hexdigest()} ?") for i in range(800)]
    log += [rating(-1, "no", "ann", f"{hashlib.sha256(b'a%d' % i).hexdigest()} ?") for i in range(30)]
    log += [rating(-1, "no", f"v{i}", f"{hashlib.sha256(b'v%d' % i).hexdigest()} ?") for i in range(15)]

    def all_of_them(rows: Iterable[dict[str, Any]]) -> Iterator[str | None]:
        return ("please" for _ in rows)

    made = make(log, complete=all_of_them)
    adds_up(made)
    assert made.report["unpaired"]["user_cap"] == 0, "30 of 845 unpaired rows are few, 30 of 45 pairs are many"
    assert (made.report["pairs"]["completed"], made.report["pairs"]["user_cap"]) == (35, 10)
    assert make(log, complete=all_of_them, user_share=1).report["pairs"]["completed"] == 45


def test_a_forgotten_users_dislike_takes_its_pair_along(make: Make, tmp_path: Path) -> None:
    made = make(LOG, complete=politely, test=0)
    private = tmp_path / "private"
    (lineage,) = (entry.lineage for entry in entries(private))
    words = read_table(lineage_file(private, lineage)).to_pylist()
    assert sum(word["source"] == "completed" for word in words) == 8 + 3
    assert {word["side"] for word in words if word["source"] == "completed"} == {2}

    def without(folder: Path, user: str) -> dict[str, dict[str, Any]]:
        nonlocal lineage
        after = tmp_path / user
        after.mkdir()
        lineage = forget(folder, after, private, lineage, user_hash(user, salt(private))).lineage
        lines = (after / "pairs.train.jsonl").read_text("utf-8").splitlines()
        report = json.loads((after / "report.json").read_text("utf-8"))
        assert report["rows"]["pairs.train"] == len(lines)
        return {row["rejected"][0]["content"]: row for row in map(json.loads, lines)}

    left = without(made.folder, "v3")
    assert len(left) == 8 and "no salt" not in left
    left = without(tmp_path / "v3", "x")
    milk = left["no milk"]
    assert (milk["fb_up_r"], milk["fb_down_r"], milk["fb_users"]) == (1, 2, 3) and milk["fb_up_c"] == 0
    assert milk["fb_confidence"] == 0.6  # (1 + 2) / (2 + 3)
    left = without(tmp_path / "x", "y")
    assert "no milk" not in left, "one against one is no dislike"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("  yes\r\n", "yes"),
        ("<think>hm</think> yes", "yes"),
        ("write to you@example.org", "write to <EMAIL_2>"),
        ("write to <EMAIL_1>", "write to <EMAIL_1>"),
        (" no ", None),
        ("<think>hm</think> no", None),
        (" \n", None),
        ("yes\u200b\u200b\u200b\u200b", None),
    ],
)
def test_a_drawn_answer_is_cleaned_as_answers_of_logs_are(text: str, found: str | None) -> None:
    row = {
        "prompt": [{"role": "user", "content": "is <EMAIL_1> right"}],
        "completion": [{"role": "assistant", "content": "no"}],
    }
    assert cleaned(text, row, Settings()) == found
