"""Feedback becomes rows: the whole way, from logs to the files that stages train on.

Read and check every event (index), decide what counts (decide), write the rows (render), put them in order and split
them (arrange), complete dislikes where that is asked for (complete), say what happened (report). The same events and
settings give the same bytes, in whatever order and files they come.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align_pipeline.data.feedback.arrange import Arranged, arrange
from align_pipeline.data.feedback.complete import Complete, complete_rows
from align_pipeline.data.feedback.decide import Decided, decide
from align_pipeline.data.feedback.events import Reading
from align_pipeline.data.feedback.index import INDEX, Marker
from align_pipeline.data.feedback.keys import salt, tombstones
from align_pipeline.data.feedback.lineage import FILES, Entry, dataset_digest, digests_of, remember, write_lineage
from align_pipeline.data.feedback.lines import origin, pieces
from align_pipeline.data.feedback.logs import Lines, canonical_lines, find_logs
from align_pipeline.data.feedback.read import Found, read_piece
from align_pipeline.data.feedback.render import LINES, NAMES, Rendered, batches, render
from align_pipeline.data.feedback.report import build, markdown
from align_pipeline.data.feedback.settings import Settings
from align_pipeline.data.feedback.tables import write_rows
from align_pipeline.data.gate import Gate, Reject
from align_pipeline.data.processes import in_order

Say = Callable[[str], None]
Step = Callable[[str, int, int], None]
"""What is being done, how much of it is done, and how much there is; 0 where that is not known."""


@dataclass
class Read:
    """What reading found, all files together."""

    gate: Gate
    events: int = 0
    bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    noticed: Counter[str] = field(default_factory=Counter)
    cut_at_end: int = 0
    """Broken last lines of files that somebody was still writing."""
    lines_before: list[tuple[int, int, int]] = field(default_factory=list)
    """Of each piece its number, its file, and the lines of the file before it."""


def convert(
    paths: Sequence[tuple[Path, str]],
    settings: Settings,
    out: Path,
    *,
    scratch: Path,
    private: Path,
    place: str,
    say: Say = lambda line: None,
    step: Step = lambda what, done, total: None,
    complete: Complete | None = None,
) -> dict[str, Any]:
    """Write `pairs` and `unpaired` rows, `report.json`, `report.md` and `rejects.jsonl` into `out`; return the report.

    `paths` are logs or folders of them with the names that addresses show. `private` holds the salt that users are
    hashed with, the list of those who are forgotten, and the lineage of the rows, which will lie at `place`. `out` must
    exist and be empty. `say` is told what every log was taken for, `step` how far the work is. `complete` knows better
    answers to disliked ones.
    Raises InputError and ConfigError as `find_logs`.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    folders = {name: scratch / name for name in ("spool", "index", "rendered", "spill")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    write_rows([], folders["index"] / "none.parquet", INDEX)  # where nothing can be read there still are tables
    write_rows([], folders["rendered"] / "none.lines.parquet", LINES)
    write_rows([], folders["rendered"] / "none.names.parquet", NAMES)
    logs = find_logs(paths, settings, say)
    for log in logs:
        say(f"{log.name} read as {log.adapter.name}: {log.why}")
    gate = Gate(out / "rejects.jsonl")
    reading = Reading(settings.strip_reasoning, settings.require_consent, frozenset(settings.actors))
    silent = Counter[str]()
    lines = canonical_lines(logs, folders["spool"], gate, silent, step)
    read = _read(lines, folders["index"], reading, settings, private, gate, silent, step)
    decided = decide(folders["index"], scratch, settings)
    _orphans(decided, read, lines)
    gate.close()
    rendered = _render(decided, lines, folders["rendered"], reading, settings, step)
    arranged = arrange(decided.database, folders["rendered"], out, test=settings.test, seed=settings.seed)
    arranged = _complete(decided, arranged, out, scratch, settings, complete)
    report = build(logs, read, decided, rendered, arranged, settings)
    digests = digests_of(out)
    report["dataset"] = dataset_digest(digests)
    lineage = write_lineage(decided.database, scratch, private)
    decided.database.close()
    _save(report, out)
    remember(private, Entry(place, report["dataset"], lineage, tuple(digests.values())))
    shutil.rmtree(scratch, ignore_errors=True)
    return report


def _read(
    lines: Sequence[Lines],
    index: Path,
    reading: Reading,
    settings: Settings,
    private: Path,
    gate: Gate,
    silent: Counter[str],
    step: Step,
) -> Read:
    """Read every event into the index; what cannot be read goes to the gate with its address."""
    import pyarrow.parquet  # noqa: F401 - before the processes are forked, so that they share it

    bytes_ = sum(one.path.stat().st_size for one in lines)
    cut = silent.pop("cut_at_end", 0)
    read = Read(gate, events=gate.bad + silent.total(), bytes=bytes_, dropped=silent, cut_at_end=cut)
    secret, forgotten = salt(private), tombstones(private)

    def index_piece(piece: Any) -> Found:
        product = lines[piece.file].product
        marker = Marker(secret, forgotten, settings.ignore_system, settings.admin_weight, product)
        return read_piece(piece, index, reading, marker, lines[piece.file].spooled)

    done = 0
    before: Counter[int] = Counter()
    for found in in_order(index_piece, pieces(lines)):
        piece = found.piece
        for line, reject in found.rejects:
            where = reject.where or f"{lines[piece.file].name}:{before[piece.file] + line}"
            gate.reject(Reject(where, reject.cause, reject.problem, reject.record))
        before[piece.file] += found.lines
        read.lines_before.append((piece.number, piece.file, before[piece.file] - found.lines))
        read.events += found.read
        read.dropped += found.dropped
        read.noticed += found.noticed
        read.cut_at_end += found.cut_at_end
        done += piece.end - piece.begin
        step("bytes read", done, read.bytes)
    return read


def _orphans(decided: Decided, read: Read, lines: Sequence[Lines]) -> None:
    """Reject the events whose answer nobody knows."""
    before = {number: lines_before for number, _, lines_before in read.lines_before}
    for event, number, line, start, size in decided.orphans:
        where = f"{lines[number].name}:{before[event >> 32] + line}"
        if lines[number].spooled:
            with lines[number].path.open("rb") as file:
                file.seek(start)
                where = origin(file.read(size))
        problem = "response_id: names no answer of the logs, or more than one; add its event and conversation_id"
        read.gate.reject(Reject(where, "orphan_ref", f"{problem}, or drop this one"))


def _render(
    decided: Decided, lines: Sequence[Lines], folder: Path, reading: Reading, settings: Settings, step: Step
) -> Rendered:
    whole = Rendered()
    total = sum(decided.database.execute(f"SELECT count(*) FROM {one}").fetchone()[0] for one in ("pair", "unpaired"))
    files = [one.path for one in lines]

    def one_batch(batch: Any) -> Rendered:
        return render(batch, files, folder, reading, settings)

    decided.database.execute("SET threads = 1")  # no thread of it lives when processes are forked
    for done in in_order(one_batch, batches(decided.database)):
        whole.rows += done.rows
        whole.equal += done.equal
        whole.scrubbed += done.scrubbed
        whole.rows_scrubbed += done.rows_scrubbed
        step("rows written", whole.rows + whole.equal, total)
    return whole


def _complete(
    decided: Decided, arranged: Arranged, out: Path, scratch: Path, settings: Settings, complete: Complete | None
) -> Arranged:
    """Add pairs of dislikes and better answers, and count them; return what the files are then."""
    done = complete_rows(decided.database, out, scratch, settings, complete)
    for name, count in done.counts.items():
        decided.pairs[name] = decided.pairs.get(name, 0) + count
    rows = {name: arranged.rows.get(name, 0) + done.rows.get(name, 0) for name in FILES}
    return replace(arranged, rows={name: count for name, count in rows.items() if count})


def _save(report: dict[str, Any], out: Path) -> None:
    (out / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "report.md").write_text(markdown(report), encoding="utf-8")
