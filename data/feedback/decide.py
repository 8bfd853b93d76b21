"""From statements to rows: which vote counts, which answers make a pair, which are left unpaired.

The work is done in SQL by DuckDB, which spills to disk where memory ends. Nothing depends on the order of the input:
wherever one of several must be chosen, the latest, or a hash of what it says, decides.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align_pipeline.data.feedback import confidence
from align_pipeline.data.feedback.index import RETRACTED, SAYS
from align_pipeline.data.feedback.settings import Settings
from align_pipeline.data.feedback.tables import every, quoted

SUSPECT_PER_MINUTE = 30
SUSPECT_ALIKE = 50
CAPPED_FROM_USERS = 10
CAP_AT_LEAST = 20
_NOW = 2**62
"""A time after all others."""
EDIT_ALIKE = (0.10, 0.98)
"""Below: another text by another author, and no correction; above: a slip of the pen."""

_FATES = ("used", "tied", "neutral", "retracted", "regeneration_off", "superseded", "duplicates", "orphan_ref",
          "suspect_user")  # fmt: skip
"""What becomes of an event, the most that any of its statements comes to first."""


@dataclass
class Decided:
    """What was decided, in tables `pair` and `unpaired` of a database, and the counts."""

    database: Any
    fates: Counter[str] = field(default_factory=Counter)
    pairs: dict[str, int] = field(default_factory=dict)
    unpaired: dict[str, int] = field(default_factory=dict)
    orphans: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    """(event, file, line in its piece, first byte, bytes) of events whose `response_id` nobody explains."""


MEMORY = "192MB"


def decide(index: Path, scratch: Path, settings: Settings, memory: str = MEMORY) -> Decided:
    """Return the rows that the statements of an index give."""
    import duckdb

    database = duckdb.connect(str(scratch / "feedback.duckdb"))
    database.execute(f"SET memory_limit = '{memory}'; SET threads = 2; SET preserve_insertion_order = false")
    database.execute(f"SET temp_directory = {quoted(scratch / 'spill')}")
    decided = Decided(database)
    for name, number in {**SAYS, "RETRACTED": RETRACTED}.items():
        database.execute(f"CREATE MACRO {name}() AS {number}")
    database.execute(f"CREATE MACRO chance(x) AS md5_number_lower('{settings.seed}:' || x)")
    database.execute("CREATE TABLE fate (event BIGINT, fate UTINYINT)")
    _one_id_one_event(database, index)
    _find_texts(database, decided)
    _suspects(database, settings)
    database.execute(
        "CREATE TABLE asked AS SELECT prompt, max(prompt_chars) AS prompt_chars FROM statement GROUP BY ALL"
    )
    _latest(database, settings)
    _tally(database)
    _pairs(database, settings, decided)
    _unpaired(database, settings, decided)
    fates = database.execute("SELECT f, count(*) FROM (SELECT min(fate) f FROM fate GROUP BY event) GROUP BY f")
    decided.fates.update({_FATES[fate]: count for fate, count in fates.fetchall()})
    return decided


def let_go(database: Any) -> None:
    """Make a database drop what it keeps of its file: a child that is forked now would hold on to it to its end."""
    import duckdb

    with contextlib.suppress(duckdb.OutOfMemoryException):  # it keeps what it must, and its limit
        database.execute("SET memory_limit = '16MB'")
    database.execute(f"SET memory_limit = '{MEMORY}'")


def _one_id_one_event(database: Any, index: Path) -> None:
    """Of several events with one id the latest counts; those that say the same are duplicates."""
    database.execute(f"""
        CREATE TABLE statement AS SELECT * FROM read_parquet({every(index, "*.parquet")});
        CREATE TEMP TABLE again AS
        SELECT event, body = first_value(body) OVER latest AS same, row_number() OVER latest AS place
        FROM statement
        WHERE part = 0 AND id IN (SELECT id FROM statement WHERE part = 0 GROUP BY id HAVING count(*) > 1)
        WINDOW latest AS (PARTITION BY id ORDER BY coalesce(ts, -1) DESC, body DESC, event);
        INSERT INTO fate
        SELECT event, if(same, {_fate("duplicates")}, {_fate("superseded")}) FROM again WHERE place > 1;
        DELETE FROM statement WHERE event IN (SELECT event FROM again WHERE place > 1);
    """)


def _fate(name: str) -> int:
    return _FATES.index(name)


def _find_texts(database: Any, decided: Decided) -> None:
    """Give events that name their answer by `response_id` what an event with its text says.

    An id is one answer within its conversation. Where either event names none, it must be one answer everywhere.
    """
    if not database.execute("SELECT count(*) FROM statement WHERE one IS NULL").fetchone()[0]:
        return
    said = ", ".join(f"{name} = said.{name}" for name in _OF_TEXT)
    database.execute(f"""
        CREATE TEMP TABLE known AS
        SELECT response_id, coalesce(conversation, 0) AS held,
            arg_max(struct_pack({", ".join(_OF_TEXT)}), (coalesce(ts, -1), body)) AS said,
            any_value(conversation) AS talk
        FROM statement WHERE response_id IS NOT NULL AND one IS NOT NULL GROUP BY ALL;
        CREATE TEMP TABLE known_once AS
        SELECT response_id, any_value(said) AS said, any_value(talk) AS talk FROM known
        GROUP BY response_id HAVING count(*) = 1;
        UPDATE statement SET {said} FROM known
        WHERE statement.one IS NULL AND statement.response_id = known.response_id
            AND held = coalesce(statement.conversation, 0);
        UPDATE statement SET {said}, conversation = coalesce(statement.conversation, talk) FROM known_once
        WHERE statement.one IS NULL AND statement.response_id = known_once.response_id
            AND (statement.conversation IS NULL OR talk IS NULL);
        INSERT INTO fate SELECT event, {_fate("orphan_ref")} FROM statement WHERE one IS NULL;
    """)
    decided.orphans = database.execute(
        "SELECT event, file, line, start, size FROM statement WHERE one IS NULL ORDER BY 1"
    ).fetchall()
    database.execute("DELETE FROM statement WHERE one IS NULL")


_OF_TEXT = ("prompt", "prompt_chars", "one", "one_at", "one_model", "one_chars", "file", "start", "size")


def _suspects(database: Any, settings: Settings) -> None:
    """Find the users that vote as no person does."""
    database.execute(f"""
        CREATE TABLE suspect AS
        SELECT who FROM statement WHERE who IS NOT NULL AND ts IS NOT NULL
        GROUP BY who, ts // 60000000 HAVING count(DISTINCT event) > {SUSPECT_PER_MINUTE}
        UNION
        SELECT who FROM statement WHERE who IS NOT NULL AND says = VOTE() AND label IN (-1, 1)
        GROUP BY who HAVING count(*) >= {SUSPECT_ALIKE} AND min(label) = max(label);
    """)
    if settings.drop_suspects:
        database.execute(f"""
            INSERT INTO fate SELECT event, {_fate("suspect_user")} FROM statement WHERE who IN (FROM suspect);
            DELETE FROM statement WHERE who IN (FROM suspect);
        """)


def _latest(database: Any, settings: Settings) -> None:
    """Keep each person's latest word on each answer and on each two answers.

    What contradicts itself at one time counts as a tie. An event without a user is a person of its own. What is taken
    back counts no more: a retract comes after what its user said at the same time, and without a time after all of it.
    """
    off = "" if settings.regenerations else "AND says <> REGENERATE()"
    database.execute(f"""
        INSERT INTO fate SELECT event, {_fate("tied")} FROM statement WHERE says = TIED();
        INSERT INTO fate SELECT event, {_fate("regeneration_off")} FROM statement
        WHERE says = REGENERATE() AND {not settings.regenerations};
        CREATE TABLE voted AS
        SELECT event, prompt, one, who, id, label, weight, ts, rank() OVER (PARTITION BY prompt, one, coalesce(who, id)
            ORDER BY coalesce(ts, if(label = RETRACTED(), {_NOW}, -1)) DESC, label = RETRACTED() DESC) AS place
        FROM statement WHERE says = VOTE();
        INSERT INTO fate SELECT event, {_fate("superseded")} FROM voted WHERE place > 1;
        CREATE TABLE word AS
        SELECT prompt, one, coalesce(who, id) AS person, any_value(who) AS who, min(label) AS label,
            min(label) <> max(label) AS torn, max(weight) AS weight, min(ts) AS ts_min, max(ts) AS ts_max
        FROM voted WHERE place = 1 GROUP BY ALL;
        CREATE TABLE compared AS
        SELECT *, least(one, two) AS low, greatest(one, two) AS high, one < two AS low_won,
            rank() OVER (PARTITION BY prompt, least(one, two), greatest(one, two), says = BETTER(),
                says = REGENERATE(), coalesce(who, id)
                ORDER BY coalesce(ts, -1) DESC) AS place
        FROM statement WHERE says NOT IN (VOTE(), TIED()) {off};
        INSERT INTO fate SELECT event, {_fate("superseded")} FROM compared WHERE place > 1;
        DELETE FROM compared WHERE place > 1;
        CREATE TEMP TABLE taken_back AS
        SELECT DISTINCT compared.event FROM compared JOIN statement ON statement.says = VOTE()
            AND statement.label = RETRACTED() AND statement.who = compared.who AND statement.prompt = compared.prompt
            AND statement.one = compared.one AND coalesce(statement.ts, {_NOW}) >= coalesce(compared.ts, -1);
        INSERT INTO fate SELECT event, {_fate("retracted")} FROM taken_back;
        DELETE FROM compared WHERE event IN (FROM taken_back);
    """)


def _tally(database: Any) -> None:
    """Count the words on each answer, and say what became of each vote."""
    database.execute(f"""
        CREATE TABLE answer AS
        SELECT prompt, one AS answer,
            coalesce(sum(weight) FILTER (NOT torn AND label = 1), 0)::INT AS up,
            coalesce(sum(weight) FILTER (NOT torn AND label = -1), 0)::INT AS down,
            count(*) FILTER (NOT torn AND label IN (-1, 1)) AS people,
            min(ts_min) AS ts_min, max(ts_max) AS ts_max,
            if(count(*) FILTER (NOT torn AND label = 1) = 1, any_value(who) FILTER (NOT torn AND label = 1), NULL)
                AS up_owner,
            if(count(*) FILTER (NOT torn AND label = -1) = 1, any_value(who) FILTER (NOT torn AND label = -1), NULL)
                AS down_owner
        FROM word GROUP BY prompt, one;
        INSERT INTO fate
        SELECT voted.event, CASE
            WHEN torn THEN {_fate("tied")}
            WHEN word.label = RETRACTED() THEN {_fate("retracted")}
            WHEN word.label = 0 THEN {_fate("neutral")}
            WHEN up = down THEN {_fate("tied")}
            ELSE {_fate("used")} END
        FROM voted
        JOIN word ON voted.prompt = word.prompt AND voted.one = word.one AND coalesce(voted.who, voted.id) = person
        JOIN answer ON voted.prompt = answer.prompt AND voted.one = answer.answer
        WHERE place = 1;
    """)


def _pairs(database: Any, settings: Settings, decided: Decided) -> None:
    """Make pairs of comparisons, then of edits and demonstrations, then of thumbs, then of regenerations."""
    low, high = EDIT_ALIKE
    database.execute(f"""
        CREATE TABLE said AS
        SELECT prompt, low, high, says = BETTER() AS comparison, says = REGENERATE() AS regenerated,
            count(*) FILTER (says = EDIT()) > 0 AS edited, min(similarity) AS alike,
            count(DISTINCT coalesce(who, id)) FILTER (low_won) AS low_wins,
            count(DISTINCT coalesce(who, id)) FILTER (NOT low_won) AS high_wins,
            any_value(who) AS who, min(ts) AS ts_min, max(ts) AS ts_max
        FROM compared GROUP BY ALL;
        INSERT INTO fate
        SELECT event, if(low_wins = high_wins AND compared.low <> compared.high, {_fate("tied")}, {_fate("used")})
        FROM compared JOIN said ON compared.prompt = said.prompt AND compared.low = said.low
            AND compared.high = said.high AND (says = BETTER()) = comparison AND (says = REGENERATE()) = regenerated;
        CREATE TABLE candidate AS
        SELECT prompt, if(low_wins > high_wins, low, high) AS chosen, if(low_wins > high_wins, high, low) AS rejected,
            CASE WHEN comparison THEN 0 WHEN regenerated THEN 3 ELSE 1 END AS rank,
            CASE WHEN comparison THEN 'comparison' WHEN regenerated THEN 'regenerate' WHEN edited THEN 'edit'
                ELSE 'demonstration' END AS source,
            greatest(low_wins, high_wins)::INT AS up_c, least(low_wins, high_wins)::INT AS down_c,
            least(low_wins, high_wins)::INT AS up_r, greatest(low_wins, high_wins)::INT AS down_r,
            (1 + greatest(low_wins, high_wins)) / (2 + low_wins + high_wins) AS p,
            (low_wins + high_wins)::INT AS people, ts_min, ts_max,
            if(low_wins + high_wins = 1, who, NULL) AS owner_1, NULL::BIGINT AS owner_2,
            CASE WHEN low = high THEN 'identical_text' WHEN low_wins = high_wins THEN 'tied'
                WHEN edited AND alike < {low} THEN 'edit_too_large'
                WHEN edited AND alike > {high} THEN 'edit_too_small' ELSE 'kept' END AS fate
        FROM said;
        UPDATE candidate SET fate = 'contradicted' FROM answer AS liked, answer AS disliked
        WHERE fate = 'kept' AND liked.prompt = candidate.prompt AND liked.answer = rejected AND liked.up > liked.down
            AND disliked.prompt = candidate.prompt AND disliked.answer = chosen AND disliked.up < disliked.down;
        DELETE FROM candidate WHERE source = 'regenerate' AND EXISTS (
            FROM answer WHERE answer.prompt = candidate.prompt
                AND ((answer.answer = chosen AND up < down) OR (answer.answer = rejected AND up > down)));
        CREATE TABLE zipped AS
        WITH free AS (
            SELECT * FROM answer WHERE up <> down AND NOT EXISTS (
                FROM candidate WHERE candidate.prompt = answer.prompt AND fate = 'kept' AND rank < 3
                    AND (chosen = answer.answer OR rejected = answer.answer))),
        best AS (SELECT *, row_number() OVER (PARTITION BY prompt
            ORDER BY (1 + up) / (2 + up + down) DESC, chance(answer), answer) AS place FROM free WHERE up > down),
        worst AS (SELECT *, row_number() OVER (PARTITION BY prompt
            ORDER BY (1 + up) / (2 + up + down), chance(answer), answer) AS place FROM free WHERE up < down)
        SELECT best.prompt, best.answer AS chosen, worst.answer AS rejected, best.up AS up_c, best.down AS down_c,
            worst.up AS up_r, worst.down AS down_r, (best.people + worst.people)::INT AS people,
            least(best.ts_min, worst.ts_min) AS ts_min, greatest(best.ts_max, worst.ts_max) AS ts_max,
            best.up_owner AS owner_1, worst.down_owner AS owner_2
        FROM best JOIN worst ON best.prompt = worst.prompt AND best.place = worst.place;
    """)
    votes = database.execute("SELECT DISTINCT up_c, down_c, up_r, down_r FROM zipped").fetchall()
    database.execute("CREATE TEMP TABLE sure (up_c INT, down_c INT, up_r INT, down_r INT, p DOUBLE)")
    if votes:
        database.executemany(
            "INSERT INTO sure VALUES (?, ?, ?, ?, ?)", [(*one, confidence.thumbs(*one)) for one in votes]
        )
    database.execute(f"""
        INSERT INTO candidate BY NAME
        SELECT zipped.*, 2 AS rank, 'thumbs' AS source, p,
            if(p < {settings.min_confidence}, 'low_confidence', 'kept') AS fate
        FROM zipped JOIN sure USING (up_c, down_c, up_r, down_r);
        CREATE TABLE ranked AS
        SELECT *, row_number() OVER (PARTITION BY prompt, least(chosen, rejected), greatest(chosen, rejected)
            ORDER BY rank) AS again
        FROM candidate WHERE fate = 'kept';
        CREATE TABLE pair AS
        SELECT * EXCLUDE (rank, again, fate), chance(prompt || ',' || chosen || ',' || rejected) AS row,
            row_number() OVER (PARTITION BY prompt ORDER BY rank, p DESC, row, chosen, rejected) AS place
        FROM ranked WHERE again = 1;
    """)
    count = Counter[str](dict(database.execute("SELECT fate, count(*) FROM candidate GROUP BY fate").fetchall()))
    count["said_twice"] = count.pop("kept", 0) - _count(database, "pair")
    count["prompt_cap"] = _delete(database, f"FROM pair WHERE place > {settings.pairs_per_prompt}")
    count["user_cap"] = user_cap(database, settings, "pair", ("owner_1", "owner_2"))
    sources = database.execute("SELECT source, count(*) FROM pair GROUP BY source ORDER BY 1").fetchall()
    names = ("identical_text", "tied", "contradicted", "edit_too_large", "edit_too_small", "low_confidence",
             "said_twice", "prompt_cap", "user_cap")  # fmt: skip
    decided.pairs = {**dict(sources), **{name: count[name] for name in names}}


def _unpaired(database: Any, settings: Settings, decided: Decided) -> None:
    """Keep every answer with a verdict that stands in no pair."""
    database.execute("""
        CREATE TABLE unpaired AS
        WITH free AS (
            SELECT prompt, answer, up > down AS label, up, down, people::INT AS people, ts_min, ts_max,
                if(up > down, up_owner, down_owner) AS owner_1, chance(prompt || ',' || answer) AS row
            FROM answer WHERE up <> down AND NOT EXISTS (
                FROM pair WHERE pair.prompt = answer.prompt AND (chosen = answer.answer OR rejected = answer.answer)))
        SELECT *, row_number() OVER (PARTITION BY prompt ORDER BY row, answer) AS place FROM free
    """)
    labelled = database.execute("SELECT count(*) FROM answer WHERE up <> down").fetchone()[0]
    count = {"answers": labelled, "in_pairs": labelled - _count(database, "unpaired")}
    count["prompt_cap"] = _delete(database, f"FROM unpaired WHERE place > {settings.unpaired_per_prompt}")
    count["user_cap"] = user_cap(database, settings, "unpaired", ("owner_1",))
    decided.unpaired = count


def user_cap(database: Any, settings: Settings, table: str, owners: tuple[str, ...]) -> int:
    """Leave out rows of users on whom alone too many rest; return how many.

    The bound is a share of the rows that are kept, so it is lowered until it is one.
    """
    if users(database) < CAPPED_FROM_USERS:
        return 0
    by_owner = " UNION ".join(f"SELECT row, {owner} AS owner FROM {table}" for owner in owners)
    database.execute(f"""
        CREATE OR REPLACE TEMP TABLE owned AS
        SELECT row, max(place) AS place FROM (
            SELECT row, row_number() OVER (PARTITION BY owner ORDER BY row) AS place
            FROM ({by_owner}) WHERE owner IS NOT NULL)
        GROUP BY row
    """)
    kept = total = _count(database, table)
    while True:
        cap = max(CAP_AT_LEAST, int(settings.user_share * kept))
        over = int(database.execute("SELECT count(*) FROM owned WHERE place > ?", [cap]).fetchone()[0])
        if total - over == kept:
            return _delete(database, f"FROM {table} WHERE row IN (SELECT row FROM owned WHERE place > {cap})")
        kept = total - over


def users(database: Any) -> int:
    """Return how many users' words count."""
    return int(
        database.execute("""
        SELECT count(DISTINCT who) FROM (
            SELECT who FROM word WHERE label IN (-1, 1) AND NOT torn UNION ALL SELECT who FROM compared)
    """).fetchone()[0]
    )


def _count(database: Any, table: str) -> int:
    return int(database.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def _delete(database: Any, rows: str) -> int:
    """Delete rows and return how many."""
    return int(database.execute(f"DELETE {rows}").fetchone()[0])
