"""Feedback events as a log would hold them, and what they are made into."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from align_pipeline.data.feedback.complete import Complete
from align_pipeline.data.feedback.convert import convert
from align_pipeline.data.feedback.settings import Settings

FILES = ("pairs.train", "pairs.test", "unpaired.train", "unpaired.test")


class Made:
    """What a conversion wrote."""

    def __init__(self, folder: Path, report: dict[str, Any]) -> None:
        self.folder = folder
        self.report = report
        self.bytes = {path.name: path.read_bytes() for path in sorted(folder.glob("*.jsonl"))}
        self.files = {name: self._rows(name) for name in FILES}

    def _rows(self, name: str) -> list[dict[str, Any]]:
        text = self.bytes.get(f"{name}.jsonl", b"").decode()
        return [json.loads(line) for line in text.splitlines()]

    @property
    def pairs(self) -> list[dict[str, Any]]:
        return self.files["pairs.train"] + self.files["pairs.test"]

    @property
    def unpaired(self) -> list[dict[str, Any]]:
        return self.files["unpaired.train"] + self.files["unpaired.test"]

    @property
    def texts(self) -> list[tuple[str, str]]:
        return sorted((row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in self.pairs)

    @property
    def labels(self) -> list[tuple[str, bool]]:
        return sorted((row["completion"][0]["content"], row["label"]) for row in self.unpaired)

    @property
    def events(self) -> dict[str, Any]:
        return self.report["events"]


Make = Callable[..., Made]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Convert events, the lines of a log or all its bytes, with settings."""
    count = 0

    def made(
        events: Iterable[Any] | bytes, name: str = "log.jsonl", complete: Complete | None = None, **settings: Any
    ) -> Made:
        nonlocal count
        count += 1
        folder = tmp_path / str(count)
        out = folder / "out"
        out.mkdir(parents=True)
        log = folder / name
        if isinstance(events, bytes):
            log.write_bytes(events)
        else:
            lines = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in events]
            log.write_bytes(b"".join(line + b"\n" for line in lines))
        report = convert(
            [(log, name)],
            Settings(**settings),
            out,
            scratch=folder / "scratch",
            private=tmp_path / "private",
            place=str(out),
            complete=complete,
        )
        return Made(out, report)

    return made


def rating(
    label: Any, response: str = "answer A", user: str | None = "u1", prompt: Any = "Sort a list.", **more: Any
) -> dict[str, Any]:
    event = {"event_type": "rating", "prompt": prompt, "response": response, "label": label, "user_id": user, **more}
    return {key: value for key, value in event.items() if value is not None}


def adds_up(made: Made) -> None:
    """Hold the counters against each other and against the rows."""
    events = made.events
    fates = ("duplicates", "superseded", "retracted", "neutral", "tied", "regeneration_off", "suspect_user", "used")
    invalid = sum(one["events"] for one in events["invalid"].values())
    assert events["read"] == invalid + sum(events["dropped"].values()) + sum(events[fate] for fate in fates)
    pairs, unpaired = made.report["pairs"], made.report["unpaired"]
    if pairs:
        made_of = ("comparison", "edit", "demonstration", "thumbs", "regenerate", "completed")
        sources = sum(pairs.get(name, 0) for name in made_of)
        assert sources == len(made.pairs) + pairs["equal_after_scrubbing"]
        assert unpaired["answers"] == (
            unpaired["in_pairs"] + unpaired["prompt_cap"] + unpaired["user_cap"] + len(made.unpaired)
        )
    assert {name: len(rows) for name, rows in made.files.items() if rows} == made.report["rows"]
    for row in made.pairs:
        assert row["chosen"] != row["rejected"]
