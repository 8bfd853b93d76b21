"""Adapters: what comes of the log of each product, what is wrong with it, and where.

A fixture is a log as its product writes it, with invented words. What comes out is written short: `1 by u7: [S] Be
brief [U] Sort a list > use sort()` is a thumb up on the answer `use sort()`.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest

from align_pipeline.data.feedback.adapter import Adapter
from align_pipeline.data.feedback.adapters import ADAPTERS
from align_pipeline.data.feedback.adapters.table import table
from align_pipeline.data.feedback.events import ACTORS, BOTH_BAD, TIE, Dropped, Event, Reading, read_event
from align_pipeline.data.sources import Bad, open_source
from align_pipeline.pipeline.errors import ConfigError

FIXTURES = Path(__file__).parent / "fixtures"
READING = Reading(actors=frozenset(ACTORS))


class Files:
    """The records of some files, which can be read again."""

    def __init__(self, *paths: Path) -> None:
        self.paths = paths

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for path in self.paths:
            for line, record in open_source(path, path.name, "text"):
                yield f"{path.name}:{line}", record


def short(event: Event) -> str:
    """Return an event on one line."""
    prompt = " ".join(f"[{turn.role[0].upper()}] {turn.content}" for turn in event.prompt)
    texts = " | ".join(answer.text for answer in event.answers)
    said: object = event.type
    if event.type == "rating":
        said = event.label
    elif event.type == "comparison":
        said = {TIE: "tie", BOTH_BAD: "both bad"}.get(event.winner, event.answers[max(event.winner, 0)].text)
        said = f"best {said}"
    who = f" by {event.user}" if event.user else ""
    whose = "" if event.actor == "end_user" else f" ({event.actor})"
    return f"{said}{who}{whose}: {prompt} > {texts}" + (" (unfinished)" if event.unfinished else "")


def read(event: Any) -> str:
    """Return what an adapter's event is read as: the event, or why there is none."""
    if not isinstance(event, Bad):
        try:
            return short(read_event(event, READING))
        except Dropped as dropped:
            return f"dropped {dropped.reason}"
        except Bad as bad:
            event = bad
    return f"{event.cause}: {re.split('[,;]', event.problem)[0]}"


def told(adapter: Adapter, *names: str) -> list[tuple[str, str]]:
    """Return the address (without the product's name) and what comes of each record of some fixtures."""
    rows = Files(*(FIXTURES / name for name in names))
    return [(re.sub(r"^[a-z]+_?(\w*)\.\w+:", r"\1:", where), read(event)) for where, event in adapter.convert(rows)]


def events(name: str, *files: str) -> list[Any]:
    return [event for _, event in ADAPTERS[name].convert(Files(*(FIXTURES / file for file in files)))]


FILES: dict[str, tuple[str, ...]] = {
    "openwebui": ("openwebui.json", "openwebui_object.jsonl"),
    "librechat": ("librechat.jsonl", "librechat_messages.json", "librechat_csv.csv"),
    "langfuse": (
        "langfuse_scores.jsonl", "langfuse_traces.jsonl", "langfuse_observations.jsonl", "langfuse_blob_scores.jsonl",
    ),
    "tensorzero": (
        "tensorzero_boolean.jsonl", "tensorzero_inferences.jsonl", "tensorzero_float.jsonl",
        "tensorzero_demonstration.jsonl", "tensorzero_comment.jsonl",
    ),
    "fastchat": ("fastchat.jsonl",),
    "lmarena": ("lmarena_33k.jsonl", "lmarena_55k.csv", "lmarena_140k.jsonl"),
    "oasst": ("oasst_trees.jsonl", "oasst_flat.jsonl", "oasst_seed.json"),
    "openai-dpo": ("openai_dpo.jsonl",),
    "trl-preference": ("trl_preference.jsonl",),
    "trl-unpaired": ("trl_unpaired.jsonl",),
}  # fmt: skip
"""Product -> its fixtures."""

TOLD: dict[str, list[tuple[str, str]]] = {
    "openwebui": [
        (":2", "1 by u7: [S] Be brief [U] Sort a list [A] use sort() [U] And backwards? > sort(reverse=True)"),
        (":110", "-1 by u7: [U] Sort a list > use sort()"),
        (":211", "orphan_ref: snapshot: missing"),
        (":238", "orphan_ref: meta.message_id: 'gone'"),
        (":344", "-1 by u7: [U] Sort a list > use srt(x)"),
        (":344", "edit by u7: [U] Sort a list > use sorted(x) | use srt(x)"),
        (":413", "1 by u7: [U] Sort a list > use sorted(x)"),
        (":413", "edit by u7: [U] Sort a list > use sorted(x) | use srt(x)"),
        (":482", "best sorted(x) by u7: [U] Sort a list > sorted(x) | use sort()"),
        (":563", "best use sort() by u7: [U] Sort a list > sorted(x) | use sort() | heapq"),
        (":656", "-1 by u7: [U] Sort a list > use sort()"),
        (":749", "1 by u7: [U] Sort a list > use sort()"),
        (":842", "dropped multimodal"),
        (":916", "1 by u7: [U] Sort a list > use so (unfinished)"),
        (":983", "dropped error_or_unfinished"),
        (":1054", "retract by u7: [U] Sort a list > use sort()"),
        (":1160", "0 by u7: [U] Sort a list > use sort()"),
        (":1266", "unknown_event_type: type: 'survey'"),
        (":1372", "unknown_rating: data.rating: a number (5)"),
        (":1478", "bad_role_order: meta.message_id: a message of 'user'"),
        (":1584", "orphan_ref: parentId: 'l0'"),
        (":1652", "orphan_ref: parentId: 'lost'"),
        (":1712", "best sorted(y) by u7: [U] Sort a list > sorted(y) | use sort()"),
        ("object:1", "-1 by u7: [U] Sort a list > use sort()"),
        ("object:1", "orphan_ref: feedbacks[1].snapshot: missing"),
        ("object:1", "not_object: feedbacks[2]: 17"),
    ],
    "librechat": [
        (":1", "-1 by 64f0: [S] Be brief [U] Sort a list > use sort()"),
        (":1", "1 by 64f0: [S] Be brief [U] Sort a list > sorted(x)\n\nIt copies."),
        (":1", "1 by 64f0: [S] Be brief [U] Sort a list [A] sorted(x)\n\nIt copies. [U] Backwards? > reverse=True"),
        (":2", "-1 by 64f0: [U] Sort a list > use sort()"),
        (":2", "1 by 64f0: [U] Sort a list > sorted(x)\n\nIt copies."),
        (":2", "1 by 64f0: [U] Sort a list [A] sorted(x)\n\nIt copies. [U] Backwards? > reverse=True"),
        ("messages:2", "1 by 64f0: [U] Sort a list > use sort()"),
        ("messages:69", "orphan_ref: parentMessageId: 'lost'"),
        ("messages:89", "-1 by 64f0: [U] Sort a list > use so (unfinished)"),
        ("messages:109", "dropped error_or_unfinished"),
        ("messages:148", "dropped multimodal"),
        ("messages:167", "unknown_rating: feedback.rating: text ('meh')"),
        ("messages:185", "bad_role_order: feedback: on a message of the user"),
        ("messages:202", "dropped error_or_unfinished"),
        ("csv:2", "wrong_type: isCreatedByUser: text ('false')"),
    ],
    "langfuse": [
        ("scores:15", "orphan_ref: traceId: missing"),
        ("scores:1", "-1 by u7: [S] Be brief [U] Sort a list > use sort()"),
        ("scores:6", "-1 by u7: [S] Be brief [U] Sort a list > use sort()"),
        ("scores:8", "ambiguous_zero: value: 0 of 'quality'"),
        ("scores:10", "edit by ann (annotator): [S] Be brief [U] Sort a list > sorted(x) | use sort()"),
        ("scores:20", "unknown_value: source: 'IMPORT'"),
        ("blob_scores:1", "1 by u7: [S] Be brief [U] Sort a list > use sort()"),
        ("scores:2", "1 by u7: [U] Sort a list > sorted(x)"),
        ("scores:3", "1 (model): [U] Sort a list > sorted(x)"),
        ("scores:7", "0 by u7: [U] Sort a list > sorted(x)"),
        ("scores:9", "unknown_rating: value: 0.7 of 'quality'"),
        ("scores:11", "unknown_rating: dataType: 'TEXT' named 'note'"),
        ("scores:4", "-1 by ann (annotator): [U] Sort a list > bubble sort"),
        ("scores:5", "unknown_rating: stringValue: text ('so so')"),
        ("blob_scores:2", "1 by u7: [U] Sort a list > bubble sort"),
        ("scores:16", "missing_prompt: input: an object ({'a': 1"),
        ("scores:17", "missing_response: output: an object ({'steps': [1"),
        ("scores:18", "1 by u7: [U] Sort a list > use sort()"),
        ("scores:19", "missing_prompt: input: null (None)"),
        ("scores:21", "missing_prompt: input: an object ({'question': 'Sort a list'"),
        ("scores:22", "missing_response: output: an object ({'answer': 'yes'"),
        ("scores:13", "1 by u7: [U] Sort a list > use sort()"),
        ("scores:12", "orphan_ref: traceId: 'gone'"),
        ("scores:14", "orphan_ref: observationId: 'o9'"),
    ],
    "tensorzero": [
        ("float:1", "no_direction: value: 0.3 of 'rating'"),
        ("comment:1", "comment: value: a comment"),
        ("boolean:1", '1 by u7: [S] Be brief [U] {"topic":"Äpfel"} > a haiku'),
        ("boolean:2", '-1 by u8: [S] Be brief [U] {"topic":"Äpfel"} > a haiku'),
        ("boolean:4", "-1 (model): [U] Hi [A] Hello [U] Sort a list > use sort()"),
        ("boolean:5", "1 (annotator): [U] Hi [A] Hello [U] Sort a list > use sort()"),
        ("demonstration:1", "demonstration: [U] Hi [A] Hello [U] Sort a list > sorted(x) | use sort()"),
        ("demonstration:2", 'demonstration: [S] {"name":"Bo"} [U] Who? > {"name":"Ann"} | {"name": "Bo"}'),
        ("boolean:7", "dropped tool_calls"),
        ("boolean:8", "missing_prompt: input: text ('\"nothing\"')"),
        ("boolean:3", "orphan_ref: target_id: '0195c498-71c4-7b72-804b-0000000000e2'"),
        ("boolean:6", "orphan_ref: target_id: 'gone'"),
        ("demonstration:3", "orphan_ref: inference_id: 'gone'"),
    ],
    "fastchat": [
        (":2", "1 by 10.0.0.1: [U] Sort a list > use sort()"),
        (":3", "-1 by 10.0.0.1: [U] Hi [A] Hello [U] Sort a list > use so (unfinished)"),
        (":4", "best use sort() by 10.0.0.1: [U] Sort a list > use sort() | list.reverse()"),
        (":5", "best list.reverse() by 10.0.0.1: [U] Sort a list > use sort() | list.reverse()"),
        (":6", "best tie by 10.0.0.1: [U] Sort a list > use sort() | list.reverse()"),
        (":7", "best both bad by 10.0.0.1: [U] Sort a list > use sort() | list.reverse()"),
        (":8", "diverged_context: states[1]: goes another way than states[0] before its last answer"),
        (":9", "best a by 10.0.0.1: [U] Hi [A] Hello [U] Sort > a | b"),
        (":10", "unknown_event_type: type: 'flag'"),
        (":11", "missing_response: state.messages: the last one is no answer"),
        (":12", "dropped error_or_unfinished"),
        (":13", "dropped multimodal"),
        (":14", "missing_response: states: [{'template_name': 'v'"),
    ],
    "lmarena": [
        ("33k:1", "best use sort() by arena_user_1: [U] Sort a list > use sort() | list.reverse()"),
        ("33k:2", "best list.reverse() by arena_user_1: [U] Sort a list > use sort() | list.reverse()"),
        ("33k:3", "best tie by arena_user_1: [U] Sort a list > use sort() | list.reverse()"),
        ("33k:4", "best both bad by arena_user_1: [U] Sort a list > use sort() | list.reverse()"),
        ("33k:5", "unknown_rating: winner: 'nobody'"),
        ("33k:6", "diverged_context: conversation_b: goes another way than conversation_a before its last answer"),
        ("33k:7", "best b by arena_user_1: [U] Hi [A] Hello [U] Sort > a | b"),
        ("33k:8", "missing_response: conversation_a: the last turn is no answer"),
        ("33k:9", "best use sort() by arena_user_1: [U] Sort a list > use sort() | list.reverse()"),
        ("55k:2", "best list.reverse(): [U] Sort a list > use sort() | list.reverse()"),
        ("55k:3", "diverged_context: response_b: goes another way than response_a before its last answer"),
        ("55k:4", "missing_response: alternatives[0].response: missing"),
        ("55k:5", "unknown_rating: winner: winner_model_a '0'"),
        ("55k:6", "missing_response: response_a: 1 answers to 2 prompts"),
        ("140k:1", "best use sort(): [U] Sort a list > use sort() | list.reverse()"),
        ("140k:2", "best both bad: [U] Sort [A] same [U] And now? > c | d"),
        ("140k:3", "diverged_context: conversation_b: goes another way than conversation_a before its last answer"),
        ("140k:4", "dropped multimodal"),
    ],
    "oasst": [
        ("trees:1", "best sorted(x) (annotator): [U] Sort a list > sorted(x) | no"),
        ("trees:1", "best use sort() (annotator): [U] Sort a list > use sort() | bubble"),
        (
            "trees:1",
            "best It is a new list. (annotator): [U] Sort a list [A] sorted(x) [U] Why? > It is a new list. | Because.",
        ),
        ("trees:2", "deleted: deleted: true on 'c2'"),
        ("trees:2", "not_reviewed: review_result: false on 'c3'"),
        ("trees:2", "unranked: rank: missing on 'c4'"),
        ("trees:2", "best Hello (annotator): [U] Hi > Hello | Go away"),
        ("trees:4", "unranked: rank: 0 on 'e1' and 'e2'"),
        ("trees:5", "deleted: deleted: true on 'p8'"),
        ("trees:5", "deleted: deleted: true on 'p8'"),
        ("flat:3", "best sorted(x) (annotator): [U] Sort a list > sorted(x) | use sort()"),
        ("flat:5", "best Because. (annotator): [U] Sort a list [A] sorted(x) [U] Why? > Because. | It is new."),
        ("flat:6", "orphan_ref: parent_id: 'lost'"),
        ("flat:7", "orphan_ref: parent_id: 'lost'"),
        ("seed:9", "unranked: rank: missing on 'm2'"),
        ("seed:16", "unranked: rank: missing on 'm3'"),
    ],
    "openai-dpo": [
        ("dpo:1", "best sorted(x): [U] Sort a list > sorted(x) | bubble"),
        ("dpo:2", "missing_response: preferred_output: a list ([{'role': 'assistant'"),
        ("dpo:3", "missing_prompt: input.messages: 'Sort'"),
    ],
    "trl-preference": [
        ("preference:1", "best sorted(x): [U] Sort a list > sorted(x) | bubble"),
        ("preference:2", "best sorted(x): [U] Sort a list > sorted(x) | bubble"),
        ("preference:3", "best sorted(x): [U] Sort a list > sorted(x) | bubble"),
        ("preference:4", "diverged_context: rejected: goes another way than chosen before its last answer"),
        ("preference:5", "missing_prompt: prompt: missing"),
        ("preference:6", "best sorted(x): [U] Sort a list > sorted(x) | bubble"),
        ("preference:7", "missing_response: chosen: a list ([{'role': 'user'"),
        ("preference:8", "best Human: a\n\nAssistant: b: [U] Go on > Human: a\n\nAssistant: b | no"),
    ],
    "trl-unpaired": [
        ("unpaired:1", "1: [U] Sort a list > sorted(x)"),
        ("unpaired:2", "-1: [U] Sort a list > bubble"),
        ("unpaired:3", "-1: [U] Sort a list > x"),
        ("unpaired:4", "unknown_rating: label: a number (0.5)"),
        ("unpaired:5", "unknown_rating: label: missing"),
    ],
}
"""Product -> address and what comes of it, of all its fixtures, in the order in which it comes."""


def test_every_product_has_fixtures() -> None:
    assert FILES.keys() == TOLD.keys() == ADAPTERS.keys() - {"events"}


@pytest.mark.parametrize("name", TOLD)
def test_a_log_gives_its_events_and_says_what_is_wrong_with_the_rest(name: str) -> None:
    assert told(ADAPTERS[name], *FILES[name]) == TOLD[name]


@pytest.mark.parametrize("name", FILES)
def test_a_problem_begins_with_its_field_and_ends_with_a_remedy(name: str) -> None:
    for event in events(name, *FILES[name]):
        if isinstance(event, Bad):
            assert re.fullmatch(r"[\w.\[\]]+: .+[;,] [^;]+", event.problem), event.problem
            assert re.fullmatch("[a-z_]+", event.cause)


OTHERS = ("table.csv", "labelstudio.json", "argilla.jsonl", "chainlit.jsonl", "gradio_log.csv")


@pytest.mark.parametrize("name", FILES)
def test_a_log_is_recognised_as_its_own_and_no_others(name: str) -> None:
    for where, record in Files(*(FIXTURES / file for file in FILES[name])):
        assert [one.name for one in ADAPTERS.values() if one.recognise(record)] == [name], where


def test_other_tables_and_canonical_events_are_nobodys_product() -> None:
    for where, record in Files(*(FIXTURES / file for file in OTHERS)):
        if not isinstance(record, Bad):
            assert not any(one.recognise(record) for one in ADAPTERS.values()), where
    for name in FILES:
        for event in events(name, *FILES[name]):
            if not isinstance(event, Bad):
                assert [one.name for one in ADAPTERS.values() if one.recognise(event)] == ["events"]


@pytest.mark.parametrize("name", FILES)
def test_files_may_come_in_any_order(name: str) -> None:
    told_so = sorted(told(ADAPTERS[name], *FILES[name]))
    for order in itertools.permutations(FILES[name]):
        assert sorted(told(ADAPTERS[name], *order)) == told_so


JUNK: list[Any] = [None, 0, 1, -1, 2.5, True, "", "x", "{", [], {}, [1], [[]], [{}], {"a": 1}, [None, None]]


def broken(value: Any, rng: random.Random) -> Any:
    """Return a copy of a record in which one value, however deep, is another."""
    if type(value) in (dict, list) and value and rng.random() < 0.85:
        copy = value.copy()
        key = rng.choice(list(copy)) if type(value) is dict else rng.randrange(len(copy))
        copy[key] = broken(value[key], rng)
        return copy
    return rng.choice(JUNK)


@pytest.mark.parametrize("name", FILES)
def test_nothing_in_a_log_makes_an_adapter_fail(name: str) -> None:
    rows = list(Files(*(FIXTURES / file for file in FILES[name])))
    rng = random.Random(name)
    for _ in range(150):
        spoiled = [(where, broken(record, rng) if rng.random() < 0.5 else record) for where, record in rows]
        spoiled.append(("x:1", Bad("broken JSON; fix it", "broken JSON")))
        found = [read(event) for _, event in ADAPTERS[name].convert(spoiled)]
        assert found.count("broken JSON: broken JSON") == 1


# What stands in an event besides its texts.

A_LIST = [{"role": "user", "content": "Sort a list"}]
WHOLE: list[tuple[str, int, dict[str, Any]]] = [
    ("openwebui", 5, {
        "event_id": "f5:edit", "event_type": "edit", "ts": 1755000020, "user_id": "u7", "conversation_id": "c-f5",
        "prompt": A_LIST, "response": "use sorted(x)", "original_response": "use srt(x)", "model": "m-a",
    }),
    ("openwebui", 8, {
        "event_id": "f7", "event_type": "comparison", "ts": 1755000020, "user_id": "u7", "conversation_id": "c-f7",
        "prompt": A_LIST, "winner": 0,
        "alternatives": [{"response": "sorted(x)", "model": "m-y"}, {"response": "use sort()", "model": "m-x"}],
    }),
    ("librechat", 6, {
        "event_id": "a9", "event_type": "rating", "label": 1, "ts": "1785578405000", "user_id": "64f0",
        "conversation_id": "k2", "prompt": A_LIST, "response": "use sort()", "model": "m-a",
    }),
    ("langfuse", 21, {
        "event_id": "s13", "event_type": "rating", "label": 1, "ts": "2026-08-01T10:00:03.000Z", "actor": "end_user",
        "user_id": "u7", "conversation_id": "chat9", "prompt": "Sort a list", "response": "use sort()", "model": "m-a",
    }),
    ("tensorzero", 3, {
        "event_id": "0193fb9e-2007-7e60-97af-8b469d9edd02", "event_type": "rating", "label": -1, "ts": 1735093264391,
        "user_id": "u8", "conversation_id": "0195c498-71c4-7b72-804b-0000000000e1", "model": "v1",
        "prompt": [
            {"role": "system", "content": "Be brief"},
            {"role": "user", "content": [{"type": "text", "text": '{"topic":"Äpfel"}'}]},
        ],
        "response": [{"type": "text", "text": "a haiku"}],
    }),
    ("fastchat", 2, {
        "event_type": "comparison", "ts": 1755000000.1234, "user_id": "10.0.0.1", "conversation_id": "ab1",
        "prompt": A_LIST, "winner": 0,
        "alternatives": [{"response": "use sort()", "model": "m-a"}, {"response": "list.reverse()", "model": "m-b"}],
    }),
    ("lmarena", 0, {
        "event_id": "q0", "event_type": "comparison", "ts": 1755000000.5, "user_id": "arena_user_1",
        "prompt": A_LIST, "winner": 0,
        "alternatives": [{"response": "use sort()", "model": "m-a"}, {"response": "list.reverse()", "model": "m-b"}],
    }),
    ("oasst", 0, {
        "event_id": "a1>a4", "event_type": "comparison", "actor": "annotator", "conversation_id": "p1",
        "prompt": A_LIST, "winner": 0,
        "alternatives": [
            {"response": "sorted(x)", "position": None}, {"response": "no", "model": "m-a", "position": None},
        ],
    }),
]  # fmt: skip


@pytest.mark.parametrize(("name", "index", "whole"), WHOLE, ids=[f"{name}-{index}" for name, index, _ in WHOLE])
def test_an_event_says_who_when_and_of_which_model(name: str, index: int, whole: dict[str, Any]) -> None:
    assert events(name, *FILES[name])[index] == whole


@pytest.mark.parametrize("name", FILES)
def test_ids_are_one_to_an_event_and_the_same_again(name: str) -> None:
    ids = [event.get("event_id") for event in events(name, *FILES[name]) if not isinstance(event, Bad)]
    again = [event.get("event_id") for event in events(name, *FILES[name]) if not isinstance(event, Bad)]
    assert ids == again
    # These two hold one conversation twice, written in two ways.
    twice = {"librechat": 3, "openwebui": 1}.get(name, 0)
    assert len(set(ids) - {None}) == len([one for one in ids if one]) - twice


def test_a_numeric_score_has_a_direction_only_where_one_of_its_name_is_below_zero() -> None:
    trace = {"id": "t", "input": "Hi", "output": "Hello", "sessionId": None, "userId": "u"}

    def scored(*values: float) -> list[str]:
        scores = [
            {"id": f"s{index}", "name": "n", "dataType": "NUMERIC", "value": value, "source": "API", "traceId": "t"}
            for index, value in enumerate(values)
        ]
        rows = [(f"x:{index}", record) for index, record in enumerate([trace, *scores])]
        return [read(event).split(" ")[0] for _, event in ADAPTERS["langfuse"].convert(rows)]

    assert scored(-1, 0, 1) == ["-1", "0", "1"]
    assert scored(0, 1) == ["ambiguous_zero:"] * 2
    assert scored(1, 1) == ["ambiguous_zero:"] * 2
    assert scored(1, 5) == ["ambiguous_zero:", "unknown_rating:"]
    assert scored(-1, 0.5) == ["unknown_rating:"] * 2


@pytest.mark.parametrize(
    ("name", "time"),
    [
        ("0193fb9e-2007-7e60-97af-8b469d9edd45", 1735093264391),
        ("0193fb9e-2007-4e60-97af-8b469d9edd45", None),
        ("7", None),
    ],
)
def test_the_time_of_feedback_is_in_its_id_where_that_is_a_uuid_of_version_7(name: str, time: int | None) -> None:
    ids = {"function_name": "f", "variant_name": "v", "episode_id": "e"}
    inference = {**ids, "id": "i", "input": '{"messages":[]}', "output": "[]"}
    feedback = {"id": name, "target_id": "i", "metric_name": "m", "value": True}
    ((_, event),) = ADAPTERS["tensorzero"].convert([("x:1", inference), ("x:2", feedback)])
    assert not isinstance(event, Bad) and event.get("ts") == time


def test_a_score_of_an_observation_is_one_of_its_trace_where_no_observation_is_given() -> None:
    found = dict(told(ADAPTERS["langfuse"], "langfuse_scores.jsonl", "langfuse_traces.jsonl"))
    assert found["scores:13"] == "1 by u7: [U] the whole agent > done"
    assert dict(TOLD["langfuse"])["scores:14"] == "orphan_ref: observationId: 'o9'"


@pytest.mark.parametrize(
    ("name", "shown"),
    [("openwebui", True), ("fastchat", True), ("lmarena", True), ("oasst", False), ("openai-dpo", False),
     ("trl-preference", False)],
)  # fmt: skip
def test_answers_have_places_only_where_they_were_shown_side_by_side(name: str, shown: bool) -> None:
    found: list[Event] = []
    for event in events(name, *FILES[name]):
        if not isinstance(event, Bad) and event["event_type"] == "comparison":
            with contextlib.suppress(Bad, Dropped):
                found.append(read_event(event, READING))
    places = [[answer.position for answer in event.answers] for event in found]
    assert places and all(one == (list(range(len(one))) if shown else [None] * len(one)) for one in places)


def test_a_table_of_parquet_gives_times_and_lists_as_python_has_them(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    rows = [json.loads(line) for line in (FIXTURES / "lmarena_140k.jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        row.pop("conv_metadata"), row.pop("category_tag")
    table_of_rows = pyarrow.Table.from_pylist(rows)
    index = table_of_rows.schema.get_field_index("timestamp")
    times = table_of_rows.column("timestamp").cast(pyarrow.timestamp("us"))
    write_table(table_of_rows.set_column(index, "timestamp", times), tmp_path / "lmarena_140k.parquet")
    found = [read(event) for _, event in ADAPTERS["lmarena"].convert(Files(tmp_path / "lmarena_140k.parquet"))]
    assert found == [said for where, said in TOLD["lmarena"] if where.startswith("140k")]


# Anyone's table.

COLUMNS = {"prompt": "question", "response": "answer", "label": "stars", "user_id": "who", "ts": "at"}


def test_a_table_is_read_through_its_columns() -> None:
    assert told(table(COLUMNS), "table.csv") == [
        (":2", "1 by u1: [U] Sort a list > sorted(x)"),
        (":3", "-1 by u2: [S] Be brief [U] Sort a list > bubble"),
        (":4", "0 by u3: [U] Sort a list > use sort()"),
        (":5", "missing_response: response: missing"),
        (":6", "unknown_rating: stars: missing"),
    ]


def rows_of(*records: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(f"t:{index}", record) for index, record in enumerate(records, 1)]


def said(adapter: Adapter, *records: dict[str, Any]) -> list[str]:
    return [read(event) for _, event in adapter.convert(rows_of(*records))]


ROW = {"q": "Hi", "a": "Hello", "b": "Go away", "r": 1}
TABLES: list[tuple[str, dict[str, str], dict[str, Any], list[str]]] = [
    ("pair", {"prompt": "q", "chosen": "a", "rejected": "b"}, {}, ["best Hello: [U] Hi > Hello | Go away"]),
    ("edit", {"prompt": "q", "response": "a", "original_response": "b"}, {}, ["edit: [U] Hi > Hello | Go away"]),
    ("system", {"prompt": "q", "response": "a", "label": "r", "system": "b"}, {"scale": "zero_one"},
     ["1: [S] Go away [U] Hi > Hello"]),
    ("word", {"prompt": "q", "response": "a", "label": "b"}, {"labels": {"Go away": -1}}, ["-1: [U] Hi > Hello"]),
    ("number", {"prompt": "q", "response": "a", "label": "r"}, {"labels": {"1": -1}}, ["-1: [U] Hi > Hello"]),
    ("unknown word", {"prompt": "q", "response": "a", "label": "b"}, {"labels": {"x": 1}},
     ["unknown_rating: b: text ('Go away')"]),
    ("no such column", {"prompt": "q", "response": "aa", "label": "r"}, {"scale": "zero_one"},
     ["missing_field: aa: no such column"]),
    ("no answer in it", {"prompt": "q", "label": "r"}, {"scale": "zero_one"}, ["missing_response: q: 'Hi'"]),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "more", "found"), [one[1:] for one in TABLES], ids=[one[0] for one in TABLES])
def test_a_row_says_what_its_columns_mean(columns: dict[str, str], more: dict[str, Any], found: list[str]) -> None:
    assert said(table(columns, **more), ROW) == found


def test_a_column_that_is_missing_everywhere_is_told_with_the_nearest_one() -> None:
    adapter = table({"prompt": "q", "response": "a", "label": "r", "user_id": "usr"}, "zero_one")
    ((_, bad),) = adapter.convert(rows_of({**ROW, "user": "u1"}))
    assert isinstance(bad, Bad)
    assert bad.problem == "usr: no such column, user_id is mapped to it; did you mean user?"
    assert said(adapter, ROW, {**ROW, "usr": "u1"}) == ["1: [U] Hi > Hello", "1 by u1: [U] Hi > Hello"]


def test_a_conversation_may_hold_its_answer() -> None:
    talk = [*A_LIST, {"role": "assistant", "content": "use sort()"}]
    assert said(table({"prompt": "m", "label": "r"}), {"m": talk, "r": True}, {"m": json.dumps(talk), "r": False}) == [
        "1: [U] Sort a list > use sort()",
        "-1: [U] Sort a list > use sort()",
    ]


@pytest.mark.parametrize("consent", ["false", "FALSE", False])
def test_consent_may_be_a_word(consent: object) -> None:
    adapter = table({"prompt": "q", "response": "a", "label": "r", "consent": "ok"}, "zero_one")
    assert said(adapter, {**ROW, "ok": consent}) == ["dropped no_consent"]


def test_the_scale_is_found_or_asked_for() -> None:
    columns = {"prompt": "q", "response": "a", "label": "r"}

    def scaled(*values: Any, **more: Any) -> list[str]:
        return [line.split(":")[0] for line in said(table(columns, **more), *({**ROW, "r": one} for one in values))]

    assert scaled(0, 1) == ["-1", "1"]
    assert scaled("-1", "0", "1") == ["-1", "0", "1"]
    assert scaled("like", "dislike") == ["1", "-1"]
    assert scaled(1, 1, scale="stars5") == ["-1", "-1"]
    with pytest.raises(ConfigError) as caught:
        scaled(1, 1)
    assert caught.value.problems == (
        "r: the ratings are 1, which tells no scale; pass rating_scale: one of pm1, zero_one, stars5, unit",
    )


@pytest.mark.parametrize(
    ("columns", "labels", "problems"),
    [
        ({"prompt": "q", "respnse": "a", "label": "r"}, {}, ["columns.respnse: no such field; did you mean response?"]),
        ({"response": "a", "label": "r"}, {}, ["columns.prompt: missing, an answer needs what it answers; map it"]),
        ({"prompt": "q", "response": "a"}, {}, [
            "columns: nothing says what was thought of the answers; "
            "map one of label (a rating), chosen (a comparison), original_response (an edit)"
        ]),
        ({"prompt": "q", "response": "a", "label": "r", "original_response": "b"}, {}, [
            "columns: label and original_response are mapped; "
            "map one of label (a rating), chosen (a comparison), original_response (an edit)"
        ]),
        ({"prompt": "q", "chosen": "a"}, {}, ["columns: a comparison needs chosen and rejected; map both"]),
        ({"prompt": "q", "label": "r"}, {"good": 2}, ["labels.good: 2, must be 1, -1 or 0"]),
    ],
)  # fmt: skip
def test_a_mapping_that_says_no_event_is_refused(
    columns: Mapping[str, str], labels: Mapping[str, int], problems: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        table(columns, labels=labels)
    assert list(caught.value.problems) == problems


# What the recipes say.


def test_label_studio_is_a_table_of_columns_inside_others() -> None:
    columns = {
        "prompt": "data.prompt",
        "response": "data.answer",
        "label": "annotations.0.result.0.value.choices.0",
        "user_id": "annotations.0.completed_by",
        "ts": "annotations.0.created_at",
    }
    assert [
        said for _, said in told(table(columns, labels={"good": 1, "poor": -1, "unsure": 0}), "labelstudio.json")
    ] == [
        "1 by 2: [U] Sort a list > answer 1",
        "-1 by 2: [U] Sort a list > answer 2",
        "0 by 2: [U] Sort a list > answer 3",
    ]


def test_argilla_is_a_table_whose_names_have_dots() -> None:
    columns = {
        "prompt": "prompt",
        "response": "response",
        "label": "rating.responses.0",
        "user_id": "rating.responses.users.0",
    }
    assert [said for _, said in told(table(columns), "argilla.jsonl")] == [
        "1 by u1: [U] Sort a list > sorted(x)",
        "-1 by u2: [U] Sort a list > bubble",
        "unknown_rating: rating.responses.0: missing",
    ]


def test_chainlit_is_a_table_whose_zero_is_down() -> None:
    columns = {
        "prompt": "prompt", "response": "output", "label": "value", "conversation_id": "threadId", "user_id": "userId",
        "event_id": "id",
    }  # fmt: skip
    assert [said for _, said in told(table(columns, "zero_one"), "chainlit.jsonl")] == [
        "-1 by u1: [U] Sort a list > bubble",
        "1 by u2: [U] Sort a list > sorted(x)",
    ]


GRADIO = (Path(__file__).parents[3] / "docs" / "feedback.md").read_text("utf-8").split("```python\n")[1].split("```")[0]
"""The recipe of the docs: what Gradio's log.csv holds as canonical events."""


def test_gradios_log_is_no_table_and_its_recipe_makes_events_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [record for _, record in Files(FIXTURES / "gradio_log.csv")]
    assert [read(record) for record in rows] == ["broken table: 4 cells in a row"] * 3
    monkeypatch.setattr("sys.argv", ["gradio.py", str(FIXTURES / "gradio_log.csv")])
    exec(GRADIO, {})
    (tmp_path / "events.jsonl").write_text(capsys.readouterr().out, "utf-8")
    found = [read(event) for _, event in ADAPTERS["events"].convert(Files(tmp_path / "events.jsonl"))]
    assert found == [
        "-1: [U] Sort a list > =SORT(A1:A9)",
        "1: [U] Sort a list [A] =SORT(A1:A9) [U] Why? > Because,-like all of them.",
        "unknown_rating: label: text ('Spam')",
    ]


# Real files, read by hand too.

SHARED = Path(__file__).parents[4] / "shared" / "data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of real files, ../shared/data, is not here")


def counts(adapter: Adapter, *files: str) -> dict[str, int]:
    """Return how often each kind of result comes of real files: ratings by actor, causes."""
    found: dict[str, int] = {}
    for _, event in adapter.convert(Files(*(SHARED / file for file in files))):
        if isinstance(event, Bad):
            key = event.cause
        else:
            try:
                one = read_event(event, READING)
                key = f"{one.type} {one.label} {one.actor}" if one.type == "rating" else one.type
            except Dropped as dropped:
                key = f"dropped {dropped.reason}"
        found[key] = found.get(key, 0) + 1
    return found


def json_lines(file: str) -> list[Any]:
    return [json.loads(line) for line in (SHARED / file).read_text("utf-8").splitlines()]


@real
def test_a_real_export_of_open_webui() -> None:
    file = "feedback/openwebui_feedback_export_anonymised.json"
    by_hand: dict[str, int] = {}
    texts = []
    for row in json.loads((SHARED / file).read_text("utf-8")):
        messages = row["snapshot"]["chat"]["chat"]["history"]["messages"]
        path = [messages[row["meta"]["message_id"]]]
        while path[0]["parentId"]:
            path.insert(0, messages[path[0]["parentId"]])
        key = f"rating {row['data']['rating']} end_user"
        if any(one.get("files") for one in path):
            key = "dropped multimodal"
        else:
            texts.append([normalize("NFC", one["content"]).strip() for one in path])
        by_hand[key] = by_hand.get(key, 0) + 1
    assert counts(ADAPTERS["openwebui"], file) == by_hand
    assert by_hand == {"rating 1 end_user": 28, "rating -1 end_user": 19, "dropped multimodal": 1}
    found = []
    for _, event in ADAPTERS["openwebui"].convert(Files(SHARED / file)):
        assert not isinstance(event, Bad)
        if event["event_id"] and all(type(turn["content"]) is str for turn in event["prompt"]):
            one = read_event(event, READING)
            found.append([*(turn.content for turn in one.prompt), one.answers[0].text])
    assert found == texts


@real
def test_real_tables_of_tensorzero() -> None:
    folder = "feedback/tensorzero"
    names = ("boolean_metric_feedback", "demonstration_feedback", "float_metric_feedback", "chat_inference")
    boolean, demonstrations, floats, inferences = (json_lines(f"{folder}/{name}_examples.jsonl") for name in names)
    known = {row[key] for row in inferences for key in ("id", "episode_id")}
    by_hand: dict[str, int] = {"no_direction": len(floats), "demonstration": 0}
    for row in boolean:
        assert row["target_id"] in known
        actor = "model" if row["metric_name"].startswith("tensorzero::evaluation") else "end_user"
        key = f"rating {1 if row['value'] else -1} {actor}"
        by_hand[key] = by_hand.get(key, 0) + 1
    by_hand["demonstration"] = sum(row["inference_id"] in known for row in demonstrations)
    assert counts(ADAPTERS["tensorzero"], *(f"{folder}/{name}_examples.jsonl" for name in names)) == by_hand
    assert by_hand == {
        "no_direction": 576, "demonstration": 494, "rating 1 end_user": 89, "rating -1 end_user": 477,
        "rating 1 model": 15, "rating -1 model": 437,
    }  # fmt: skip


@real
def test_real_trees_and_a_real_flat_list_of_open_assistant() -> None:
    pairs = 0
    waiting = [row["prompt"] for row in json_lines("pref/oasst_en_100_tree.jsonl")]
    while waiting:
        message = waiting.pop()
        waiting += message["replies"]
        ranked = [one for one in message["replies"] if one["role"] == "assistant" and one.get("rank") is not None]
        pairs += len(ranked) // 2
    assert counts(ADAPTERS["oasst"], "pref/oasst_en_100_tree.jsonl") == {"comparison": pairs} == {"comparison": 152}
    rows = json.loads((SHARED / "feedback/oasst_realistic_seed_data.json").read_text("utf-8"))
    answered = [row["parent_message_id"] for row in rows if row["role"] == "assistant"]
    beside = sum(answered.count(parent) > 1 for parent in answered if parent)
    found = counts(ADAPTERS["oasst"], "feedback/oasst_realistic_seed_data.json")
    assert found == {"unranked": beside} == {"unranked": 161}


VERDICTS = {"1_full_compliance": 1, "2_full_refusal": -1, "3_partial_refusal": 0}


@real
@pytest.mark.parametrize("model", ["gpt4", "llama2new", "llama2orig", "mistralguard", "mistralinstruct"])
def test_real_tables_with_words_of_their_own(model: str) -> None:
    file = f"feedback/xstest/xstest_v2_completions_{model}.csv"
    columns = {"prompt": "prompt", "response": "completion", "label": "final_label", "event_id": "id"}
    by_hand: dict[str, int] = {}
    for row in csv.DictReader(io.StringIO((SHARED / file).read_text("utf-8"), newline="")):
        key = f"rating {VERDICTS[row['final_label']]} end_user"
        by_hand[key] = by_hand.get(key, 0) + 1
    assert counts(table(columns, labels=VERDICTS), file) == by_hand and sum(by_hand.values()) == 229


@real
def test_real_preference_and_unpaired_data() -> None:
    assert counts(ADAPTERS["trl-preference"], "pref/tulu3_preference_sample_100.jsonl") == {
        "comparison": len(json_lines("pref/tulu3_preference_sample_100.jsonl"))
    }
    dialogues = counts(ADAPTERS["trl-preference"], "pref/hh_harmless_base_test.jsonl.gz")
    assert dialogues == {"comparison": 1183, "bad_role_order": 5, "missing_response": 2}
    rows = json.loads((SHARED / "pref/lf_kto_en_demo.json").read_text("utf-8"))
    ups = sum(row["label"] for row in rows)
    assert not any(one.recognise(rows[0]) for one in ADAPTERS.values())
    talk = counts(table({"prompt": "messages", "label": "label"}), "pref/lf_kto_en_demo.json")
    assert talk == {"rating 1 end_user": ups, "rating -1 end_user": len(rows) - ups}


@real
def test_no_other_real_file_is_taken_for_a_products_log() -> None:
    products = {
        "openwebui_feedback_export_anonymised.json": "openwebui", "oasst_realistic_seed_data.json": "oasst",
        "oasst_en_100_tree.jsonl": "oasst", "tulu3_preference_sample_100.jsonl": "trl-preference",
        "hh_harmless_base_test.jsonl.gz": "trl-preference",
    }  # fmt: skip
    folders = [*SHARED.glob("sft/*"), *SHARED.glob("pref/*"), *SHARED.glob("feedback/**/*"), *SHARED.glob("text/*")]
    for path in folders:
        if path.is_file() and path.suffix != ".toml":
            name = "tensorzero" if path.parent.name == "tensorzero" else products.get(path.name)
            for _, record in itertools.islice(open_source(path, path.name, "text"), 100):
                found = [one.name for one in ADAPTERS.values() if one.recognise(record)]
                assert found == ([name] if name else []), path
