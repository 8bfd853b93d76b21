"""Questions whose right answers are known: what an answer says is read out of it, and is right or not.

`extract` says how. What stands before the last `</think>` is thought and not said, and is left out first.

text        the whole answer
label       the label that the answer names: the first after its answer mark, else the last one named; only the set's
            labels count, as whole words, and not where "not" or "n't" stands before one, or one word further before
choice      the letter of an option: right after the answer mark or "I choose" ("pick", "select"); else the one that the
            answer begins with, as in "(B)", "B.", "B:", "B is correct" or B alone; else the last in brackets; else the
            one option whose text is in it. A small letter counts only where no word follows: "Answer: b", "b"
number      the number right after the answer mark, unless it begins a sum; else the last number
regex:RE    the first group of RE, or all of it, in its last match

The answer mark is the last "answer is", "answer:" or "\\boxed{". Brackets, quotes, *, $ and the like, and the word
"option", do not count between it and what is read.

The decimals of a number follow a full stop; its thousands may be grouped by commas or by spaces. A unit may follow at
once, as in 60km; 2nd is no number. Digits in one piece that is not written so (12,5 and 1.000,50, which may be read in
two ways, 10:30, 3/4, 10^6) are never read in part: where such a piece would be the number, the answer is unread.

Texts are equal when they are equal after NFKC, case folding, one space for each run of white space, and without the
quotes, brackets, full stops and the like at their ends, unless that is all: 'Not  valid.' is 'not valid', '-3' is not
'3'. Numbers are equal as decimal numbers: 145.0 is 145. An answer that nothing can be read from is wrong, and counted
as `unread`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from itertools import islice
from typing import Any

from align_pipeline.data.rows import Message, Prompt, Row
from align_pipeline.pipeline.errors import DataError, did_you_mean
from align_pipeline.stages.statistics import confusion, macro_f1, share_metrics, table_interval, with_interval

KINDS = ("text", "label", "choice", "number")
REGEX = "regex:"
OURS = ("answer", "choices")
"""What `columns` may name beside the fields of a prompt."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ENDS = " \t\n.,;:!?\"'`()[]{}*_“”‘’«»"
_MARK = r"\banswer\s*(?:is|:)\s*:?|\\boxed\{(?:\\text\{)?"
_ANSWER = re.compile(_MARK, re.IGNORECASE)
_CHOSEN = re.compile(rf"{_MARK}|\bI (?:choose|pick|select)\b", re.IGNORECASE)
_OPENING = r"[\s:*(\[{\"'“‘`$]*"
_LETTER = re.compile(
    rf"{_OPENING}(?:(?i:the )?(?i:option)\s{_OPENING})?(?:([A-Z])\b|([a-z])(?=[^\w\s]|[ \t]*(?:\n|$)))"
)
_LEADING = re.compile(
    r"[\s*(\[]*(?:(?i:option)\s+[*(\[]*)?([A-Z])"
    r"(?:[\s*\])]*$|[*\])]*[).:](?:\s|\*|$)|\s*\n|[*\])]*\s+is\s+(?:the\s+)?(?:correct|right|answer)\b)"
)
_BRACKETED = re.compile(r"\(([A-Z])\)")
_JOINS = ".,:/^'’"
_SPACE = "[ \u00a0\u202f]"
_DIGITS = rf"(?:\d{{1,3}}(?:{_SPACE}\d{{3}})+(?!\d)|\d+)"
_PIECE = rf"(?>(?:(?<![\w.])\.)?{_DIGITS}(?:[{_JOINS}]\d+)*(?:[eE][-+]?\d+)?)"
"""What is written in one piece with a number; (?>) lets no part of it be taken for the whole."""
_NUMBER = (
    rf"(?<!\w)(?P<number>(?:[-−+]|(?<!\d[{_JOINS}])){_PIECE})"  # begins neither in mid-word nor in mid-piece
    r"(?!(?:st|nd|rd|th)\b)[A-Za-z]*+(?!\w)"
)
_WRITTEN = re.compile(_NUMBER, re.ASCII)
_STATED = re.compile(rf"[ \t(\[*\"'“‘`$£€¥]*{_NUMBER}(?!\s*[-−+*/×÷^=x]\s*[\d($])", re.ASCII)
_PLAIN = re.compile(
    rf"[-+]?(?:\d{{1,3}}(?:,\d{{3}})+|\d{{1,3}}(?:{_SPACE}\d{{3}})+|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d+)?", re.ASCII
)


@dataclass(frozen=True, slots=True)
class Known:
    """A question, and what the right answer says."""

    row: Row
    """As it is asked, the options written below it."""
    label: str
    options: tuple[str, ...] = ()
    """The texts of the options, normalised."""


def problem_of(extract: str) -> str | None:
    """Say what is wrong with a way to read answers; None when it is one."""
    if extract.startswith(REGEX):
        try:
            re.compile(extract.removeprefix(REGEX))
        except re.error as error:
            return f"{extract!r} is no regular expression ({error}); mend it"
        return None
    if extract in KINDS:
        return None
    return f"{extract!r} is no way to read answers{did_you_mean(extract, KINDS)}; known: {', '.join(KINDS)}, {REGEX}RE"


# --- questions --------------------------------------------------------------------------------------------------------


def known(rows: Iterable[Row], extract: str, columns: Mapping[str, str]) -> list[Known]:
    """Return the questions with their right answers; raise DataError with every row that has none.

    `columns` names the columns of `answer` (else `answer` or `label`) and of `choices`, if there are any.
    """
    found, problems = [], []
    for row in rows:
        try:
            found.append(_known(row, extract, columns))
        except ValueError as error:
            problems.append(f"{row.where}: {error}")
    labels = {one.label for one in found}
    if not problems and extract == "label" and len(labels) < 2:
        problems.append(
            f"{found[0].row.where}: all rows have the label {found[0].label!r}; extract: text reads answers"
        )
    if problems:
        raise DataError(problems)
    return found


def first_problems(rows: Iterable[Any], extract: str, columns: Mapping[str, str], count: int = 100) -> list[str]:
    """Return what is wrong with the first rows' right answers; other rejects are left to the gate."""
    found = []
    for row in islice(rows, count):
        if hasattr(row, "extra"):
            try:
                _known(row, extract, columns)
            except ValueError as error:
                found.append(f"{row.where}: {error}")
    # What is wrong with all of them is the set's fault, and one line says so.
    return [f"{found[0]} (so it is in {len(found)} of the first rows)"] if len(found) > 1 else found


def _known(row: Row, extract: str, columns: Mapping[str, str]) -> Known:
    extra: Mapping[str, Any] = getattr(row, "extra", {})
    name = columns.get("answer") or ("answer" if "answer" in extra or "label" not in extra else "label")
    value = extra.get(name)
    if not isinstance(value, str | int | float) or not str(value).strip():
        has = ", ".join(extra) or "no other column"
        raise ValueError(f"{name}: {value!r}, must be the right answer; fix the row, or name its column ({has})")
    options: tuple[str, ...] = ()
    if "choices" in columns or "choices" in extra:
        if extract != "choice":
            raise ValueError(f"choices: extract is {extract}, options are read with extract: choice; say so")
        options = _options(extra.get(columns.get("choices", "choices")))
        row = _with_options(row, options)
    normal = tuple(normalised(option) for option in options)
    return Known(row, _label(value, extract, normal, name), normal)


def _options(value: Any) -> tuple[str, ...]:
    texts = isinstance(value, list) and all(isinstance(one, str) and one.strip() for one in value)
    if not texts or not 2 <= len(value) <= len(LETTERS):
        raise ValueError(f"choices: {value!r}, must be a list of 2 to {len(LETTERS)} texts; fix the row")
    if len({normalised(one) for one in value}) < len(value):
        raise ValueError(f"choices: {value!r}, must differ; fix the row")
    return tuple(value)


def _with_options(row: Row, options: Sequence[str]) -> Row:
    """Return the question with its options below it, as BIG-Bench Hard writes them (arXiv:2210.09261)."""
    if not isinstance(row, Prompt):
        raise ValueError("choices: cannot be written below token ids; write the prompt as text or messages")
    below = "".join(f"\n({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
    if isinstance(row.prompt, str):
        return replace(row, prompt=f"{row.prompt}\nOptions:{below}")
    last = row.prompt[-1]
    return replace(row, prompt=(*row.prompt[:-1], Message(last.role, f"{last.content}\nOptions:{below}")))


def _label(value: str | float, extract: str, options: Sequence[str], name: str) -> str:
    """Return the right answer in the form that answers are read in."""
    text = str(value)
    if extract == "number":
        number = decimal_of(text.strip())
        if number is None:
            raise ValueError(f"{name}: {value!r}, must be a number with extract: number; fix the row")
        return number
    if extract != "choice":
        return normalised(text)
    if isinstance(value, int) and not isinstance(value, bool) and options:
        if not 0 <= value < len(options):
            raise ValueError(
                f"{name}: {value}, must be the place of one of {len(options)} choices, from 0; fix the row"
            )
        return LETTERS[value]
    letter = text.strip(_ENDS)
    if len(letter) == 1 and letter in LETTERS[: len(options) or None]:
        return letter
    if normalised(text) in options:
        return LETTERS[options.index(normalised(text))]
    kinds = "the letter, the text or the place of one of its choices" if options else "a letter such as (A)"
    raise ValueError(f"{name}: {value!r}, must be {kinds}; fix the row, or read answers with extract: text")


# --- answers ----------------------------------------------------------------------------------------------------------


def said(answer: str, extract: str, labels: Iterable[str] = (), options: Sequence[str] = ()) -> str | None:
    """Return what an answer says, comparable with a label; None when nothing can be read from it."""
    answer = answer.rpartition("</think>")[2]
    if extract == "number":
        return _number(answer)
    if extract == "choice":
        return _choice(answer, LETTERS[: len(options) or LETTERS.index(max(labels, default="Z")) + 1], options)
    if extract == "label":
        return _named(answer, labels)
    if extract.startswith(REGEX):
        matches = list(re.finditer(extract.removeprefix(REGEX), answer))
        text = (matches[-1].group(1) if matches[-1].re.groups else matches[-1].group()) if matches else None
        return normalised(text) if text is not None else None
    return normalised(answer) or None


def normalised(text: str) -> str:
    """Return text without what makes no difference; see the top of this file."""
    flat = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return flat.strip(_ENDS) or flat


def decimal_of(text: str) -> str | None:
    """Return a number as all ways to write it come out: `145.0` and `1.45e2` as `145`; None for what is none."""
    text = text.replace("−", "-")
    if not _PLAIN.fullmatch(text):
        return None
    try:
        number = Decimal(re.sub(f",|{_SPACE}", "", text))
    except InvalidOperation:  # an exponent beyond all bounds
        return None
    if abs(number.adjusted()) > 300:
        return None
    return f"{number.normalize() + 0:f}"


def _after(answer: str, mark: re.Pattern[str] = _ANSWER) -> str | None:
    """Return what follows the last mark."""
    found = list(mark.finditer(answer))
    return answer[found[-1].end() :] if found else None


def _number(answer: str) -> str | None:
    stated = _STATED.match(_after(answer) or "")
    written = [stated] if stated else list(_WRITTEN.finditer(answer))
    return decimal_of(written[-1]["number"]) if written else None


def _choice(answer: str, allowed: str, options: Sequence[str]) -> str | None:
    whole = answer.strip().strip(_ENDS)
    if len(whole) == 1 and whole.upper() in allowed:
        return whole.upper()
    tries = [_LETTER.match(_after(answer, _CHOSEN) or ""), _LEADING.match(answer)]
    for found in (*tries, *reversed(list(_BRACKETED.finditer(answer)))):
        if found and (letter := str(found[found.lastindex or 0]).upper()) in allowed:
            return letter
    text = normalised(answer)
    inside = [place for place, option in enumerate(options) if re.search(rf"(?<!\w){re.escape(option)}(?!\w)", text)]
    return LETTERS[inside[0]] if len(inside) == 1 else None


def _named(answer: str, labels: Iterable[str]) -> str | None:
    # The longest first, so that "not valid" is not read as "valid" where it is a label itself.
    one = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    denied = rf"(?:not|cannot|\w+n['’]t)[\s*(\"'“‘]+(?:\w+\s+)?(?:{one})"
    pattern = re.compile(rf"(?<!\w)(?:({one})|{denied})(?!\w)")
    for part, place in ((_after(answer), 0), (answer, -1)):
        if found := [label for label in pattern.findall(normalised(part or "")) if label]:
            return str(found[place])
    return None


# --- figures ----------------------------------------------------------------------------------------------------------


def labelled_metrics(
    name: str,
    truth: Sequence[str],
    read: Sequence[str | None],
    base: Sequence[str | None] | None,
    extract: str,
    seed: int,
) -> dict[str, float]:
    """Return a set's accuracy, its gain over the baseline, what could not be read, and of labels the macro-F1."""
    right = [a == b for a, b in zip(truth, read, strict=True)]
    right_before = [a == b for a, b in zip(truth, base, strict=True)] if base is not None else None
    found = share_metrics(f"{name}_accuracy", right, right_before)
    if extract in ("choice", "label"):
        table = confusion(truth, read)
        found |= with_interval(f"{name}_macro_f1", float(macro_f1(table)), table_interval(table, macro_f1, seed))
    return found | share_metrics(f"{name}_unread", [one is None for one in read], None)
