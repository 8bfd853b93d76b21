"""What became of the feedback, in counters that add up, and what a person should know before training on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from align_pipeline.data.feedback.arrange import Arranged
from align_pipeline.data.feedback.decide import CAPPED_FROM_USERS, Decided, users
from align_pipeline.data.feedback.render import Rendered
from align_pipeline.data.feedback.settings import Settings

if TYPE_CHECKING:
    from align_pipeline.data.feedback.convert import Read
    from align_pipeline.data.feedback.logs import Log

Report = dict[str, Any]

LONGER_CHOSEN, CROSS_MODEL, AGREEMENT, TOP_USER = 0.60, 0.70, 0.60, 0.20
"""Shares from which (agreement: below which) a word of warning is said."""
ENOUGH = 20
"""Pairs, or pairs of raters, below which a share says nothing."""
CHARACTERS_PER_TOKEN = 4
"""A rough guess, good for English and for saying which lengths matter."""

FATES = ("duplicates", "superseded", "retracted", "neutral", "tied", "regeneration_off", "suspect_user", "used")


def build(
    logs: Sequence[Log],
    read: Read,
    decided: Decided,
    rendered: Rendered,
    arranged: Arranged,
    settings: Settings,
) -> Report:
    """Return the report as plain values.

    events.read = sum of events.invalid + sum of events.dropped + duplicates + superseded + retracted + neutral + tied +
    regeneration_off + suspect_user + used; answers = in pairs + left out by a cap + unpaired rows.
    """
    gate = read.gate
    invalid = {cause: {"events": n, "first": gate.first[cause]} for cause, n in sorted(gate.causes.items())}
    report: Report = {
        "schema": 1,
        "logs": [{"name": log.name, "product": log.adapter.name, "because": log.why} for log in logs],
        "events": {
            "read": read.events,
            "bytes": read.bytes,
            "invalid": invalid,
            "cut_at_end": read.cut_at_end,
            "dropped": dict(sorted(read.dropped.items())),
            **{fate: decided.fates[fate] for fate in FATES},
        },
        "noticed": {name: read.noticed[name] for name in ("naive_ts", "reasoning_stripped")},
        "pairs": {**decided.pairs, "equal_after_scrubbing": rendered.equal},
        "unpaired": dict(decided.unpaired),
        "rows": dict(arranged.rows),
        "groups": {"count": arranged.groups, "largest_rows": arranged.largest_group},
        "personal_data": {"rows": rendered.rows_scrubbed, "found": dict(sorted(rendered.scrubbed.items()))},
        "settings": settings.model_dump(mode="json", include=set(Settings.model_fields)),
    }
    report |= _measured(decided.database)
    report["kto"] = kto_weight(*_labels(decided.database))
    report["notes"] = list(_notes(report))
    return report


def invalid_share(report: Report) -> float:
    """Return the share of events that are invalid; a last line that was still being written does not count."""
    events = report["events"]
    bad = sum(one["events"] for one in events["invalid"].values()) - events["cut_at_end"]
    return float(bad / events["read"]) if events["read"] else 0.0


# What the rows are like.


def _measured(database: Any) -> Report:
    def one(query: str) -> tuple[Any, ...]:
        return tuple(database.execute(query).fetchone())

    pairs, longer, shorter, chosen, rejected, sure = one("""
        SELECT count(*), count(*) FILTER (chosen_chars > rejected_chars),
            count(*) FILTER (chosen_chars < rejected_chars), median(chosen_chars), median(rejected_chars), avg(p)
        FROM pair_text""")
    named, crossed = one("""
        SELECT count(*), count(*) FILTER (chosen_model <> rejected_model)
        FROM pair_text WHERE chosen_model IS NOT NULL AND rejected_model IS NOT NULL""")
    direction = database.execute("""
        SELECT chosen_model, rejected_model, count(*) AS n FROM pair_text
        WHERE chosen_model <> rejected_model GROUP BY ALL ORDER BY n DESC, 1, 2 LIMIT 1""").fetchone()
    left, shown = one(
        "SELECT count(*) FILTER (left_won), count(*) FROM compared WHERE left_won IS NOT NULL AND says = BETTER()"
    )
    agree, raters = one("""
        SELECT sum(u * (u - 1) + d * (d - 1)) / 2, sum((u + d) * (u + d - 1)) / 2 FROM (
            SELECT count(*) FILTER (label = 1) AS u, count(*) FILTER (label = -1) AS d
            FROM word WHERE NOT torn AND label IN (-1, 1) GROUP BY prompt, one)""")
    top, votes = one("""
        SELECT max(n) FILTER (who IS NOT NULL), sum(n) FROM (
            SELECT who, count(*) AS n FROM (
                SELECT who FROM word WHERE NOT torn AND label IN (-1, 1) UNION ALL SELECT who FROM compared)
            GROUP BY who)""")
    lengths = one(f"""
        SELECT {", ".join(f"avg((chars > {limit} * {CHARACTERS_PER_TOKEN})::INT)" for limit in (1024, 2048, 4096))}
        FROM (
            SELECT prompt_chars + greatest(chosen_chars, rejected_chars) AS chars
            FROM pair_text JOIN asked USING (prompt)
            UNION ALL
            SELECT prompt_chars + answer_chars FROM unpaired_text JOIN asked USING (prompt))""")
    suspects, rows = one("SELECT count(*), (SELECT count(*) FROM statement WHERE who IN (FROM suspect)) FROM suspect")
    return {
        "confidence": {"mean": _round(sure), "epsilon": _round(1 - sure) if pairs else None},
        "length": {
            "chosen_longer_share": _share(longer, longer + shorter),
            "median_chosen_characters": chosen,
            "median_rejected_characters": rejected,
            "over_tokens_estimated": dict(zip(("1024", "2048", "4096"), map(_round, lengths), strict=True)),
        },
        "models": {
            "cross_model_share": _share(crossed, named),
            "commonest": list(direction) if direction else None,
        },
        "position": {"left_won_share": _share(left, shown), "interval": wilson(left, shown), "comparisons": shown},
        "agreement": {"share": _share(agree or 0, raters or 0), "pairs_of_raters": int(raters or 0)},
        "users": {
            "count": users(database),
            "top_share_of_votes": _share(top or 0, votes or 0),
            "suspects": suspects,
            "statements_of_suspects": rows,
        },
    }


def _labels(database: Any) -> tuple[int, int]:
    """Return how many unpaired training rows are liked, and how many disliked."""
    up, down = database.execute("""
        SELECT count(*) FILTER (label), count(*) FILTER (NOT label) FROM ordered WHERE part = 'unpaired.train'
    """).fetchone()
    return up, down


def _share(part: float, whole: float) -> float | None:
    return round(float(part) / float(whole), 4) if whole else None


def _round(value: float | None) -> float | None:
    return None if value is None else round(float(value), 4)


def wilson(hits: int, count: int, z: float = 1.959964) -> list[float] | None:
    """Return the 95 % interval of a share (Wilson 1927); None without observations."""
    if not count:
        return None
    share, square = hits / count, z * z / count
    middle = (share + square / 2) / (1 + square)
    half = z * math.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    return [round(middle - half, 4), round(middle + half, 4)]


def kto_weight(up: int, down: int) -> Report:
    """Return the one weight of KTO to set so that both labels pull alike, its range and the counts it comes from.

    Ethayarajh et al. 2024, equation 8: desirable_weight * up / (undesirable_weight * down) should lie in [1, 4/3].
    """
    found: Report = {"up": up, "down": down, "set": None}
    if not up or not down or 1 <= up / down <= 4 / 3:
        return found
    name, ratio = ("undesirable_weight", up / down) if up > down else ("desirable_weight", down / up)
    low, high = (ratio * 0.75, ratio) if up > down else (ratio, ratio * 4 / 3)
    return found | {"set": name, "weight": round(math.sqrt(low * high), 2), "range": [round(low, 2), round(high, 2)]}


# In words.


def _notes(report: Report) -> Iterator[str]:
    """Yield what should be known, each with what to do about it."""
    rows = report["rows"]
    pairs, unpaired = (sum(n for name, n in rows.items() if name.startswith(kind)) for kind in ("pairs", "unpaired"))
    kto = report.get("kto", {"up": 0, "down": 0})
    if not rows:
        return
    if not pairs:
        yield "no pairs: no prompt has a liked and a disliked answer; train with kto, or collect comparisons and edits"
    if bool(kto["up"]) != bool(kto["down"]):
        one = "liked" if kto["up"] else "disliked"
        remedy = "sft on them learns as much" if kto["up"] else "a small learning rate, or answers to prefer to them"
        yield f"all unpaired rows are {one}: kto has nothing to hold them against; {remedy}"
    if pairs + unpaired < 50:
        few = "1 row is too few" if pairs + unpaired == 1 else f"{pairs + unpaired} rows are too few"
        yield f"{few} to train on; keep {'it' if pairs + unpaired == 1 else 'them'} to evaluate with"
    yield from _confounds(report, enough=pairs >= ENOUGH)
    if report["noticed"]["naive_ts"]:
        naive = report["noticed"]["naive_ts"]
        yield f"{_count(naive, 'time')} {'names' if naive == 1 else 'name'} no zone, taken as UTC"
    if report["groups"]["largest_rows"] > 0.2 * (pairs + unpaired) and pairs + unpaired >= 50:
        share = report["groups"]["largest_rows"] / (pairs + unpaired)
        yield f"one group of like prompts holds {share:.0%} of the rows, so the split is coarse; are prompts templates?"


def _confounds(report: Report, *, enough: bool) -> Iterator[str]:
    longer = report["length"]["chosen_longer_share"]
    if enough and longer is not None and longer > LONGER_CHOSEN:
        yield f"chosen answers are longer in {longer:.0%} of pairs; dpo learns length from that, with sigmoid_norm less"
    crossed = report["models"]["cross_model_share"]
    if enough and crossed is not None and crossed > CROSS_MODEL:
        best, worst, _ = report["models"]["commonest"]
        yield f"{crossed:.0%} of pairs are between models, mostly {best} over {worst}; dpo may learn to tell them apart"
    interval = report["position"]["interval"]
    if interval and not interval[0] <= 0.5 <= interval[1]:
        share = report["position"]["left_won_share"]
        yield f"the first answer won {share:.0%} of comparisons; was the order random?"
    agreement = report["agreement"]["share"]
    if agreement is not None and agreement < AGREEMENT and report["agreement"]["pairs_of_raters"] >= ENOUGH:
        yield f"raters of one answer agree in {agreement:.0%} of cases, which is little; define what a thumb means"
    top = report["users"]["top_share_of_votes"]
    if top is not None and top > TOP_USER and report["users"]["count"] > 1:
        capped = report["users"]["count"] >= CAPPED_FROM_USERS
        rule = "user_share bounds the rows that rest on one user alone"
        rule = rule if capped else f"below {CAPPED_FROM_USERS} users no cap applies, so look at what they like"
        yield f"one user gave {top:.0%} of the votes; {rule}"
    if report["users"]["suspects"]:
        count, votes = report["users"]["suspects"], report["users"]["statements_of_suspects"]
        who = "one user votes" if count == 1 else f"{count:,} users vote"
        yield f"{who} as no person does ({_count(votes, 'vote')}); drop_suspects: true leaves them out"
    over = report["length"]["over_tokens_estimated"]["1024"]
    if over:
        yield f"about {over:.1%} of rows are longer than 1,024 tokens (estimated); max_length decides what is cut"


_WHAT_PAIRS = {
    "comparison": "comparisons", "edit": "edits", "demonstration": "demonstrations", "thumbs": "thumbs",
    "regenerate": "kept answers", "completed": "dislikes that a model completed",
}  # fmt: skip


def lines(report: Report) -> Iterator[str]:
    """Yield the summary for people."""
    events = report["events"]
    invalid = sum(one["events"] for one in events["invalid"].values())
    yield f"{_count(events['read'], 'event')} read, {events['used']:,} used"
    gone = {
        "invalid": invalid,
        **events["dropped"],
        **{fate: events[fate] for fate in FATES if fate != "used"},
    }
    said = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in gone.items() if n)
    if said:
        yield f"  not used: {said}"
    yield from (f"  {line}" for line in invalid_lines(report))
    made = ", ".join(
        f"{n:,} from {_WHAT_PAIRS[name]}" for name, n in report["pairs"].items() if name in _WHAT_PAIRS and n
    )
    yield f"pairs: {_split(report['rows'], 'pairs')}{f' ({made})' if made else ''}"
    yield from _left_out(report["pairs"], _WHAT_PAIRS)
    kto = report.get("kto", {"up": 0, "down": 0})
    yield f"unpaired: {_split(report['rows'], 'unpaired')} ({kto['up']:,} liked, {kto['down']:,} disliked to train on)"
    yield from _left_out(report["unpaired"], ("answers", "in_pairs"))
    if found := report["personal_data"]["found"]:
        kinds = ", ".join(f"{n:,} {name}" for name, n in found.items())
        yield f"personal data replaced in {_count(report['personal_data']['rows'], 'row')}: {kinds}"
    yield from (f"note: {note}" for note in report["notes"])
    if past := report.get("forgotten"):
        users = f"{_count(past['users'], 'user')} {_were(past['users'])} forgotten"
        removed = f"{_count(past['removed'], 'row')} {_were(past['removed'])} removed since"
        since = f"{removed} and {past['changed']:,} counted again"
        yield f"note: {users}: {since}; the counts of events and pairs are those from before"


def _were(number: int) -> str:
    return "was" if number == 1 else "were"


def _count(number: int, what: str) -> str:
    """Return how many there are: 1 row, 2 rows."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def _split(rows: Mapping[str, int], kind: str) -> str:
    return f"{rows.get(f'{kind}.train', 0):,} to train on, {rows.get(f'{kind}.test', 0):,} to test with"


def _left_out(counts: Mapping[str, int], made: Any) -> Iterator[str]:
    said = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items() if n and name not in made)
    if said:
        yield f"  left out: {said}"


def markdown(report: Report) -> str:
    """Return the report for people as a document."""
    text = ["# Feedback", ""]
    for line in lines(report):
        text.append(f"- {line}" if not line.startswith(" ") else f"  - {line.strip()}")
    sources = [f"- {log['name']}: {log['product']} ({log['because']})" for log in report["logs"]]
    return "\n".join([*text, "", "## Logs", "", *sources, ""])


def invalid_lines(report: Report) -> Iterator[str]:
    """Yield for each cause how many events are invalid, and the first of them with their addresses."""
    for cause, one in report["events"]["invalid"].items():
        yield f"{cause}: {_count(one['events'], 'event')}"
        yield from (f"  {problem}" for problem in one["first"])


def problems(report: Report, max_invalid_share: float) -> list[str]:
    """Return why the rows should not be used as they are: too many events are invalid, or there are no rows."""
    found = []
    share = invalid_share(report)
    if share > max_invalid_share:
        rule = f"max_invalid_share allows {max_invalid_share:.3g}; mend the logs (rejects.jsonl lists all), or raise it"
        found.append(f"{share:.1%} of the events are invalid, {rule}")
    if not report["rows"]:
        read = report["events"]["read"]
        became = "it" if read == 1 else "them"
        found.append(f"no rows from {_count(read, 'event')}; report.md says what became of {became}")
    return found
