"""What is learnt is the assistant's turns with their end token: spelled out for the templates of five families.

Each family gets a small byte-level BPE tokenizer with its special tokens and, like the real one, tokens that hold two
line breaks; the templates in `templates/` print what the published ones print for conversations without tools.
"""

from __future__ import annotations

import pickle
import random
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from align_pipeline.data.chat import (
    IGNORED,
    Encoder,
    encode_all,
    encode_example,
    encode_preference,
    encode_prompt,
    encode_unpaired,
    without_margin,
)
from align_pipeline.data.rows import Chat, Example, Message, Preference, PreferenceIds, Prompt, Text, Unpaired
from align_pipeline.data.sources import Bad
from align_pipeline.pipeline.errors import DataError

TEMPLATES = Path(__file__).parent / "templates"
WORDS = (
    "Paris is the capital.\n\nThe sum is five.\n\n\nWhat is the capital of France?\n\nPlease add two and three.  Bye."
)
# How Qwen and Llama 3 part a text before they merge bytes: line breaks in a row are one part.
PARTS = r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Family:
    special: tuple[str, ...]
    eos: str
    end: str
    bos: str | None = None
    plain: tuple[str, ...] = ()
    """Added tokens that are not special."""
    swallows: bool = False
    """Whether its special tokens swallow the white space that follows them, as Phi-3's do."""
    normal: bool = False
    """Whether the tokenizer composes characters (NFC), as Qwen's does."""


QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FAMILIES = {
    "qwen2_5": Family(QWEN, "<|im_end|>", "<|im_end|>", normal=True),
    "qwen3": Family(QWEN, "<|im_end|>", "<|im_end|>", plain=("<think>", "</think>"), normal=True),
    "llama3": Family(
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|end_of_text|>",
        "<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    "gemma": Family(
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<end_of_turn>", "<bos>", ("\n\n",)
    ),
    "phi3": Family(
        ("<s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
        "<|endoftext|>",
        "<|end|>",
        bos="<s>",
        swallows=True,
    ),
}


@cache
def tokenizer_of(name: str) -> Any:
    """Train a tokenizer of about 300 tokens, with the family's special tokens and its template."""
    return make_tokenizer(FAMILIES[name], (TEMPLATES / f"{name}.jinja").read_text("utf-8"))


def make_tokenizer(family: Family, template: str) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC() if family.normal else None
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PARTS), "isolated"), byte_level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([WORDS], BpeTrainer(vocab_size=310, initial_alphabet=alphabet, show_progress=False))
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, rstrip=family.swallows) for token in family.special]
    )
    backend.add_tokens([AddedToken(token, normalized=False) for token in family.plain])
    if family.bos:
        bos = (family.bos, backend.token_to_id(family.bos))
        backend.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=[bos])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=family.bos, eos_token=family.eos)
    tokenizer.chat_template = template
    return tokenizer


def talk(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    turns = [Message(("user", "assistant")[index % 2], content) for index, content in enumerate(contents)]
    return (*([] if system is None else [Message("system", system)]), *turns)


def parts(tokenizer: Any, row: dict[str, list[int]]) -> list[str]:
    """Return the row's text in parts that are read and learnt by turns, the first one read."""
    found: list[list[int]] = [[]]
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        if (label != IGNORED) == (len(found) % 2 == 1):
            found.append([])
        assert label in (IGNORED, token)
        found[-1].append(token)
    return [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in found]


def learnt(name: str, messages: tuple[Message, ...]) -> list[str]:
    tokenizer = tokenizer_of(name)
    return parts(tokenizer, encode_example(Chat("x.jsonl:7", messages), tokenizer, max_length=None))[1::2]


# --- spelled out ------------------------------------------------------------------------------------------------------

ASK, TELL, AND, FIVE = "The capital?", "Paris is the capital.", "Two and three?", "The sum is five."
THOUGHTS = ("<think>\nFrance, so\n</think>\n\nParis.", "<think>\nTwo, then three.\n</think>\n\nFive.")

GOLDEN: dict[str, dict[str, list[str] | str]] = {
    # Of the first three cases the whole row, in parts that are read and learnt by turns; of the others what is learnt;
    # of a row that is refused the cause.
    "qwen2_5": {
        "two exchanges": [
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\nThe capital?<|im_end|>\n<|im_start|>assistant\n",
            "Paris is the capital.<|im_end|>",
            "\n<|im_start|>user\nTwo and three?<|im_end|>\n<|im_start|>assistant\n",
            "The sum is five.<|im_end|>",
        ],
        "a system turn": [
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nThe capital?<|im_end|>\n"
            "<|im_start|>assistant\n",
            "Paris is the capital.<|im_end|>",
        ],
        "an empty system turn": [
            "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nThe capital?<|im_end|>\n<|im_start|>assistant\n",
            "Paris is the capital.<|im_end|>",
        ],
        "one exchange": ["Paris is the capital.<|im_end|>"],
        "white space": ["  Paris. \n<|im_end|>", " Five.  <|im_end|>"],
        "a line break first": "runs into answer",
        "repeated": ["Yes.<|im_end|>", "Yes.<|im_end|>", "Yes.<|im_end|>"],
        "answer is question": ["Yes?<|im_end|>", "assistant<|im_end|>"],
        "unicode": ["Zürich 🦊 日本語 👩‍🚀<|im_end|>", "🇨🇭é<|im_end|>"],
        "thoughts": [
            "<think>\nFrance, so\n</think>\n\nParis.<|im_end|>",
            "<think>\nTwo, then three.\n</think>\n\nFive.<|im_end|>",
        ],
        "half a marker": ["<|im_end\n|><start_of_\nmodel\nassistant\n<|im_start<|im_end|>"],
    },
    "qwen3": {
        "two exchanges": [
            "<|im_start|>user\nThe capital?<|im_end|>\n<|im_start|>assistant\n",
            "Paris is the capital.<|im_end|>",
            "\n<|im_start|>user\nTwo and three?<|im_end|>\n<|im_start|>assistant\n",
            "<think>\n\n</think>\n\nThe sum is five.<|im_end|>",
        ],
        "a system turn": [
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nThe capital?<|im_end|>\n"
            "<|im_start|>assistant\n",
            "<think>\n\n</think>\n\nParis is the capital.<|im_end|>",
        ],
        "an empty system turn": [
            "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nThe capital?<|im_end|>\n<|im_start|>assistant\n",
            "<think>\n\n</think>\n\nParis is the capital.<|im_end|>",
        ],
        "one exchange": ["<think>\n\n</think>\n\nParis is the capital.<|im_end|>"],
        "white space": ["  Paris. \n<|im_end|>", "<think>\n\n</think>\n\n Five.  <|im_end|>"],
        "a line break first": ["<think>\n\n</think>\n\nParis.<|im_end|>"],
        "repeated": ["Yes.<|im_end|>", "Yes.<|im_end|>", "<think>\n\n</think>\n\nYes.<|im_end|>"],
        "answer is question": ["Yes?<|im_end|>", "<think>\n\n</think>\n\nassistant<|im_end|>"],
        "unicode": ["Zürich 🦊 日本語 👩‍🚀<|im_end|>", "<think>\n\n</think>\n\n🇨🇭é<|im_end|>"],
        "thoughts": ["Paris.<|im_end|>", "<think>\nTwo, then three.\n</think>\n\nFive.<|im_end|>"],
        "half a marker": [
            "<think>\n\n</think>\n\n<|im_end\n|><start_of_\nmodel\nassistant\n<|im_start<|im_end|>",
        ],
    },
    "llama3": {
        "two exchanges": [
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nThe capital?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "Paris is the capital.<|eot_id|>",
            "<|start_header_id|>user<|end_header_id|>\n\nTwo and three?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "The sum is five.<|eot_id|>",
        ],
        "a system turn": [
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nThe capital?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "Paris is the capital.<|eot_id|>",
        ],
        "an empty system turn": [
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nThe capital?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "Paris is the capital.<|eot_id|>",
        ],
        "one exchange": ["Paris is the capital.<|eot_id|>"],
        "white space": ["Paris.<|eot_id|>", "Five.<|eot_id|>"],
        "a line break first": ["Paris.<|eot_id|>"],
        "repeated": ["Yes.<|eot_id|>", "Yes.<|eot_id|>", "Yes.<|eot_id|>"],
        "answer is question": ["Yes?<|eot_id|>", "assistant<|eot_id|>"],
        "unicode": ["Zürich 🦊 日本語 👩‍🚀<|eot_id|>", "🇨🇭é<|eot_id|>"],
        "thoughts": [
            "<think>\nFrance, so\n</think>\n\nParis.<|eot_id|>",
            "<think>\nTwo, then three.\n</think>\n\nFive.<|eot_id|>",
        ],
        "half a marker": ["<|im_end\n|><start_of_\nmodel\nassistant\n<|im_start<|eot_id|>"],
    },
    "gemma": {
        "two exchanges": [
            "<bos><start_of_turn>user\nThe capital?<end_of_turn>\n<start_of_turn>model\n",
            "Paris is the capital.<end_of_turn>",
            "\n<start_of_turn>user\nTwo and three?<end_of_turn>\n<start_of_turn>model\n",
            "The sum is five.<end_of_turn>",
        ],
        "a system turn": "template",
        "an empty system turn": "template",
        "one exchange": ["Paris is the capital.<end_of_turn>"],
        "white space": ["Paris.<end_of_turn>", "Five.<end_of_turn>"],
        "a line break first": ["Paris.<end_of_turn>"],
        "repeated": ["Yes.<end_of_turn>", "Yes.<end_of_turn>", "Yes.<end_of_turn>"],
        "answer is question": ["Yes?<end_of_turn>", "assistant<end_of_turn>"],
        "unicode": ["Zürich 🦊 日本語 👩‍🚀<end_of_turn>", "🇨🇭é<end_of_turn>"],
        "thoughts": [
            "<think>\nFrance, so\n</think>\n\nParis.<end_of_turn>",
            "<think>\nTwo, then three.\n</think>\n\nFive.<end_of_turn>",
        ],
        "half a marker": ["<|im_end\n|><start_of_\nmodel\nassistant\n<|im_start<end_of_turn>"],
    },
    "phi3": {  # its special tokens swallow the white space after them, so none of it is a token
        "two exchanges": [
            "<|user|>The capital?<|end|><|assistant|>",
            "Paris is the capital.<|end|>",
            "<|user|>Two and three?<|end|><|assistant|>",
            "The sum is five.<|end|>",
        ],
        "a system turn": [
            "<|system|>Be brief.<|end|><|user|>The capital?<|end|><|assistant|>",
            "Paris is the capital.<|end|>",
        ],
        "an empty system turn": [
            "<|system|><|end|><|user|>The capital?<|end|><|assistant|>",
            "Paris is the capital.<|end|>",
        ],
        "one exchange": ["Paris is the capital.<|end|>"],
        "white space": ["Paris. \n<|end|>", "Five.  <|end|>"],
        "a line break first": ["Paris.<|end|>"],
        "repeated": ["Yes.<|end|>", "Yes.<|end|>", "Yes.<|end|>"],
        "answer is question": ["Yes?<|end|>", "assistant<|end|>"],
        "unicode": ["Zürich 🦊 日本語 👩‍🚀<|end|>", "🇨🇭é<|end|>"],
        "thoughts": [
            "<think>\nFrance, so\n</think>\n\nParis.<|end|>",
            "<think>\nTwo, then three.\n</think>\n\nFive.<|end|>",
        ],
        "half a marker": ["<|im_end\n|><start_of_\nmodel\nassistant\n<|im_start<|end|>"],
    },
}

TALKS = {
    "two exchanges": talk(ASK, TELL, AND, FIVE),
    "a system turn": talk(ASK, TELL, system="Be brief."),
    "an empty system turn": talk(ASK, TELL, system=""),
    "one exchange": talk(ASK, TELL),
    "white space": talk(" Where? ", "  Paris. \n", "\nHow many?", " Five.  "),
    "a line break first": talk(ASK, "\nParis."),
    "repeated": talk("Yes?", "Yes.", "Yes.", "Yes.", "Yes?", "Yes."),
    "answer is question": talk("Yes?", "Yes?", "assistant", "assistant"),
    "unicode": talk("🦊?", "Zürich 🦊 日本語 👩‍🚀", "Wo?", "🇨🇭é"),
    "thoughts": talk(ASK, THOUGHTS[0], AND, THOUGHTS[1]),
    "half a marker": talk("<|im_start", "<|im_end\n|><start_of_\nmodel\nassistant\n<|im_start"),
}
CASES = [(name, case) for name in FAMILIES for case in TALKS]


ACCEPTED = [(name, case) for name, case in CASES if isinstance(GOLDEN[name][case], list)]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_what_is_learnt_is_spelled_out(name: str, case: str) -> None:
    expected, tokenizer = GOLDEN[name][case], tokenizer_of(name)
    if isinstance(expected, str):
        with pytest.raises(Bad) as caught:
            Encoder("sft", tokenizer, max_length=None)(Chat("x.jsonl:7", TALKS[case]))
        assert caught.value.cause == expected
        return
    whole = parts(tokenizer, encode_example(Chat("x.jsonl:7", TALKS[case]), tokenizer, max_length=None))
    is_whole = case in ("two exchanges", "a system turn", "an empty system turn")
    assert (whole if is_whole else whole[1::2]) == expected


@pytest.mark.parametrize(("name", "case"), ACCEPTED)
def test_each_turn_follows_the_prompt_that_asks_for_it_and_ends_with_the_end_token(name: str, case: str) -> None:
    tokenizer, family, messages = tokenizer_of(name), FAMILIES[name], TALKS[case]
    row = encode_example(Chat("x:1", messages), tokenizer, max_length=None)
    ids, labels = row["input_ids"], row["labels"]
    end = tokenizer.convert_tokens_to_ids(family.end)
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    stop = 0
    for index in turns:
        prompt = encode_prompt(Prompt("x:1", messages[:index]), tokenizer)["prompt_ids"]
        assert ids[: len(prompt)] == prompt
        assert set(labels[stop : len(prompt)]) == {IGNORED}
        stop = ids.index(end, len(prompt)) + 1
        assert labels[len(prompt) : stop] == ids[len(prompt) : stop]
    assert stop == len(ids) and labels.count(end) == len(turns)
    assert ids.count(tokenizer.bos_token_id) == ("bos_token" in tokenizer.chat_template)


@pytest.mark.parametrize(("name", "case"), ACCEPTED)
def test_the_last_answer_has_the_same_ids_in_every_format(name: str, case: str) -> None:
    tokenizer, messages = tokenizer_of(name), TALKS[case]
    prompt, answer, end = messages[:-1], messages[-1:], tokenizer.convert_tokens_to_ids(FAMILIES[name].end)
    chat = encode_example(Chat("x:1", messages), tokenizer, max_length=None)
    example = encode_example(Example("x:1", prompt, answer), tokenizer, max_length=None)
    asked = encode_prompt(Prompt("x:1", prompt), tokenizer)["prompt_ids"]
    assert example["input_ids"] == chat["input_ids"]
    assert example["labels"] == [*[IGNORED] * len(asked), *chat["labels"][len(asked) :]]
    if sum(message.role == "assistant" for message in messages) == 1:
        assert example == chat
    completion = chat["input_ids"][len(asked) :]
    assert completion[-1] == end

    other = (Message("assistant", "No."),)
    pair = encode_preference(Preference("x:1", prompt, answer, other), tokenizer, max_length=None)
    assert (pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"][-1]) == (asked, completion, end)
    single = encode_unpaired(Unpaired("x:1", prompt, answer, True), tokenizer, max_length=None)
    assert (single["prompt_ids"], single["completion_ids"]) == (asked, completion)
    cut_off = encode_example(Example("x:1", prompt, answer, finish="length"), tokenizer, max_length=None)
    assert cut_off == {key: ids[:-1] for key, ids in example.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_with_loss_on_all_the_row_is_all_that_the_template_prints(name: str) -> None:
    tokenizer, messages = tokenizer_of(name), TALKS["two exchanges"]
    printed = tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in messages], return_dict=True
    )["input_ids"]
    for row in (Chat("x:1", messages), Example("x:1", messages[:-1], messages[-1:])):
        assert encode_example(row, tokenizer, max_length=None, loss_on="all") == {
            "input_ids": printed,
            "labels": printed,
        }
    learnt_only = encode_example(Chat("x:1", messages), tokenizer, max_length=None)["input_ids"]
    assert learnt_only == printed[: len(learnt_only)]


# --- special tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_words_that_hold_a_special_token_are_refused(name: str) -> None:
    tokenizer, family = tokenizer_of(name), FAMILIES[name]
    for token in (family.end, family.special[0]):
        question = talk(f"I typed {token} twice")
        for encoder, row, field in (
            (
                Encoder("sft", tokenizer, max_length=None),
                Chat("x:1", (*question, Message("assistant", "So?"))),
                "messages",
            ),
            (Encoder("prompt", tokenizer, max_length=None), Prompt("x:1", question), "prompt"),
            (Encoder("sft", tokenizer, max_length=None), Example("x:1", question, talk("a", "b")[1:]), "prompt"),
        ):
            with pytest.raises(Bad) as caught:
                encoder(row)
            assert caught.value.cause == "special token"
            assert caught.value.problem.startswith(f"{field}[0].content: holds {token!r} at 8, ")
        row = Preference("x:1", talk(ASK), talk("a", "b")[1:], (Message("assistant", token),))
        with pytest.raises(DataError, match=r"^x:1: rejected\[0\]\.content: holds .* at 0, words must not hold"):
            encode_preference(row, tokenizer, max_length=None)
    # Plain text is taken as it is: whoever writes the tokens there means them.
    ids = encode_example(Text("x:1", f"{family.end}a{family.eos}"), tokenizer, max_length=None)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1 + (family.end == family.eos)


# --- templates that are less plain ------------------------------------------------------------------------------------

CHATML = FAMILIES["qwen2_5"]
DUE = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def turns_of(template: str, messages: tuple[Message, ...], family: Family = CHATML) -> list[str]:
    tokenizer = make_tokenizer(family, template)
    return parts(tokenizer, encode_example(Chat("x.jsonl:7", messages), tokenizer, max_length=None))[1::2]


def test_a_system_turn_that_moves_to_the_last_question() -> None:
    """As Mistral's does: the prompts of earlier answers are not what the whole conversation begins with."""
    template = (
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}"
        "{% if m.role == 'user' %}[INST] {% if loop.last or loop.revindex == 2 and not add_generation_prompt %}"
        "{{ system }}\n\n{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content | trim }}<|im_end|>{% endif %}"
        "{% endfor %}"
    )
    family = Family(("<|im_end|>",), "<|im_end|>", "<|im_end|>")
    tokenizer = make_tokenizer(family, template)
    last = talk(ASK, TELL, AND, FIVE, system="Be brief.")
    ours = encode_example(Example("x:1", last[:-1], last[-1:]), tokenizer, max_length=None)
    assert parts(tokenizer, ours)[1::2] == [" The sum is five.<|im_end|>"]
    with pytest.raises(DataError, match=r"^x:1: messages: .*generation.*keep only the last answer"):
        encode_example(Chat("x:1", last), tokenizer, max_length=None)


def test_a_prompt_that_opens_a_thought() -> None:
    """As Qwen3.5's does; of an answer without one only what follows its header is learnt."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.content.split('</think>')[0] if '</think>' in "
        "m.content else '' }}\n</think>\n\n{% endif %}{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    family = FAMILIES["qwen3"]
    # The line break that the prompt ends with and the next one are one token, whatever the answer is: it is learnt.
    assert turns_of(template, talk(ASK, TELL, AND, FIVE), family) == [
        "Paris is the capital.<|im_end|>",
        "\n\n</think>\n\nThe sum is five.<|im_end|>",
    ]
    assert turns_of(template, talk(ASK, "so</think>Paris.", AND, "two</think>Five."), family) == [
        "Paris.<|im_end|>",
        "two\n</think>\n\nFive.<|im_end|>",
    ]


def test_a_prompt_that_depends_on_the_words() -> None:
    """As SmolLM3's does, which is told in the system turn not to think."""
    template = (
        "{% set quick = '/no_think' in messages[0].content %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if quick and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if quick %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    answers = ["Paris is the capital.<|im_end|>", "The sum is five.<|im_end|>"]
    for system in ("Be brief.", "Be brief. /no_think"):
        assert turns_of(template, talk(ASK, TELL, AND, FIVE, system=system), FAMILIES["qwen3"]) == answers


def test_words_that_are_printed_in_another_form() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ (m.content | tojson) if m.role == 'assistant' else "
        "(m.content | upper) }}<|im_end|>\n{% endfor %}" + DUE
    )
    assert turns_of(template, talk('a "b" c', 'say "hi"\n', "ok?", "ok\\")) == [
        '"say \\"hi\\"\\n"<|im_end|>',
        '"ok\\\\"<|im_end|>',
    ]


def test_an_answer_that_is_printed_twice_or_not_at_all_or_counted_is_refused() -> None:
    twice = (
        "{% if messages | length > 2 %}{{ messages[1].content }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + DUE
    )
    late = "{% for m in messages[-2:] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + DUE
    counted = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% if m.role == 'assistant' %}"
        "{{ m.content | length }} letters\n{% endif %}{% endfor %}" + DUE
    )
    for template in (twice, late, counted):
        with pytest.raises(DataError, match=r"^x.jsonl:7: messages: what the chat template prints around an answer"):
            turns_of(template, talk(ASK, TELL, AND, FIVE))


def test_an_end_that_depends_on_other_words_is_refused() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if m.role == 'user' or '!' not in messages[0].content %}<|im_end|>{% endif %}\n{% endfor %}" + DUE
    )
    assert turns_of(template, talk("Say", TELL, AND, FIVE)) == [f"{TELL}<|im_end|>", f"{FIVE}<|im_end|>"]
    with pytest.raises(DataError, match=r"^x.jsonl:7: messages: what the chat template prints"):
        turns_of(template, talk("Say!", TELL, AND, FIVE))


def test_a_prompt_that_is_printed_differently_before_each_answer_of_a_pair_is_refused() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ '!' if '!' in messages[-1].content }}\n"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + DUE
    )
    row = Preference("x:1", talk(ASK), talk("", "Paris!")[1:], talk("", "Bonn.")[1:])
    with pytest.raises(DataError, match=r"^x:1: prompt: the chat template prints it differently before chosen"):
        encode_preference(row, make_tokenizer(CHATML, template), max_length=None)


def test_words_that_become_the_end_token_are_refused() -> None:
    """The tokenizer makes letters small before it looks for its end token."""
    from tokenizers import AddedToken, normalizers

    tokenizer = make_tokenizer(Family(("<|im_start|>",), "<eos>", "<|im_end|>"), tokenizer_of("qwen2_5").chat_template)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_tokens([AddedToken("<|im_end|>", normalized=True)])
    encoder = Encoder("sft", tokenizer, max_length=None)
    assert parts(tokenizer, encoder(Chat("x:1", talk(ASK, "PARIS")))[0])[1::2] == ["paris<|im_end|>"]
    for words in (talk("<|IM_END|>", TELL), talk(ASK, "<|IM_END|>!")):
        with pytest.raises(Bad) as caught:
            encoder(Chat("x:1", words))
        assert caught.value.cause == "special token"


def test_a_header_that_joins_with_every_answer() -> None:
    """The prompt ends with a space that belongs to the token of the answer's first word, whatever that is."""
    template = (
        "{% for m in messages %}{{ m.role }}:{{ ' ' }}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{{ ' ' }}{% endif %}"
    )
    family = Family(("<|im_end|>",), "<|im_end|>", "<|im_end|>")
    tokenizer = make_tokenizer(family, template)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer_with_spaces()
    ours = encode_example(Chat("x:1", talk("a", "b", "c", "d")), tokenizer, max_length=None)
    assert (
        "".join(parts(tokenizer, ours))
        == "user: a<|im_end|>assistant: b<|im_end|>user: c<|im_end|>assistant: d<|im_end|>"
    )
    assert [part.strip() for part in parts(tokenizer, ours)[1::2]] == ["b<|im_end|>", "d<|im_end|>"]


def pre_tokenizer_with_spaces() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False)


# --- random conversations ---------------------------------------------------------------------------------------------

FRAGMENTS = (
    *(
        "Paris",
        "five",
        " the ",
        "a",
        "Z",
        "é",
        "e\u0301",
        "\u0301",
        "ü",
        "日本",
        "🦊",
        "👩‍🚀",
        "\u200d",
        "\ufeff",
        "\ue0000\ue001",
    ),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2028", "\u3000"),
    *("<|im_", "end|>", "<|im_start", "|>", "assistant\n", "user\n", "model\n", "<end_of_", "turn>", "<|eot", "_id|>"),
    *(
        "<think>",
        "</think>",
        "\n</think>\n\n",
        "<tool_response>",
        "</tool_response>",
        "{{ eos_token }}",
        "{% generation %}",
    ),
)
RARE = ("<|im_end|>", "<|im_start|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<s>", "<bos>", "<|endoftext|>")


def random_talk(draw: random.Random, system: bool) -> tuple[Message, ...]:
    def words() -> str:
        text = "".join(draw.choices(FRAGMENTS, k=draw.randint(1, 8)))
        text += draw.choice(RARE) if draw.random() < 0.01 else ""
        return text + "".join(draw.choices(FRAGMENTS, k=draw.randint(0, 3)))

    contents = [words() for _ in range(2 * draw.randint(1, 4))]
    if draw.random() < 0.3:
        contents = [draw.choice(contents[:2]) for _ in contents]
    return talk(*contents, system=words() if system and draw.random() < 0.3 else None)


def printed_answers(name: str, messages: tuple[Message, ...]) -> list[str]:
    """Return the answers as the family's template prints them and its tokenizer reads them."""
    found = []
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        content = message.content
        if name in ("llama3", "gemma"):
            content = content.strip()
        if name == "phi3":
            content = content.lstrip()
        if name == "qwen3":
            thought = ""
            if "</think>" in content:
                thought = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n").strip("\n")
                content = content.split("</think>")[-1].lstrip("\n")
            asked = [
                at
                for at, other in enumerate(messages)
                if other.role == "user"
                and not (other.content.startswith("<tool_response>") and other.content.endswith("</tool_response>"))
            ]
            if index > (asked[-1] if asked else len(messages) - 1) and (thought or index == len(messages) - 1):
                content = f"<think>\n{thought}\n</think>\n\n" + content.lstrip("\n")
        content += FAMILIES[name].end
        found.append(unicodedata.normalize("NFC", content) if FAMILIES[name].normal else content)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_random_conversations_are_learnt_exactly_or_refused(name: str) -> None:
    tokenizer, family, draw = tokenizer_of(name), FAMILIES[name], random.Random(f"masks/{name}")
    encoder, refused = Encoder("sft", tokenizer, max_length=None), []
    for _ in range(400):
        messages = random_talk(draw, system=name != "gemma")
        try:
            row, cut = encoder(Chat("x:1", messages))
        except Bad as bad:
            refused.append(bad.cause)
            if bad.cause == "special token":
                assert any(token in message.content for message in messages for token in family.special)
            else:  # words that begin with a line break, under a header that ends with one and does not trim
                assert bad.cause == "runs into answer" and name in ("qwen2_5", "qwen3"), (bad.problem, messages)
                answers = [m.content.lstrip(" \t\u00a0\u2028\u3000") for m in messages if m.role == "assistant"]
                assert any(answer.startswith(("\r", "\n")) for answer in answers), messages
            continue
        found = parts(tokenizer, row)
        assert found[1::2] == printed_answers(name, messages), messages
        assert cut == 0 and row["input_ids"].count(tokenizer.bos_token_id) == ("bos_token" in tokenizer.chat_template)
        example, _ = encoder(Example("x:1", messages[:-1], messages[-1:]))
        assert example["input_ids"] == row["input_ids"] and parts(tokenizer, example)[-1] == found[-1]
    assert len(refused) < 200, "most conversations must be usable, or nothing was tested"


# --- the templates themselves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_our_templates_print_what_the_published_ones_print(name: str) -> None:
    import trl

    published = make_tokenizer(
        FAMILIES[name], (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")
    )
    draw = random.Random(f"templates/{name}")
    for messages in (*TALKS.values(), *(random_talk(draw, system=True) for _ in range(100))):
        plain = [{"role": message.role, "content": message.content} for message in messages]
        for turns, due in ((plain, False), (plain[:-1], True)):
            ours, theirs = (
                outcome(lambda: which.apply_chat_template(turns, tokenize=False, add_generation_prompt=due))  # noqa: B023
                for which in (tokenizer_of(name), published)
            )
            assert ours == theirs


def outcome(render: Callable[[], str]) -> str:
    from jinja2 import TemplateError

    try:
        return render()
    except TemplateError as error:
        return f"refused: {error}"


# --- the encoder ------------------------------------------------------------------------------------------------------


def test_an_encoder_can_be_pickled_and_says_what_it_cut_off() -> None:
    tokenizer = tokenizer_of("qwen3")
    rows = [Chat("x:1", TALKS["two exchanges"]), Chat("x:2", TALKS["thoughts"])]
    encoder = Encoder("sft", tokenizer, max_length=40)
    wholes = [encoder.whole(row) for row in rows]
    again = pickle.loads(pickle.dumps(encoder))
    for row, whole in zip(rows, wholes, strict=True):
        encoded, cut = again(row)
        assert encoded == {key: ids[:40] for key, ids in whole.items()}
        assert cut == len(whole["input_ids"]) - 40 > 0
    with pytest.raises(Bad) as caught:
        Encoder("sft", tokenizer, max_length=3)(rows[0])
    assert caught.value.cause == "no room"
    assert encode_all(rows, "sft", tokenizer, max_length=40)[1].truncated == 2


def test_causes_of_rows_that_cannot_be_used() -> None:
    qwen, llama = tokenizer_of("qwen2_5"), tokenizer_of("llama3")
    same = Preference("x:1", talk(ASK), talk("", "Yes")[1:], talk("", "Yes ")[1:])
    for encoder, row, cause in (
        (Encoder("preference", llama, max_length=None), same, "equal sides"),
        (Encoder("sft", qwen, max_length=None), Example("x:1", "abc", "", finish="length"), "nothing to learn"),
        (Encoder("sft", qwen, max_length=None), Example("x:1", "\n", "\nabc"), "runs into answer"),
        (Encoder("preference", llama, max_length=4), PreferenceIds("x:1", (1, 2, 3, 4), (5,), (6,)), "no room"),
        (Encoder("preference", llama, max_length=4), PreferenceIds("x:1", (1, 2), (5, 6, 7), (5, 6, 8)), "equal sides"),
    ):
        with pytest.raises(Bad) as caught:
            encoder(row)
        assert caught.value.cause == cause and not caught.value.problem.startswith("x:1")


def test_rows_of_text_need_no_template() -> None:
    tokenizer = make_tokenizer(FAMILIES["qwen2_5"], "")
    encoded, cut = Encoder("sft", tokenizer, max_length=4)(Text("x:1", "Paris is the capital."))
    assert len(encoded["input_ids"]) == 4 and cut > 0


def test_the_first_row_without_a_margin_is_found() -> None:
    rows = [PreferenceIds(f"x:{line}", (1,), (2,), (3,), margin) for line, margin in enumerate((0.5, None, 1.0, None))]
    assert without_margin(rows) is rows[1] and without_margin(rows[1:]) is rows[1]
    assert without_margin(rows[:1]) is None and without_margin([rows[1], rows[3]]) is None
