"""The short ways of reading: what they say is what the long ones say, or they say nothing."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align_pipeline.data.feedback.events import DAY, Dropped, Reading, read_event
from align_pipeline.data.feedback.index import Marker
from align_pipeline.data.feedback.keys import user_hash
from align_pipeline.data.feedback.lines import UNKNOWN, Piece, lines_of, parse
from align_pipeline.data.feedback.plain import plain_row
from align_pipeline.data.json_text import Strict
from align_pipeline.data.sources import Bad

SECRET = b"secret"
PLACE = (1, 2, 3, 4, 5)
EXAMPLES = [pytest.param(150, id="a-few"), pytest.param(3_000, id="many", marks=pytest.mark.slow)]

texts = st.one_of(
    st.sampled_from(
        ["a", " a\r\nb ", "", "<think>x</think>y", "1 < 2", "e\u0301", "\u200b" * 4, "x" * 2**18 + "y", "a>"]
    ),
    st.text(max_size=8),
)
odd = st.sampled_from([None, "", 0, 1, 1.0, -1, True, [], {}, "x", "\ud800", "é", "x" * 513, ["a"], {"content": "a"}])
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "user", "assistant", "system", "developer", "tool"]), "content": texts},
    optional={"name": odd},
)


def talk(first: str, *rest: str) -> list[dict[str, str]]:
    turns = [{"role": role, "content": f"{role}\r\n"} for role in rest]
    return [{"role": first, "content": " hello"}, *turns]


usual = st.fixed_dictionaries(
    {
        "event_type": st.just("rating"),
        "prompt": st.sampled_from(["why?", " é\r\n<b> ", talk("user"), talk("system", "user", "assistant", "user")]),
        "response": st.sampled_from(["because", "<think>why</think>because", " \u00e4\r", "x" * 2000]),
        "label": st.sampled_from([1, 0, -1]),
        "ts": st.sampled_from([1755000000, 946684800]),
    },
    optional={
        **dict.fromkeys(
            ("event_id", "user_id", "conversation_id", "response_id", "model"), st.sampled_from([None, "7"])
        ),
        "actor": st.none(),
        "finish_reason": st.sampled_from([None, "stop"]),
        "comment": odd,
    },
)
unusual = st.one_of(
    st.tuples(st.just("prompt"), st.one_of(texts, odd, st.lists(message, max_size=4))),
    st.tuples(st.just("response"), st.one_of(texts, odd)),
    st.tuples(st.just("label"), st.sampled_from([True, "up", 2, 1.0, None])),
    st.tuples(st.just("ts"), st.sampled_from([946684799, 2**40, "2025-01-01", 1755000000000, True, None])),
    st.tuples(st.sampled_from(["event_id", "user_id", "conversation_id", "response_id", "model", "unknown"]), odd),
    st.tuples(st.just("user_id"), st.just("gone")),
    st.tuples(st.just("actor"), st.sampled_from(["end_user", "admin", "model", 1])),
    st.tuples(st.sampled_from(["consent", "error"]), st.sampled_from([True, False, "false", 1])),
    st.tuples(st.just("finish_reason"), st.sampled_from(["length", "", 1])),
    st.tuples(st.sampled_from(["event_type", "fb_x", "origin"]), st.sampled_from(["retract", "edit", None])),
)
ratings = st.tuples(usual, st.lists(unusual, max_size=2)).map(lambda parts: {**parts[0], **dict(parts[1])})
readings = st.builds(
    Reading, st.booleans(), st.booleans(), st.sampled_from([frozenset(("end_user", "admin")), frozenset(("model",))])
)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_plain_rating_says_what_the_full_reader_says(examples: int):
    latest = int(time.time() * 1e6) + DAY
    plain = []

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(ratings, readings, st.booleans())
    def holds(record: dict[str, Any], reading: Reading, ignore_system: bool) -> None:
        marker = Marker(SECRET, frozenset((user_hash("gone", SECRET),)), ignore_system, 3, "events")
        row = plain_row(record, reading, marker, PLACE, latest)
        if row is None:
            return
        plain.append(row)
        try:
            event = read_event(record, reading)
        except (Bad, Dropped) as why:
            raise AssertionError(record) from why
        assert marker.rows(event, PLACE) == [row]
        assert not event.naive and not event.stripped and not event.unfinished

    holds()
    assert len(plain) > examples / 10


values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(),
        st.sampled_from([1e999, 10**400, "\ud800", 'a": 1', "a :", "a\t: b"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=2), inner, max_size=3)),
    max_leaves=8,
)  # fmt: skip
WRITTEN = (
    lambda value: json.dumps(value),
    lambda value: json.dumps(value, ensure_ascii=False),
    lambda value: json.dumps(value, separators=(" ,\t", " \t:\r ")),
)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_the_faster_reader_of_json_says_what_the_strict_one_says(tmp_path: Path, examples: int):
    fast = []
    strict = Strict()

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.dictionaries(st.text(max_size=3), values, max_size=4), st.sampled_from(WRITTEN), st.data())
    def holds(record: dict[str, Any], written: Any, data: st.DataObject) -> None:
        raw = written(record).encode("utf-8", "surrogatepass")
        how = data.draw(st.sampled_from(["as it is", "a key twice", "a byte changed"]))
        if how == "a key twice" and record:
            key = data.draw(st.sampled_from(sorted(record)))
            raw = raw[:-1] + b", " + json.dumps(key).encode() + b": 1}"
        elif how == "a byte changed":
            at = data.draw(st.integers(0, len(raw) - 1))
            raw = raw[:at] + data.draw(st.binary(max_size=2)).replace(b"\n", b"") + raw[at + 1 :]
        path = tmp_path / "log.jsonl"
        path.write_bytes(raw + b"\n")
        ((_, line, colons),) = lines_of(Piece(0, 0, path, 0, len(raw) + 1))
        assert line == raw and colons != UNKNOWN
        said = [_parsed(raw, strict, bound) for bound in (colons, UNKNOWN)]
        assert said[0] == said[1]
        fast.append(how == "as it is")

    holds()
    assert sum(fast) > examples / 10


def _parsed(raw: bytes, strict: Strict, colons: int) -> str:
    """Return what is read, its types and signs of zero too."""
    try:
        return repr(parse(raw, strict, colons))
    except Bad as bad:
        return f"{bad.cause}: {bad.problem}"


@pytest.mark.parametrize(
    "twice", ['{"a": 1, "a": 2}', '{"a" : 1, "a":2}', '{"b": [{"c": 1, "c": 2}]}', '{"\\u0061": 1, "a": 2}']
)
def test_a_key_that_stands_twice_is_an_error_in_every_way_of_writing(tmp_path: Path, twice: str):
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"x": "a: b"}}\n{twice}\n')
    (_, first, bound), (_, second, other) = lines_of(Piece(0, 0, path, 0, path.stat().st_size))
    assert parse(first, Strict(), bound) == {"x": "a: b"}
    with pytest.raises(Bad, match="stands twice in one object"):
        parse(second, Strict(), other)
