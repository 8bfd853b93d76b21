"""What holds whatever the log: nothing depends on its order, counters add up, caps are kept, nothing leaks."""

import json
import random
from collections import Counter, defaultdict
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow.parquet import read_table

from thumbs import Made, Make, adds_up

ANSWERS = [*(f"answer {i}" for i in range(6)), "write to me@example.org", "write to you@example.org", "é", "e\u0301"]
PROMPTS = [*(f"prompt {i} is short" for i in range(12)), "Write to me@example.org", "where is it"]


def message(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


prompts = st.one_of(
    st.sampled_from(PROMPTS),
    st.tuples(st.sampled_from(PROMPTS[:3]), st.sampled_from(ANSWERS[:2]), st.sampled_from(PROMPTS[:3])).map(
        lambda turns: [message(turns[0]), {"role": "assistant", "content": turns[1]}, message(turns[2])]
    ),
)
answers = st.sampled_from(ANSWERS)
common = {
    "prompt": prompts,
    "user_id": st.one_of(st.none(), st.sampled_from([f"u{i}" for i in range(14)])),
    "ts": st.one_of(st.none(), st.integers(1755000000, 1755000020)),
    "event_id": st.one_of(st.none(), st.sampled_from([f"e{i}" for i in range(40)])),
    "conversation_id": st.one_of(st.none(), st.sampled_from([f"c{i}" for i in range(30)])),
    "actor": st.sampled_from([None, None, "end_user", "admin", "model"]),
    "finish_reason": st.sampled_from([None, "stop", "length"]),
}
KINDS: dict[str, dict[str, Any]] = {
    "rating": {"response": answers, "label": st.sampled_from([1, 1, -1, 0, "👎", "meh"])},
    "retract": {"response": answers},
    "edit": {"response": answers, "original_response": answers},
    "demonstration": {"response": answers, "original_response": st.one_of(st.none(), answers)},
    "regenerate": {"response": answers, "original_response": answers},
    "comparison": {
        "alternatives": st.lists(answers.map(lambda text: {"response": text}), min_size=2, max_size=4),
        "winner": st.sampled_from([0, 1, 1, "tie", "both_bad", 3]),
    },
}
events = st.one_of(
    *[
        st.fixed_dictionaries({"event_type": st.just(kind), **common, **own}).map(
            lambda event: {key: value for key, value in event.items() if value is not None}
        )
        for kind, own in KINDS.items()
    ]
)


def caps_are_kept(made: Made) -> None:
    for rows, cap in ((made.pairs, 4), (made.unpaired, 20)):
        count = Counter(json.dumps(row["prompt"]) for row in rows)
        # Personal data is taken out after the choice, so two prompts may look alike; none of these do.
        assert max(count.values(), default=0) <= cap


def nothing_leaks(made: Made) -> None:
    for kind in ("pairs", "unpaired"):
        for field in ("fb_prompt_group", "prompt"):
            train, test = (
                {json.dumps(row[field]) for row in made.files[f"{kind}.{side}"]} for side in ("train", "test")
            )
            assert not train & test
    train, test = ({row["fb_prompt_group"] for row in made.files[f"pairs.{side}"]} for side in ("train", "test"))
    other = {row["fb_prompt_group"] for row in made.files["unpaired.test"]}
    assert not train & other and not test & {row["fb_prompt_group"] for row in made.files["unpaired.train"]}


@pytest.mark.parametrize(
    "examples", [pytest.param(12, id="a-few"), pytest.param(250, id="many", marks=pytest.mark.slow)]
)
def test_order_changes_nothing_and_counters_add_up(make: Make, monkeypatch: pytest.MonkeyPatch, examples: int):
    from align_pipeline.data.feedback import lines

    @settings(
        max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
    )
    @given(st.lists(events, max_size=60), st.randoms(use_true_random=False), st.integers(60, 2000))
    def holds(log: list[Any], shuffler: random.Random, size: int) -> None:
        made = make(log, regenerations=True, test=0.3, max_invalid_share=1.0)
        adds_up(made)
        caps_are_kept(made)
        nothing_leaks(made)
        shuffler.shuffle(log)
        with monkeypatch.context() as patched:
            patched.setattr(lines.pieces, "__defaults__", (size,))
            again = make(log, regenerations=True, test=0.3, max_invalid_share=1.0)
        rows = {name: held for name, held in made.bytes.items() if name != "rejects.jsonl"}
        assert rows == {name: held for name, held in again.bytes.items() if name != "rejects.jsonl"}

    holds()


@pytest.mark.parametrize("seed", range(3))
def test_no_user_decides_more_than_its_share(make: Make, seed: int):
    random_ = random.Random(seed)
    weights = [40, *([1] * 30)]
    log = [
        {
            "event_type": "rating",
            "prompt": f"prompt {random_.randrange(500)}",
            "response": f"answer {random_.randrange(3)}",
            "label": random_.choice([1, 1, -1]),
            "user_id": f"u{random_.choices(range(31), weights)[0]}",
            "event_id": str(number),
        }
        for number in range(1500)
    ]
    made = make(log)
    adds_up(made)
    (path,) = (made.folder.parents[1] / "private" / "lineage").iterdir()
    alone: dict[str, dict[int, set[int]]] = {"pair": defaultdict(set), "unpaired": defaultdict(set)}
    speakers: dict[tuple[str, int, int, int], list[int]] = defaultdict(list)
    for word in read_table(path).to_pylist():
        speakers[word["kind"], word["row"], word["side"], word["says"]].append(word["who"])
    labels = {int(row["fb_row_id"], 16): row["label"] for row in made.unpaired}
    for (kind, row, side, says), people in speakers.items():
        carries = (1 if side == 1 else -1) if kind == "pair" else (1 if labels[row] else -1)
        if says == carries and len(people) == 1:
            alone[kind][people[0]].add(row)
    for kind, rows in (("pair", made.pairs), ("unpaired", made.unpaired)):
        worst = max(map(len, alone[kind].values()))
        assert worst <= max(20, int(0.05 * len(rows)))
    assert made.report["pairs"]["user_cap"] + made.report["unpaired"]["user_cap"] > 0
