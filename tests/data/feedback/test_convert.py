"""What feedback means: small logs whose rows are known."""

import json
import random
from collections import Counter
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from align_pipeline.data.feedback.clean import without_reasoning
from align_pipeline.data.feedback.events import Reading, read_event
from align_pipeline.data.feedback.logs import canonical_lines, find_logs
from align_pipeline.data.feedback.settings import Settings
from align_pipeline.data.gate import Gate
from align_pipeline.data.sources import Bad
from align_pipeline.pipeline.errors import ConfigError, InputError
from thumbs import Make, adds_up, rating

USER = {"role": "user"}
ESSAY = (
    "Read what follows with care and answer in one short line without any other word: the ships of the old navy were "
    "built from oak that had grown for two hundred years before it was cut, dried, bent by steam and nailed in place."
)
LONG = "def total(values):\n    result = 0\n    for value in values:\n        result += value\n    return result"


# Votes.


def test_an_answer_that_is_liked_and_one_that_is_not_make_a_pair(make: Make):
    made = make([rating(1, "A", "u1"), rating(-1, "B", "u2")])
    assert made.texts == [("A", "B")] and made.unpaired == []
    (row,) = made.pairs
    assert row["fb_confidence"] == pytest.approx(5 / 6, abs=1e-6)  # P(Beta(2, 1) > Beta(1, 2)), by hand
    assert row["fb_weight"] == pytest.approx(2 / 3, abs=1e-6)
    assert (row["fb_up_c"], row["fb_down_c"], row["fb_up_r"], row["fb_down_r"], row["fb_users"]) == (1, 0, 0, 1, 2)
    assert row["prompt"] == [{"role": "user", "content": "Sort a list."}] and row["fb_source"] == "thumbs"
    adds_up(made)


def test_a_thumb_without_a_counterpart_is_an_unpaired_row(make: Make):
    made = make([rating(1, "A")])
    assert made.pairs == [] and made.labels == [("A", True)]
    adds_up(made)


def test_the_latest_vote_of_a_user_counts_wherever_it_stands(make: Make):
    made = make([rating(-1, "A", ts=1755000020), rating(1, "A", ts=1755000010)])
    assert made.labels == [("A", False)] and made.events["superseded"] == 1
    adds_up(made)


def test_votes_of_one_time_that_contradict_each_other_count_for_nothing(make: Make):
    made = make([rating(-1, "A"), rating(1, "A")])
    assert made.labels == [] and made.events["tied"] == 2
    adds_up(made)


def test_every_row_has_the_columns_and_types_of_every_other(make: Make):
    timed = [rating(1, "A", "u1", ts=1755000010), rating(-1, "B", "u2", ts="2025-08-12T12:00:20+00:00", model="m")]
    made = make([*timed, rating(1, "C", "u3", "other"), rating(-1, "D", None, "more", ts=1755000020)])
    for rows in (made.pairs, made.unpaired):
        assert len({tuple((name, type(value)) for name, value in row.items()) for row in rows}) == 1
    assert made.pairs[0]["fb_ts_min"] == "2025-08-12T12:00:10Z" and made.pairs[0]["fb_ts_max"] == "2025-08-12T12:00:20Z"
    assert {row["fb_ts_min"] for row in made.unpaired} == {"", "2025-08-12T12:00:20Z"}


def test_a_tie_is_dropped(make: Make):
    made = make([rating(1, "A", "u1"), rating(-1, "A", "u2")])
    assert made.pairs == [] and made.unpaired == [] and made.events["tied"] == 2
    adds_up(made)


def test_confidence_comes_from_all_votes(make: Make):
    votes = [rating(1, "A", f"a{i}") for i in range(3)] + [rating(-1, "A", "a3"), rating(1, "B", "b0")]
    made = make(votes + [rating(-1, "B", f"b{i}") for i in range(1, 4)])
    (row,) = made.pairs
    assert row["fb_confidence"] == pytest.approx(0.897, abs=5e-4)
    assert [row[f"fb_{name}"] for name in ("up_c", "down_c", "up_r", "down_r")] == [3, 1, 1, 3]


def test_ten_liked_and_ten_disliked_answers_are_zipped_and_capped(make: Make):
    ups = [rating(1, f"up {i}", f"a{i}") for i in range(10)]
    made = make(ups + [rating(-1, f"down {i}", f"b{i}") for i in range(10)])
    assert len(made.pairs) == 4 and len({text for pair in made.texts for text in pair}) == 8
    assert len(made.unpaired) == 12 and made.report["pairs"]["prompt_cap"] == 6
    adds_up(made)


def test_an_uncertain_pair_is_left_out_and_its_answers_stay_unpaired(make: Make):
    votes = [rating(1, "A", "a0"), rating(-1, "B", "b0"), rating(-1, "B", "b1"), rating(1, "B", "b2")]
    made = make(votes, min_confidence=0.8)
    assert made.report["pairs"]["low_confidence"] == 1  # 1-0 against 1-2 is .798
    assert made.labels == [("A", True), ("B", False)]
    assert len(make(votes).pairs) == 1
    adds_up(made)


def test_an_admins_vote_weighs_three(make: Make):
    votes = [rating(1, "A", "admin", actor="admin"), rating(-1, "A", "u1"), rating(-1, "A", "u2")]
    assert make(votes).labels == [("A", True)]
    assert make(votes, admin_weight=1).labels == [("A", False)]


def test_a_model_is_no_judge_unless_it_is_named(make: Make):
    votes = [rating(1, "A", actor="model"), rating(1, "B", "u2")]
    made = make(votes)
    assert made.labels == [("B", True)] and made.events["dropped"] == {"actor_excluded": 1}
    assert len(make(votes, actors=["end_user", "model"]).unpaired) == 2
    adds_up(made)


def test_a_vote_that_was_taken_back_is_gone(make: Make):
    made = make(
        [
            rating(1, "A", response_id="r1", ts=1755000010),
            {"event_type": "retract", "response_id": "r1", "user_id": "u1", "ts": 1755000020},
        ]
    )
    assert made.unpaired == [] and made.events["retracted"] == 1 and made.events["superseded"] == 1
    adds_up(made)


def test_a_retract_comes_last_and_takes_comparisons_back_too(make: Make):
    back = {"event_type": "retract", "response": "A", "prompt": "Sort a list.", "user_id": "u1"}
    untimed = make([rating(1, "A", ts=1755000010), back])
    assert untimed.unpaired == [] and untimed.events["retracted"] == 1
    same_time = make([rating(1, "A", ts=1755000010), {**back, "ts": 1755000010}])
    assert same_time.unpaired == []
    before = make([rating(1, "A", ts=1755000010), {**back, "ts": 1755000005}])
    assert before.labels == [("A", True)]
    compared = comparison(0, "A", "B", ts=1755000010, prompt="Sort a list.")
    assert make([compared, {**back, "ts": 1755000020}]).pairs == []
    assert len(make([compared, {**back, "ts": 1755000005}]).pairs) == 1
    assert len(make([compared, {**back, "user_id": "u2", "ts": 1755000020}]).pairs) == 1
    nobody = make([rating(1, "A"), {key: value for key, value in back.items() if key != "user_id"}])
    assert list(nobody.events["invalid"]) == ["missing_user"]
    for one in (untimed, same_time, before):
        adds_up(one)


def test_a_response_id_is_one_answer_within_its_conversation(make: Make):
    told = [rating(0, text, f"w{text}", prompt=text * 3, response_id="1", conversation_id=text) for text in "XY"]
    down = {"event_type": "rating", "label": -1, "response_id": "1"}
    made = make([*told, {**down, "conversation_id": "X", "user_id": "u1"}, {**down, "user_id": "u2"}])
    assert made.labels == [("X", False)] and made.events["invalid"]["orphan_ref"]["events"] == 1
    one = make([told[0], {**down, "user_id": "u2"}])
    assert one.labels == [("X", False)]
    adds_up(made)


def test_a_pair_that_the_votes_contradict_is_none(make: Make):
    votes = [rating(-1, "A", f"a{i}", "Sort") for i in range(3)] + [rating(1, "B", f"b{i}", "Sort") for i in range(3)]
    made = make([comparison(0, "A", "B"), *votes])
    assert made.texts == [("B", "A")] and made.pairs[0]["fb_source"] == "thumbs"
    assert made.report["pairs"]["contradicted"] == 1
    adds_up(made)


def test_the_salt_decides_nothing(make: Make, tmp_path: Any):
    import shutil

    events = [rating(label, "A", user, f"prompt {i}", event_id=f"e{i}") for i in range(12)
              for label, user in ((1, "u1"), (-1, "u2"))]  # fmt: skip
    made = make(events).bytes
    for _ in range(3):
        shutil.rmtree(tmp_path / "private")
        assert make(events).bytes == made


def test_ids_are_one_whatever_kind_of_file_they_stand_in(tmp_path: Any):
    from align_pipeline.data.feedback.convert import convert
    from align_pipeline.data.feedback.settings import Settings

    (tmp_path / "out").mkdir()
    vote = {"event_type": "rating", "label": -1, "response_id": "r1", "user_id": "u2"}
    (tmp_path / "a.jsonl").write_text(json.dumps(rating(1, "A", "u1", response_id="r1", event_id="e")), "utf-8")
    (tmp_path / "b.json").write_text(json.dumps([vote, rating(1, "A", "u1", response_id="r1", event_id="e"),
                                                 {**vote, "response_id": "r2"}]), "utf-8")  # fmt: skip
    report = convert(
        [(tmp_path / name, name) for name in ("a.jsonl", "b.json")], Settings(), tmp_path / "out",
        scratch=tmp_path / "scratch", private=tmp_path / "private", place="out",
    )  # fmt: skip
    events = report["events"]
    assert (events["duplicates"], events["tied"]) == (1, 2)
    assert events["invalid"]["orphan_ref"]["first"][0].startswith("b.json:1[2]: response_id: names no answer")


def test_nobody_is_everybody_without_a_name(make: Make):
    made = make([rating(1, "A", None, event_id="1"), rating(1, "A", None, event_id="2"), rating(-1, "A", "u1")])
    assert made.labels == [("A", True)] and made.unpaired[0]["fb_users"] == 3
    adds_up(made)


# Prompts.


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Sort\r\na list", "Sort\na list", True),
        ("Cafe\u0301", "Caf\u00e9", True),
        ("Sort a list", "Sort a list \n", True),
        ("Sort a list", "sort a list", False),
        ("Sort a list", "Sort a  list", False),
        (
            [USER | {"content": "Hi"}, {"role": "assistant", "content": "Yes?"}, USER | {"content": "Sort"}],
            [USER | {"content": "Ho"}, {"role": "assistant", "content": "Yes?"}, USER | {"content": "Sort"}],
            False,
        ),
        (
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sort"}],
            [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Sort"}],
            False,
        ),
    ],
)  # fmt: skip
def test_equal_prompts_are_equal_messages(make: Make, one: Any, other: Any, same: bool):
    made = make([rating(1, "A", "u1", one), rating(-1, "B", "u2", other)])
    assert len(made.pairs) == same and len(made.unpaired) == (0 if same else 2)
    adds_up(made)


def test_the_chosen_answers_system_turn_is_written_where_system_turns_are_ignored(make: Make):
    def under(system: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": system}, {"role": "user", "content": "Sort"}]

    events = [rating(-1, "B", "u2", under("Be kind.")), rating(1, "A", "u1", under("Be brief."))]
    (row,) = make(events, ignore_system=True).pairs
    assert row["prompt"][0]["content"] == "Be brief." and row["chosen"][0]["content"] == "A"


def test_answers_that_differ_by_a_last_line_feed_are_one_answer(make: Make):
    made = make([rating(1, "A\n", "u1"), rating(-1, "A", "u2")])
    assert made.pairs == [] and made.events["tied"] == 2
    adds_up(made)


def test_thoughts_are_taken_off_both_sides_and_the_history(make: Make):
    prompt = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>polite</think>\n\nHello!"},
        {"role": "user", "content": "Sort"},
    ]
    card = '<details type="reasoning" done="true" duration="3">\n<summary>Thought</summary>\n> hm\n</details>\n'
    made = make([rating(1, f"{card}A", "u1", prompt), rating(-1, "<think>no</think>B", "u2", prompt)])
    assert made.texts == [("A", "B")] and made.pairs[0]["prompt"][1]["content"] == "Hello!"
    assert made.report["noticed"]["reasoning_stripped"] == 2
    kept = make([rating(1, f"{card}A", "u1", prompt), rating(-1, "B", "u2", prompt)], strip_reasoning=False)
    assert kept.texts[0][0].startswith("<details")


# Comparisons, edits, demonstrations, regenerations.


def comparison(winner: Any, *answers: str, user: str = "u1", **more: Any) -> dict[str, Any]:
    alternatives = [{"response": answer} for answer in answers]
    event = {"event_type": "comparison", "prompt": "Sort", "alternatives": alternatives, "winner": winner}
    return {**event, "user_id": user, **more}


def test_a_comparison_is_a_pair_and_a_tie_is_none(make: Make):
    assert make([comparison(1, "A", "B")]).texts == [("B", "A")]
    assert make([comparison(0, "A", "B", "C")]).texts == [("A", "B"), ("A", "C")]
    tie = make([comparison("tie", "A", "B")])
    assert tie.pairs == [] and tie.unpaired == [] and tie.events["tied"] == 1
    adds_up(tie)


def test_both_bad_is_two_dislikes(make: Make):
    made = make([comparison("both_bad", "A", "B")])
    assert made.labels == [("A", False), ("B", False)] and made.events["used"] == 1
    adds_up(made)


def test_comparisons_of_several_people_are_counted_together(make: Make):
    made = make([comparison(0, "A", "B"), comparison(1, "B", "A", user="u2"), comparison(0, "B", "A", user="u3")])
    (row,) = made.pairs
    assert made.texts == [("A", "B")] and row["fb_confidence"] == pytest.approx(3 / 5)  # (1 + 2) / (2 + 3)
    assert make([comparison(0, "A", "B"), comparison(0, "B", "A", user="u2")]).pairs == []
    adds_up(made)


def edit(response: str, original: str, kind: str = "edit", **more: Any) -> dict[str, Any]:
    return {"event_type": kind, "prompt": "Sum", "response": response, "original_response": original, **more}


def test_an_edit_is_a_pair_unless_it_is_a_slip_or_another_text(make: Make):
    made = make([edit(LONG.replace("result", "total"), LONG)])
    assert made.texts == [(LONG.replace("result", "total"), LONG)] and made.pairs[0]["fb_source"] == "edit"
    slip = make([edit("I like the color of " * 9 + "it", "I like the colour of " + "I like the color of " * 8 + "it")])
    assert slip.pairs == [] and slip.report["pairs"]["edit_too_small"] == 1
    other = make([edit("xyz", LONG)])
    assert other.pairs == [] and other.report["pairs"]["edit_too_large"] == 1
    for one in (made, slip, other):
        adds_up(one)


def test_a_demonstration_needs_no_likeness(make: Make):
    assert make([edit("xyz", LONG, "demonstration")]).texts == [("xyz", LONG)]
    alone = make([{"event_type": "demonstration", "prompt": "Sum", "response": "xyz"}])
    assert alone.labels == [("xyz", True)]


def test_an_edited_answer_does_not_make_a_second_pair_of_its_thumbs(make: Make):
    better = LONG.replace("result", "total")
    votes = [rating(-1, LONG, "u1", "Sum"), edit(better, LONG, user_id="u1"), rating(1, "sum(values)", "u2", "Sum")]
    made = make(votes)
    assert made.texts == [(better, LONG)] and made.labels == [("sum(values)", True)]
    adds_up(made)


def test_regenerations_are_off_and_bow_to_thumbs(make: Make):
    kept = edit("A", "B", "regenerate", user_id="u1")
    off = make([kept])
    assert off.pairs == [] and off.events["regeneration_off"] == 1
    assert make([kept], regenerations=True).texts == [("A", "B")]
    assert make([kept, rating(-1, "A", "u2", "Sum")], regenerations=True).pairs == []
    adds_up(off)


# Caps, suspects, splits, order.


def test_no_user_gives_more_than_a_share_of_the_rows(make: Make):
    crowd = [rating(1, "A", f"u{i}", f"prompt {i} of the crowd") for i in range(100)]
    brigade = [rating(-1, "A", "boss", f"question {i} of the boss") for i in range(900)]
    made = make(crowd + brigade)
    counts = Counter(row["label"] for row in made.unpaired)
    assert counts == {True: 100, False: 20} and made.report["unpaired"]["user_cap"] == 880
    alone = make(brigade)
    assert len(alone.unpaired) == 900
    adds_up(made)


def test_who_votes_as_no_person_does_is_named_and_left_out_on_request(make: Make):
    fast = [rating(1, "A", "bot", f"prompt {i}", ts=1755000000 + i) for i in range(40)]
    calm = [rating(1, "B", "ann", f"prompt {i}", ts=1755000000 + 60 * i) for i in range(40)]
    made = make(fast + calm)
    assert made.report["users"]["suspects"] == 1 and len(made.unpaired) == 80
    strict = make(fast + calm, drop_suspects=True)
    assert len(strict.unpaired) == 40 and strict.events["suspect_user"] == 40
    adds_up(strict)


def test_near_duplicates_and_conversations_stay_on_one_side(make: Make):
    near = [rating(1, f"A{i}", f"u{i}", f"{ESSAY} Name item {i}.") for i in range(50)]
    other = [
        rating(1, "A", f"v{i}", f"word{i} thing{i} place{i} name{i}", conversation_id=f"c{i // 5}") for i in range(200)
    ]
    made = make(near + other, test=0.3)
    sides = {row["fb_prompt_group"]: set() for row in made.unpaired}
    for name, rows in made.files.items():
        for row in rows:
            sides[row["fb_prompt_group"]].add(name)
    assert all(len(side) == 1 for side in sides.values()) and made.files["unpaired.test"]
    assert len({row["fb_prompt_group"] for row in made.unpaired if "Name item" in row["prompt"][0]["content"]}) == 1
    assert len(sides) == 1 + 40


def test_turns_of_one_chat_stay_on_one_side_without_its_name(make: Make):
    first = [{"role": "user", "content": "Tell me of ships"}]
    later = [*first, {"role": "assistant", "content": "They float."}, {"role": "user", "content": "Why is that so?"}]
    made = make([rating(1, "A", "u1", first), rating(1, "B", "u2", later), rating(1, "C", "u3", "Of trains, please")])
    groups = {row["completion"][0]["content"]: row["fb_prompt_group"] for row in made.unpaired}
    assert groups["A"] == groups["B"] != groups["C"]


def test_liked_and_disliked_rows_are_mixed_and_equal_prompts_kept_apart(make: Make):
    events = [rating(1, f"A{i}", f"u{i}", f"popular question {i % 60}") for i in range(900)]
    events += [rating(-1, f"B{i}", f"v{i}", f"strange matter number {i}") for i in range(100)]
    made = make(events, test=0.0)
    rows = made.files["unpaired.train"]
    assert len(rows) == 1000
    prompts = [row["prompt"][0]["content"] for row in rows]
    assert all(len(set(prompts[at : at + 16])) == 16 for at in range(len(prompts) - 16))
    assert all(not all(row["label"] for row in rows[at : at + 64]) for at in range(936))
    kto = made.report["kto"]
    assert (kto["up"], kto["down"], kto["set"]) == (900, 100, "undesirable_weight")
    assert 6.77 <= kto["weight"] <= 9.0
    adds_up(made)


def some(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return events of every kind with many collisions."""
    random_ = random.Random(seed)
    events = []
    for number in range(count):
        user, prompt = f"u{random_.randrange(30)}", f"prompt {random_.randrange(count // 8 + 1)} is short"
        more = {
            "user_id": user,
            "prompt": prompt,
            "model": random_.choice("xy"),
            "event_id": f"e{number % (count - 3)}",
        }
        more |= {"ts": 1755000000 + random_.randrange(50)} if random_.random() < 0.8 else {}
        more |= {"conversation_id": f"c{random_.randrange(count)}"} if random_.random() < 0.5 else {}
        answers = [f"answer {random_.randrange(6)}" for _ in range(3)]
        kind = random_.choice(["rating"] * 6 + ["comparison", "edit", "regenerate", "retract"])
        if kind == "rating":
            event = {"response": answers[0], "label": random_.choice([1, 1, -1, 0])}
        elif kind == "comparison":
            alternatives = [{"response": answer} for answer in answers]
            event = {"alternatives": alternatives, "winner": random_.choice([0, 1, 2, "tie", "both_bad"])}
        elif kind == "retract":
            event = {"response": answers[0]}
        else:
            event = {"response": answers[0], "original_response": answers[1]}
        events.append({"event_type": kind, **event, **more})
    return events


def test_neither_order_nor_pieces_change_a_byte(make: Make, monkeypatch: pytest.MonkeyPatch):
    events = some(600)
    made = make(events, regenerations=True)
    adds_up(made)
    assert made.pairs and made.unpaired
    shuffled = random.Random(1).sample(events, len(events))
    assert make(shuffled, regenerations=True).bytes == made.bytes
    from align_pipeline.data.feedback import lines

    size = 977  # smaller than some lines, so that pieces without a line are among them
    monkeypatch.setattr(lines.pieces, "__defaults__", (size,))
    assert make(events, regenerations=True).bytes == made.bytes
    as_array = [json.dumps(shuffled).encode()]
    again = make(as_array, "log.json", regenerations=True)
    assert again.bytes == made.bytes


def test_a_line_that_begins_on_a_border_is_read_once(make: Make, monkeypatch: pytest.MonkeyPatch):
    events = [rating(1, f"answer {i}", f"u{i}", f"prompt {i:03}") for i in range(100)]
    (length,) = {len(json.dumps(event)) + 1 for event in events[10:]}  # two digits, then all are alike
    from align_pipeline.data.feedback import lines

    for size in (length, 2 * length, length - 1, length + 1):
        monkeypatch.setattr(lines.pieces, "__defaults__", (size,))
        assert len(make(events[10:]).unpaired) == 90


# Logs that are not in order.


def test_bad_lines_are_named_and_the_others_used(make: Make):
    lines: list[Any] = [rating(1, f"answer {i}", f"u{i}", f"prompt {i}") for i in range(1, 11)]
    lines[2] = b'{"event_type": "rating", "prompt": '
    lines[4] = b'{"event_type": "rating", "prompt": "\xff", "response": "A", "label": 1}'
    del lines[8]["response"]
    made = make(lines)
    assert made.events["used"] == 7 and made.events["read"] == 10
    first = {cause: one["first"][0].split(": ")[0] for cause, one in made.events["invalid"].items()}
    assert first == {"bad_json": "log.jsonl:3", "bad_encoding": "log.jsonl:5", "missing_response": "log.jsonl:9"}
    rejects = [json.loads(line) for line in made.bytes["rejects.jsonl"].splitlines()]
    assert [one["where"] for one in rejects] == ["log.jsonl:3", "log.jsonl:5", "log.jsonl:9"]
    assert rejects[0]["row"] == '{"event_type": "rating", "prompt": '
    adds_up(made)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"label": "meh"}, "unknown_rating"),
        ({"label": 4}, "unknown_rating"),
        ({"prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}, "bad_role_order"),
        ({"prompt": []}, "missing_prompt"),
        ({"ts": "yesterday"}, "bad_timestamp"),
        ({"ts": 33_000_000_000}, "bad_timestamp"),
        ({"event_type": "thumb"}, "unknown_event_type"),
        ({"response": "half \ud800"}, "bad_encoding"),
        ({"response": 3}, "wrong_type"),
        ({"response": None, "response_id": "nowhere"}, "orphan_ref"),
        ({"lable": 1}, "unknown_field"),
        ({"response": "x" * (3 * 2**20)}, "too_long"),
    ],
)
def test_what_is_wrong_with_an_event_is_said(make: Make, change: dict[str, Any], cause: str):
    bad = {key: value for key, value in {**rating(1), **change}.items() if value is not None}
    made = make([rating(1, "A", "u2"), bad])
    assert list(made.events["invalid"]) == [cause] and len(made.unpaired) == 1
    assert made.events["invalid"][cause]["first"][0].startswith("log.jsonl:2: ")
    adds_up(made)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"consent": False}, "no_consent"),
        ({"error": True}, "error_or_unfinished"),
        ({"finish_reason": "length"}, "error_or_unfinished"),
        ({"response": "<think>only a thought</think>"}, "empty_after_clean"),
        ({"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "multimodal"),
        ({"prompt": [{"role": "tool", "content": "12"}]}, "tool_calls"),
        ({"response": "pay \u202eevil"}, "hidden_characters"),
    ],
)
def test_what_is_left_out_is_counted(make: Make, change: dict[str, Any], reason: str):
    made = make([rating(1, "A", "u2"), {**rating(1), **change}])
    assert made.events["dropped"] == {reason: 1} and len(made.unpaired) == 1
    adds_up(made)


def test_an_answer_is_whole_in_the_words_of_each_maker(make: Make):
    ends = ["stop", "STOP", "end_turn", "stop_sequence", "eos_token", "COMPLETE", "FINISH", ""]
    log = [rating(1, f"A{at}", f"u{at}", f"question {at}", finish_reason=end) for at, end in enumerate(ends)]
    cut = [rating(1, "B", "u", "what", finish_reason=end) for end in ("max_tokens", "MAX_TOKENS", "content_filter", 1)]
    made = make([*log, *cut])
    assert len(made.labels) == len(ends) and made.events["dropped"] == {"error_or_unfinished": len(cut)}


def test_an_answer_that_was_cut_off_may_still_be_disliked(make: Make):
    assert make([rating(-1, "A", finish_reason="length")]).labels == [("A", False)]


def test_half_a_character_in_a_comment_spoils_nothing(make: Make):
    made = make(
        [rating(1, "A", comment="half \ud83d of it"), b"\xef\xbb\xbf" + json.dumps(rating(1, "B", "u2")).encode()]
    )
    assert made.labels == [("A", True), ("B", True)]


def test_consent_can_be_demanded(make: Make):
    votes = [rating(1, "A", "u1", consent=True), rating(1, "B", "u2")]
    assert make(votes, require_consent=True).labels == [("A", True)]


def test_a_response_id_stands_for_an_answer_that_another_event_holds(make: Make):
    later = {"event_type": "rating", "response_id": "r7", "label": -1, "user_id": "u2"}
    made = make([later, rating(0, "A", "u1", response_id="r7"), rating(1, "B", "u3")])
    assert made.texts == [("B", "A")]
    adds_up(made)


def test_events_with_one_id_are_one_event(make: Make):
    vote = rating(1, "A", "u1", event_id="e1", ts=1755000000)
    made = make([vote, vote, {**vote, "label": -1, "ts": 1755000009}])
    assert made.labels == [("A", False)]
    assert made.events["superseded"] == 2 and made.events["duplicates"] == 0
    assert make([vote, vote]).events["duplicates"] == 1
    adds_up(made)


def test_a_line_that_is_still_being_written_is_no_fault(make: Make, tmp_path: Any):
    from align_pipeline.data.feedback.report import invalid_share

    made = make([rating(1, "A"), b'{"event_type": "rat'])
    assert made.events["cut_at_end"] == 0 and invalid_share(made.report) == 0.5
    path = tmp_path / "cut.jsonl"
    path.write_bytes(json.dumps(rating(1, "A")).encode() + b'\n{"event_type": "rat')
    from align_pipeline.data.feedback.convert import convert

    (tmp_path / "cut").mkdir()
    report = convert(
        [(path, "cut")], Settings(), tmp_path / "cut", scratch=tmp_path / "s", private=tmp_path / "private", place="cut"
    )
    assert report["events"]["cut_at_end"] == 1 and invalid_share(report) == 0


def test_an_empty_log_gives_a_report_and_no_rows(make: Make):
    made = make([])
    adds_up(made)
    assert made.events["read"] == 0 and made.report["rows"] == {} and not made.pairs


def test_votes_of_one_kind_give_advice(make: Make):
    made = make([rating(1, "A", f"u{i}", f"prompt {i}") for i in range(60)])
    assert made.pairs == [] and len(made.unpaired) == 60
    assert any("no pairs" in note for note in made.report["notes"])
    assert any("all unpaired rows are liked" in note for note in made.report["notes"])


def test_a_log_of_nobody_is_a_question(make: Make):
    with pytest.raises(ConfigError, match=r"log.jsonl: no log that is known \(records have a, b\); name it"):
        make([{"a": 1, "b": 2}])
    with pytest.raises(InputError, match="is not readable"):
        make([], "log.docx")


HALF = "half \ud83d"


@pytest.mark.parametrize("key", ["conversation_id", "response_id", "event_id", "user_id", "model"])
def test_half_a_character_in_a_name_spoils_its_event_only(make: Make, key: str):
    for name in ("log.jsonl", "log.json"):
        lines = [rating(1, "A", "u2"), {**rating(1), key: HALF}]
        made = make(lines if name == "log.jsonl" else [json.dumps(lines).encode()], name)
        assert made.labels == [("A", True)]
        (first,) = made.events["invalid"]["bad_encoding"]["first"]
        assert first.startswith(f"{name}:") and f"{key}: half a character (\\ud83d), must be Unicode" in first
        adds_up(made)


def test_half_a_character_in_the_name_of_a_field_or_in_a_comparison_is_written_out(make: Make):
    sides = [{"response": "A"}, {"response": "B", "model": HALF}]
    event = {"event_type": "comparison", "prompt": "Sort", "alternatives": sides, "winner": 0}
    made = make([rating(1, "A", "u2"), {**rating(1), HALF: 1}, event])
    assert {cause: one["events"] for cause, one in made.events["invalid"].items()} == {
        "unknown_field": 1,
        "bad_encoding": 1,
    }
    chat = {"tstamp": 1755000000.5, "type": "upvote", "state": {"roles": ["U", "A"], "conv_id": HALF, "offset": 0}}
    talk = [chat | {"state": {**chat["state"], "messages": [["U", "Hi"], ["A", f"answer {i}"]]}} for i in range(2)]
    talk[0]["state"]["conv_id"] = "whole"
    made = make(talk)
    assert made.labels == [("answer 0", True)] and list(made.events["invalid"]) == ["bad_encoding"]
    assert made.events["invalid"]["bad_encoding"]["first"][0].startswith("log.jsonl:2: conversation_id: half")
    with pytest.raises(ConfigError, match=r"records have half \\ud83d"):
        make([{HALF: 1}])


def parquet(path: Path, rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(rows), path)
    return path.read_bytes()


def test_times_and_decimals_of_parquet_are_read_and_what_no_json_holds_is_named(make: Make, tmp_path: Path):
    at = datetime(2025, 8, 12, 12, 0, 10, tzinfo=UTC)
    rows = [rating(Decimal(label), f"answer {label}", ts=at, user_id=f"u{label}") for label in (1, -1)]
    made = make(parquet(tmp_path / "log.parquet", rows), "log.parquet")
    assert made.texts == [("answer 1", "answer -1")] and made.pairs[0]["fb_ts_max"] == "2025-08-12T12:00:10Z"
    odd = [{**rating(1), "reason": None}, {**rating(1), "reason": b"\xff"}]
    made = make(parquet(tmp_path / "log.parquet", odd), "log.parquet")
    assert len(made.unpaired) == 1 and made.events["invalid"]["wrong_type"]["first"] == [
        "log.parquet:2: reason: a bytes (b'\\xff'), an event holds text, numbers, lists and objects; "
        "write it so, or leave it out"
    ]
    adds_up(made)
    table = [{"q": f"q{label}", "a": "A", "stars": Decimal(label), "at": at.date()} for label in ("1.0", "5.0")]
    columns = {"prompt": "q", "response": "a", "label": "stars", "ts": "at"}
    made = make(parquet(tmp_path / "log.parquet", table), "log.parquet", columns=columns)
    assert [label for _, label in made.labels] == [False, True]


def cut(folder: Path, *lines: Any, tail: bytes = b'{"tstamp": 17', name: str = "log.jsonl") -> tuple[int, Gate]:
    """Spool a log with a last line that has no line feed; return how many last lines are told to be cut."""
    path = folder / name
    path.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines) + tail)
    gate, silent = Gate(), Counter[str]()
    canonical_lines(find_logs([(path, name)], Settings()), folder, gate, silent, lambda what, done, total: None)
    return silent["cut_at_end"], gate


def test_a_products_line_that_is_still_being_written_is_told(tmp_path: Path):
    state = {"roles": ["U", "A"], "messages": [["U", "Hi"], ["A", "Hello"]]}
    chat = {"tstamp": 1755000000.5, "type": "upvote", "state": state}
    count, gate = cut(tmp_path, chat, chat)
    assert (count, gate.first) == (1, {"bad_json": [gate.listed[0]]}) and gate.listed[0].startswith("log.jsonl:3: ")
    assert cut(tmp_path, chat, tail=b'{"tstamp": 17\n')[0] == 0
    assert cut(tmp_path, chat, tail=json.dumps(chat).encode())[0] == 0
    broken = b'{"tstamp": 17\n' + json.dumps(chat).encode()
    assert cut(tmp_path, chat, tail=broken)[0] == 0


def test_places_in_an_array_on_one_line_are_told_apart(make: Make):
    made = make([json.dumps([rating(1), {**rating(1), "label": "meh"}]).encode()], "log.json")
    assert made.events["invalid"]["unknown_rating"]["first"][0].startswith("log.json:1[1]: label: ")


def test_an_answer_that_was_cut_off_is_not_the_better_one(make: Make):
    def sides(*ends: str | None) -> list[dict[str, Any]]:
        return [{"response": f"side {at}", "finish_reason": end} for at, end in enumerate(ends)]

    asked = {"event_type": "comparison", "prompt": "Sort", "winner": 0}
    good = [
        asked | {"alternatives": sides("stop", "length")},
        asked | {"alternatives": sides(None, "length")},
        asked | {"alternatives": sides("stop", None), "finish_reason": "length"},
    ]
    bad = [
        asked | {"alternatives": sides("length", "stop")},
        asked | {"alternatives": sides(None, "stop"), "finish_reason": "length"},
        *(edit(LONG, f"{LONG} #", kind, finish_reason="length") for kind in ("edit", "demonstration", "regenerate")),
    ]
    for event in good:
        assert make([event]).texts == [("side 0", "side 1")]
    for event in bad:
        made = make([event, rating(1, "A")], regenerations=True)
        assert made.pairs == [] and made.events["dropped"] == {"error_or_unfinished": 1}
        adds_up(made)
    both = make([asked | {"winner": "both_bad", "alternatives": sides("length", "stop")}])
    assert both.labels == [("side 0", False), ("side 1", False)]


def test_a_side_of_the_arena_that_was_still_being_written_does_not_win(make: Make):
    def vote(kind: str, left: str, right: str) -> dict[str, Any]:
        talks = [[["U", "Hi"], ["A", said]] for said in (left, right)]
        states = [{"roles": ["U", "A"], "messages": talk, "offset": 0} for talk in talks]
        return {"tstamp": 1755000000.5, "type": kind, "states": states}

    made = make([vote("leftvote", "half an answ▌", "whole")])
    assert made.pairs == [] and made.events["dropped"] == {"error_or_unfinished": 1}
    assert make([vote("rightvote", "half an answ▌", "whole")]).texts == [("whole", "half an answ")]


@pytest.mark.parametrize("product", ["openwebui", "fastchat"])
def test_what_a_log_of_another_product_lacks_is_said_under_the_cause_of_all(make: Make, product: str):
    made = make([rating(1), b'{"event'], format=product)
    assert made.events["invalid"]["unknown_event_type"]["first"][0].startswith("log.jsonl:1: type: missing, ")
    assert set(made.events["invalid"]) == {"unknown_event_type", "bad_json"}
    adds_up(made)


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("1.0", 1), ("-1.0", -1), ("+1", 1), (1.0, 1), (-1.0, -1), (" 1 ", 1), ("👍\ufe0f", 1), ("👎🏽\ufe0f", -1),
        ("0", 0), ("0.0", 0), (0.0, 0), ("-0", 0), (Decimal("1.0"), 1), (Decimal(0), 0),
        ("0.5", None), ("1_0", None), ("nan", None), ("\u0661", None), (10**400, None), ([1], None),
    ],
)  # fmt: skip
def test_a_label_is_read_as_tables_and_keyboards_write_it(value: Any, label: int | None):
    if label is None:
        with pytest.raises(Bad, match="label: "):
            read_event(rating(value), Reading())
    else:
        assert read_event(rating(value), Reading()).label == label


def test_a_table_of_canonical_events_is_read(make: Make):
    made = make(
        [
            b"event_type,prompt,response,label,user_id,consent,error",
            b"rating,Sort,A,1.0,u1,True,False",
            b"rating,Sort,B,-1.0,u2,true,",
            b"rating,Sort,C,1,u3,false,",
            b"rating,Sort,D,1,u4,,TRUE",
            b"rating,Sort,E,0,u5,,false",
            b"rating,Sort,F,1,u6,maybe,",
        ],
        "log.csv",
    )
    assert made.texts == [("A", "B")] and made.events["neutral"] == 1
    assert made.events["dropped"] == {"no_consent": 1, "error_or_unfinished": 1}
    assert made.events["invalid"]["wrong_type"]["first"] == [
        "log.csv:7: consent: 'maybe', must be true or false; fix it"
    ]
    adds_up(made)


def test_a_whole_number_is_one_id_however_it_is_written(make: Make):
    votes = [rating(1, "A", user) for user in (1, 1.0, "1")]
    assert make(votes).events["duplicates"] == 2
    assert list(make([rating(1, "A", 1.5)]).events["invalid"]) == ["wrong_type"]
    sides = [{"response": "A"}, {"response": "B"}]
    for winner in ("1", 1.0, 1):
        event = {"event_type": "comparison", "prompt": "Sort", "alternatives": sides, "winner": winner}
        assert make([event]).texts == [("B", "A")]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"labels": {"x": 1}}, "labels\n.*is read with columns only; map the columns"),
        ({"rating_scale": "zero_one"}, "rating_scale\n.*is read with columns only"),
        ({"rating_scale": 1}, "rating_scale\n.*'pm1', 'zero_one', 'stars5' or 'unit'"),
        ({"actors": ()}, "actors\n.*at least 1 item"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(settings: dict[str, Any], said: str):
    with pytest.raises(ValidationError, match=said):
        Settings(**settings)
    Settings(columns={"prompt": "q"}, labels={"x": 1}, rating_scale="zero_one")
    Settings(labels={}, rating_scale=None)


NOW = 1_790_000_000.0


@pytest.mark.parametrize(
    ("ts", "seconds"),
    [
        (1_755_000_000, 1_755_000_000), (" 1755000000", 1_755_000_000), ("1755000000.5", 1_755_000_000.5),
        ("1755000000123", 1_755_000_000.123), ("1755000000123456789", 1_755_000_000.123456),
        ("2025-08-12T12:00:00Z", 1_755_000_000), (946_684_800, 946_684_800),
    ],
)  # fmt: skip
def test_a_time_is_a_date_or_a_number(ts: Any, seconds: float):
    assert read_event(rating(1, ts=ts), Reading(), NOW).at == round(seconds * 1e6)


@pytest.mark.parametrize(
    ("ts", "said"),
    [
        ("2026", "ts: '2026', must be ISO 8601 or a number since 1970; write the date and the time"),
        ("1_755_000_000", "ts: '1_755_000_000', must be ISO 8601"),
        ("\u0661\u0667\u0665\u0665\u0660\u0660\u0660\u0660\u0660\u0660", "must be ISO 8601"),
        ("\uff12026-01-31", "must be ISO 8601"), ("1e9", "must be ISO 8601"), ("nan", "must be ISO 8601"),
        ("9" * 5000, "must be ISO 8601"), (10**400, "must be ISO 8601"), (True, "must be ISO 8601"),
        (2026, "ts: 2026, lies before 2000, no log is so old; write the date and the time (2026-01-31T12:00:00Z), or"),
        (0, "lies before 2000"), (946_684_799, "lies before 2000"), ("20260131", "lies before 2000"),
        ("0001-01-01T00:00:00Z", "ts: '0001-01-01T00:00:00Z', lies before 2000"),
        ("2990-01-01T00:00:00Z", "ts: '2990-01-01T00:00:00Z', lies in the future"),
    ],
)  # fmt: skip
def test_what_is_no_time_is_said(ts: Any, said: str):
    with pytest.raises(Bad) as caught:
        read_event(rating(1, ts=ts), Reading(), NOW)
    assert caught.value.cause == "bad_timestamp" and said in caught.value.problem


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("The tag </think> closes a thought.", None),
        ("Models end a thought with </think>\nand then they answer.", None),
        ("It is closed by </think>", None),
        ("Write\n```\n<think>\nhm\n</think>\n\nanswer\n```", None),
        ("I should say hello.\n</think>\n\nHello!", "Hello!"),
        ("I should say hello.</think>\n\nHello!", "Hello!"),
        ("One must close </think> tags.\nSo:\n</think>\nUse </think>.", "Use </think>."),
        ("</think>\n\nHello!", "Hello!"),
        ("<think>no</think>Hello </think>\n\n!", "Hello </think>\n\n!"),
        ("only a thought\n</think>", ""),
    ],
)
def test_a_thought_ends_where_nothing_else_can(text: str, bare: str | None):
    assert without_reasoning(text).strip() == (text if bare is None else bare)


def test_a_model_that_is_named_by_an_address_is_not_told(make: Make):
    made = make([rating(1, "A", model="bob@example.com"), rating(-1, "B", "u2", model="m@20240620")])
    assert (made.pairs[0]["fb_model_c"], made.pairs[0]["fb_model_r"]) == ("<EMAIL_1>", "m@20240620")
    names = ["gpt-4o-2024-08-06", "claude-3-5-sonnet-20241022", "meta-llama/Llama-3.1-8B-Instruct", "qwen2.5:7b-q4_K_M"]
    assert [read_event(rating(1, model=name), Reading()).answers[0].model for name in names] == names


def notes(made: Any) -> str:
    return "\n".join(made.report["notes"])


def test_notes_say_what_is_so(make: Make):
    made = make([rating(1, "A", "u1", ts="2026-01-31T12:00:00"), rating(-1, "B", "u2")])
    assert "1 row is too few to train on; keep it to evaluate with" in notes(made)
    assert "1 time names no zone, taken as UTC" in notes(made) and "all unpaired rows" not in notes(made)
    few = [rating(1, "A", "boss", f"prompt {i}") for i in range(9)] + [rating(1, "A", "u1", "why")]
    assert "one user gave 90% of the votes; below 10 users no cap applies" in notes(make(few))
    many = few + [rating(1, "A", f"v{i}", f"question {i}") for i in range(8)]
    assert "one user gave 50% of the votes; user_share bounds the rows" in notes(make(many))


def test_rows_that_are_all_kept_for_testing_are_not_called_disliked(make: Make):
    pair = [rating(1, "A", "u1", "of ships"), rating(-1, "B", "u2", "of ships")]
    for seed in range(40):
        made = make([*pair, rating(1, "A", "u3", "why is that so")], test=0.5, seed=seed)
        assert "all unpaired rows are disliked" not in notes(made)
        if made.files["unpaired.test"]:
            return
    raise AssertionError("no seed keeps the row for testing")


def test_one_event_is_no_events(make: Make):
    from align_pipeline.data.feedback.report import lines, problems

    made = make([rating(0, "A")])
    assert next(lines(made.report)) == "1 event read, 0 used"
    assert problems(made.report, 1.0) == ["no rows from 1 event; report.md says what became of it"]
