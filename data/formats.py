"""The formats that rows come in: which fields each has, how it is recognised, and how a record becomes a row.

task        format                fields (optional ones in brackets)
sft         prompt-completion     prompt, completion, [finish]
            messages              messages, [prompt]
            alpaca                instruction, output, [input, system, history]
            sharegpt              conversations, [system, tools]
            token-ids             prompt_ids, completion_ids
            text                  text, [finish]
preference  preference            prompt, chosen, rejected, [margin, messages]
            implicit              chosen, rejected, [margin]: two whole conversations
            hh-rlhf               chosen, rejected: texts with `\\n\\nHuman:` and `\\n\\nAssistant:`
            alpaca                instruction, chosen, rejected, [input, system, history, margin]
            sharegpt              conversations, chosen, rejected, [system, tools, margin]
            message-pairs         chosen_messages, rejected_messages, [margin]
            token-ids             prompt_ids, chosen_ids, rejected_ids, [margin]
unpaired    prompt-completion     prompt, completion, label
            messages              messages, label
            alpaca                instruction, output, label, [input, system, history]
            sharegpt              conversations, label, [system, tools]
            token-ids             prompt_ids, completion_ids, label
prompt      prompt                prompt; every other column is kept as `extra`
            messages              messages
            alpaca                instruction, [input, system, history]
            sharegpt              conversations, [system, tools]
            token-ids             prompt_ids
text        text                  text, [finish]

A message is `{role, content}` or `{from, value}`; its content is text, or a list of parts of type `text`. An Alpaca row
is a conversation: instruction and input, with a blank line between, are what the user says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, get_args

from align_pipeline.data.fields import (
    alpaca_turns,
    begins_dialogue,
    check_answer,
    check_conversation,
    check_differ,
    check_finish,
    check_ids,
    check_label,
    check_margin,
    check_prompt,
    check_same_messages,
    check_same_prompt,
    check_text,
    dialogue_turns,
    is_whole_conversation,
    list_of,
    sharegpt_turns,
)
from align_pipeline.data.rows import (
    Chat,
    Content,
    Example,
    ExampleIds,
    Message,
    Preference,
    PreferenceIds,
    Prompt,
    PromptIds,
    Row,
    Task,
    Text,
    Unpaired,
    UnpairedIds,
)
from align_pipeline.data.sources import Bad, Record
from align_pipeline.pipeline.errors import did_you_mean

FormatName = Literal[
    "prompt-completion",
    "messages",
    "alpaca",
    "sharegpt",
    "token-ids",
    "text",
    "preference",
    "implicit",
    "hh-rlhf",
    "message-pairs",
    "prompt",
]
"""What `format:` may say."""

# fmt: off
METADATA = frozenset({
    "id", "_id", "idx", "index", "uuid", "row_id", "prompt_id", "conversation_id", "message_id", "source",
    "dataset", "origin", "url", "subset", "split", "category", "task", "topic", "tags", "lang", "language",
    "license", "created_at", "updated_at", "timestamp", "date", "model", "chosen_model", "rejected_model",
    "score_chosen", "score_rejected", "metadata", "meta", "note",
})
# fmt: on
"""Columns that describe a row and change nothing: ignored in every task but `prompt`, which keeps them as `extra`."""
FEEDBACK = "fb_"
"""What the columns begin with in which feedback tells where a row comes from; they are metadata too."""


def is_metadata(column: str) -> bool:
    return column in METADATA or column.startswith(FEEDBACK)


@dataclass(frozen=True)
class Format:
    """One way to write a row."""

    name: FormatName
    required: tuple[str, ...]
    build: Callable[[str, Record], Row]
    optional: tuple[str, ...] = ()
    test: Callable[[Record], bool] = lambda record: True
    """Whether a record that has the required fields is of this format."""

    @property
    def fields(self) -> tuple[str, ...]:
        return (*self.required, *self.optional)


# Recognition: rows say what they are, and between two readings nobody guesses.


def recognise(records: Sequence[Record], formats: Sequence[Format], task: str) -> Format | tuple[int, str]:
    """Return the format that most of the first records have, or the number of a record and what is wrong.

    Of two formats of one record the one with more fields counts when it has all of the other's. When two formats are
    equally common because records have both, only `format:` can tell; when records differ, the first one counts.
    """
    readings = [_readings(record, formats) for record in records]
    counts = {one: sum(one in found for found in readings) for one in formats}
    most = max(counts.values())
    if not most:
        nearest = _nearest(records[0], formats, task)
        return (0, nearest) if isinstance(nearest, str) else nearest
    for number, (record, found) in enumerate(zip(records, readings, strict=True)):
        likely = [one for one in found if counts[one] == most]
        if len(likely) > 1:
            names = " and ".join(f"{one.name} ({', '.join(one.required)})" for one in likely)
            return number, f"{list_of(record)}: can be read as {names}; say which: format: {likely[0].name}"
        if likely:
            return likely[0]
    raise AssertionError("some record has the commonest format")


def likeness(records: Sequence[Record], formats: Sequence[Format]) -> float:
    """Return how many required fields of a format the first records have; a misspelt one counts a little less.

    Half of the records must have all of them; 0 when there is no such format.
    """
    most = 0.0
    for each in formats:
        scores = [_found(record, each) for record in records]
        whole = [score for score in scores if score > len(each.required) - 1 and score >= 1]
        if scores and 2 * len(whole) >= len(scores):
            most = max(most, max(whole))
    return most


def _found(record: Record, format: Format) -> float:
    """Return how many required fields a record has, misspelt ones counted as nine tenths."""
    names = [key for key, value in record.items() if value is not None]
    missing = [key for key in format.required if key not in names]
    near = sum(bool(get_close_matches(key, names, 1, 0.8)) for key in missing)
    return len(format.required) - len(missing) + 0.9 * near


def _readings(record: Record, formats: Sequence[Format]) -> list[Format]:
    """Return the formats whose required fields a record has, but for those that ask for less than another.

    Token ids are exact, so the text that may stand beside them is no second reading.
    """
    names = {key for key, value in record.items() if value is not None}
    found = [one for one in formats if names >= set(one.required) and one.test(record)]
    found = [one for one in found if one.name == "token-ids"] or found
    return [one for one in found if not any(set(one.required) < set(other.required) for other in found)]


def _nearest(record: Record, formats: Sequence[Format], task: str) -> Format | str:
    """Return the format that a record has most of, misspelt or missing fields aside; or what is wrong with all."""

    def score(each: Format) -> float:
        found = sum(2 if key in record else len(get_close_matches(key, record, 1, 0.8)) for key in each.required)
        return found / len(each.required)

    best = max(formats, key=score)
    if score(best):
        return best
    wanted = " or ".join(dict.fromkeys("{" + ", ".join(each.required) + "}" for each in formats))
    example = ", ".join(
        f"{ours}: {theirs}"
        for ours, theirs in zip(formats[0].required, [*_texts(record), "NAME", "NAME"], strict=False)
    )
    return (
        f"{list_of(record) or 'no fields'}: no format of task {task}, which reads {wanted}; rename or map them "
        f"(columns: {{{example}}})"
    )


def _texts(record: Record) -> list[str]:
    """Return the fields that hold text and describe nothing, in the order of the file: what a map may mean."""
    return [key for key, value in record.items() if isinstance(value, str) and value and not is_metadata(key)]


def check_fields(record: Record, format: Format, known: set[str], *, named: bool) -> None:
    """Refuse fields that are missing or unknown; a null field counts as absent.

    `named` says that the user named the format: other fields are then no question, unless they look like misspelt ones.
    """
    required = format.required
    missing = next((key for key in required if record.get(key) is None), None)
    if missing is None and len(record) == len(required):
        return
    for key, value in record.items():
        if key in required or key in format.optional or value is None or is_metadata(key):
            continue
        if key in known and (named or (format.name == "token-ids" and missing is None)):
            continue
        if key in known:
            rule = f"the rows of this file are read as {format.name} ({', '.join(required)})"
            raise Bad(
                f"{key}: belongs to another format, {rule}; use one format per file, name it with format:, or map with "
                "columns",
                "another format",
            )
        lacking = [one for one in required if record.get(one) is None]
        near = did_you_mean(key, lacking or (format.fields if named else known))
        if near or (missing is None and not named):
            raise Bad(
                f"{key}: unknown field{near or '; remove it, or name the wanted ones with columns'}", "unknown field"
            )
    if missing is not None:
        state = "null" if missing in record else "missing"
        has = list_of(key for key, value in record.items() if value is not None) or "nothing"
        needs = f"rows of this file need {', '.join(required)} (this one has {has})"
        raise Bad(f"{missing}: {state}, {needs}; add or map it", "missing field")


# Records become rows.


def _build_chat(where: str, record: Record) -> Chat:
    messages = check_conversation(record["messages"], "messages", ends="assistant")
    if record.get("prompt") is not None:
        check_same_prompt(
            record["prompt"], tuple(part for part in messages[:2] if part.role != "assistant"), "messages"
        )
    return Chat(where, messages)


def _build_chat_sharegpt(where: str, record: Record) -> Chat:
    return Chat(where, sharegpt_turns(record, ends="assistant"))


def _build_text(where: str, record: Record) -> Text:
    return Text(where, check_text(record["text"], "text"), check_finish(record))


def _build_example(where: str, record: Record) -> Example:
    prompt = check_prompt(record["prompt"], "prompt")
    return Example(where, prompt, check_answer(record["completion"], "completion", prompt), check_finish(record))


def _build_example_alpaca(where: str, record: Record) -> Example:
    return Example(where, alpaca_turns(record), (Message("assistant", check_text(record["output"], "output")),))


def _build_example_ids(where: str, record: Record) -> ExampleIds:
    prompt = check_ids(record["prompt_ids"], "prompt_ids", empty=True)
    return ExampleIds(where, prompt, check_ids(record["completion_ids"], "completion_ids"))


def _build_preference(where: str, record: Record) -> Preference:
    if is_whole_conversation(record["chosen"]) and is_whole_conversation(record["rejected"]):
        row = _build_implicit(where, record)
        check_same_prompt(record["prompt"], row.prompt, "chosen and rejected")
        check_same_messages(record, row)
        return row
    if type(record["prompt"]) is str and all(begins_dialogue(record[side]) for side in _SIDES):
        row = _build_hh(where, record)
        check_same_prompt(record["prompt"], row.prompt, "chosen and rejected")
        return row
    prompt = check_prompt(record["prompt"], "prompt")
    chosen = check_answer(record["chosen"], "chosen", prompt)
    rejected = check_answer(record["rejected"], "rejected", prompt)
    row = _pair(where, prompt, chosen, rejected, record)
    check_same_messages(record, row)
    return row


def _build_preference_alpaca(where: str, record: Record) -> Preference:
    prompt = alpaca_turns(record)
    chosen, rejected = (
        (Message("assistant", check_text(record[side], side)),)
        if type(record[side]) is str
        else check_answer(record[side], side, prompt)
        for side in ("chosen", "rejected")
    )
    return _pair(where, prompt, chosen, rejected, record)


def _build_preference_sharegpt(where: str, record: Record) -> Preference:
    prompt = sharegpt_turns(record, ends="user")
    chosen, rejected = (check_answer(record[side], side, prompt) for side in ("chosen", "rejected"))
    return _pair(where, prompt, chosen, rejected, record)


def _build_implicit(where: str, record: Record) -> Preference:
    """Take the turns that both conversations begin with as the prompt."""
    if isinstance(record["chosen"], str) and isinstance(record["rejected"], str):
        raise Bad(
            "prompt: missing, two plain strings do not say where the prompt ends; add a prompt field", "missing field"
        )
    return _shared_start(where, [check_conversation(record[key], key, ends="assistant") for key in _SIDES], record)


def _build_hh(where: str, record: Record) -> Preference:
    return _shared_start(where, [dialogue_turns(record[key], key) for key in _SIDES], record)


def _build_message_pairs(where: str, record: Record) -> Preference:
    keys = ("chosen_messages", "rejected_messages")
    return _shared_start(where, [check_conversation(record[key], key, ends="assistant") for key in keys], record)


_SIDES = ("chosen", "rejected")


def _shared_start(where: str, sides: Sequence[tuple[Message, ...]], record: Record) -> Preference:
    chosen, rejected = sides
    check_differ(chosen, rejected, "chosen")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared or len(chosen) != shared + 1 or len(rejected) != shared + 1:
        what = f"conversations part at turn {shared + 1} of {len(chosen)} and {len(rejected)}"
        remedy = "cut both after the first that differs" if 0 < shared < min(len(chosen), len(rejected)) else "drop it"
        raise Bad(f"chosen: {what}, a pair may differ in its last answer only; {remedy}", "prompts differ")
    return _pair(where, chosen[:shared], chosen[shared:], rejected[shared:], record)


def _pair(where: str, prompt: Content, chosen: Content, rejected: Content, record: Record) -> Preference:
    check_differ(chosen, rejected, "chosen")
    return Preference(where, prompt, chosen, rejected, check_margin(record))


def _build_preference_ids(where: str, record: Record) -> PreferenceIds:
    prompt = check_ids(record["prompt_ids"], "prompt_ids")
    chosen, rejected = check_ids(record["chosen_ids"], "chosen_ids"), check_ids(record["rejected_ids"], "rejected_ids")
    check_differ(chosen, rejected, "chosen_ids")
    return PreferenceIds(where, prompt, chosen, rejected, check_margin(record))


def _build_unpaired(where: str, record: Record) -> Unpaired:
    prompt = check_prompt(record["prompt"], "prompt")
    return Unpaired(where, prompt, check_answer(record["completion"], "completion", prompt), check_label(record))


def _build_unpaired_alpaca(where: str, record: Record) -> Unpaired:
    answer = (Message("assistant", check_text(record["output"], "output")),)
    return Unpaired(where, alpaca_turns(record), answer, check_label(record))


def _build_unpaired_chat(where: str, record: Record) -> Unpaired:
    """Take the last turn as the answer that was judged."""
    messages = check_conversation(record["messages"], "messages", ends="assistant")
    return Unpaired(where, messages[:-1], messages[-1:], check_label(record))


def _build_unpaired_sharegpt(where: str, record: Record) -> Unpaired:
    messages = sharegpt_turns(record, ends="assistant")
    return Unpaired(where, messages[:-1], messages[-1:], check_label(record))


def _build_unpaired_ids(where: str, record: Record) -> UnpairedIds:
    prompt = check_ids(record["prompt_ids"], "prompt_ids")
    return UnpairedIds(where, prompt, check_ids(record["completion_ids"], "completion_ids"), check_label(record))


def _build_prompt(where: str, record: Record) -> Prompt:
    return Prompt(where, check_prompt(record["prompt"], "prompt"), record.get("extra", {}))


def _build_prompt_chat(where: str, record: Record) -> Prompt:
    return Prompt(where, check_conversation(record["messages"], "messages", ends="user"), record.get("extra", {}))


def _build_prompt_alpaca(where: str, record: Record) -> Prompt:
    return Prompt(where, alpaca_turns(record), record.get("extra", {}))


def _build_prompt_sharegpt(where: str, record: Record) -> Prompt:
    return Prompt(where, sharegpt_turns(record, ends="user"), record.get("extra", {}))


def _build_prompt_ids(where: str, record: Record) -> PromptIds:
    return PromptIds(where, check_ids(record["prompt_ids"], "prompt_ids"), record.get("extra", {}))


def _is_dialogue(record: Record) -> bool:
    return any(map(begins_dialogue, (record[key] for key in _SIDES)))


_ALPACA = ("input", "system", "history")
_SHAREGPT = ("system", "tools")

FORMATS: dict[Task, tuple[Format, ...]] = {
    "sft": (
        Format("prompt-completion", ("prompt", "completion"), _build_example, ("finish",)),
        Format("messages", ("messages",), _build_chat, ("prompt",)),
        Format("alpaca", ("instruction", "output"), _build_example_alpaca, _ALPACA),
        Format("sharegpt", ("conversations",), _build_chat_sharegpt, _SHAREGPT),
        Format("token-ids", ("prompt_ids", "completion_ids"), _build_example_ids),
        Format("text", ("text",), _build_text, ("finish",)),
    ),
    "preference": (
        Format("preference", ("prompt", "chosen", "rejected"), _build_preference, ("margin", "messages")),
        Format("implicit", _SIDES, _build_implicit, ("margin",), lambda record: not _is_dialogue(record)),
        Format("hh-rlhf", _SIDES, _build_hh, ("margin",), _is_dialogue),
        Format("alpaca", ("instruction", *_SIDES), _build_preference_alpaca, (*_ALPACA, "margin")),
        Format("sharegpt", ("conversations", *_SIDES), _build_preference_sharegpt, (*_SHAREGPT, "margin")),
        Format("message-pairs", ("chosen_messages", "rejected_messages"), _build_message_pairs, ("margin",)),
        Format("token-ids", ("prompt_ids", "chosen_ids", "rejected_ids"), _build_preference_ids, ("margin",)),
    ),
    "unpaired": (
        Format("prompt-completion", ("prompt", "completion", "label"), _build_unpaired),
        Format("messages", ("messages", "label"), _build_unpaired_chat),
        Format("alpaca", ("instruction", "output", "label"), _build_unpaired_alpaca, _ALPACA),
        Format("sharegpt", ("conversations", "label"), _build_unpaired_sharegpt, _SHAREGPT),
        Format("token-ids", ("prompt_ids", "completion_ids", "label"), _build_unpaired_ids),
    ),
    "prompt": (
        Format("prompt", ("prompt",), _build_prompt),
        Format("messages", ("messages",), _build_prompt_chat),
        Format("alpaca", ("instruction",), _build_prompt_alpaca, _ALPACA),
        Format("sharegpt", ("conversations",), _build_prompt_sharegpt, _SHAREGPT),
        Format("token-ids", ("prompt_ids",), _build_prompt_ids),
    ),
    "text": (Format("text", ("text",), _build_text, ("finish",)),),
}

assert {one.name for formats in FORMATS.values() for one in formats} == set(get_args(FormatName))
