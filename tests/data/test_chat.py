"""Rows to ids: compared with TRL's own preparation and with ids that are spelled out here by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align_pipeline.data.chat import (
    IGNORED,
    Encoder,
    check_template,
    encode_all,
    encode_example,
    encode_preference,
    encode_prompt,
    encode_unpaired,
)
from align_pipeline.data.rows import (
    Chat,
    Example,
    ExampleIds,
    Message,
    Preference,
    PreferenceIds,
    Prompt,
    PromptIds,
    Text,
    Unpaired,
    UnpairedIds,
)
from align_pipeline.data.sources import Bad
from align_pipeline.pipeline.errors import AlignError, DataError

SENTENCES = (
    "What is the capital of France? Paris is the capital of France.",
    "Please add two and three. The sum is five.",
    "You are a helpful assistant in a small shop, be polite and be brief.",
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<start_of_turn>model\n"
    "{% generation %}{{ m.content | trim }}<end_of_turn>\n{% endgeneration %}"
    "{% else %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MARKS = ("{% generation %}", "{% endgeneration %}")
FAMILIES = {
    "chatml": (CHATML, None, "<|im_end|>"),
    "llama": (LLAMA, "<bos>", "<|eot_id|>"),
    "gemma": (GEMMA, "<bos>", "<end_of_turn>"),
}
SPECIAL = "<pad> <bos> <eos> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|>".split()


def make_tokenizer(template: str | None, bos: str | None, eos: str = "<eos>", *, adds_eos: bool = False) -> Any:
    """Train a byte-level BPE of about 300 tokens; with a BOS it puts it before plain text, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [*SPECIAL, "<start_of_turn>", "<end_of_turn>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=310, special_tokens=special, initial_alphabet=alphabet)
    )
    if bos or adds_eos:
        single = f"{bos or ''} $A {eos if adds_eos else ''}".strip()
        ids = [(token, backend.token_to_id(token)) for token in (bos, eos) if token]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token="<pad>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Any, str]:
    """A tokenizer and the token that ends its turns; its template has {% generation %} marks, which TRL needs."""
    template, bos, end = FAMILIES[request.param]
    return make_tokenizer(template, bos), end


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


ASK, TELL, WRONG = "What is the capital of France?", "Paris is the capital.", "Five, I think."
TALK = (user(ASK), assistant(TELL), user("Please add two and three."), assistant("The sum is five."))


def plain(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def trl_prepares(trainer: str, tokenizer: Any, records: list[dict[str, Any]], tmp_path: Path, **options: Any) -> Any:
    """Run the trainer's own `_prepare_dataset` on the records, without the trainer's model."""
    import trl
    from datasets import Dataset

    cls, config = getattr(trl, f"{trainer}Trainer"), getattr(trl, f"{trainer}Config")
    options = {"max_length": None, "use_cpu": True, "bf16": False, **options}
    args = config(output_dir=str(tmp_path), report_to=[], **options)
    me = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=True, calculate_KL=False)
    more = (False, None, "eval") if trainer == "SFT" else ("eval",)
    prepared = cls._prepare_dataset(me, Dataset.from_list(records), tokenizer, args, *more)
    return prepared.to_list()


def to_end(ids: list[int], end: int) -> list[int]:
    """Return TRL's ids up to the last end token: a model stops there, but TRL has it learn what is printed next."""
    return ids[: len(ids) - ids[::-1].index(end)]


def labels_to_end(row: dict[str, Any], end: int) -> dict[str, list[int]]:
    """Return TRL's row up to its last end token, with what follows an end token not to be learnt."""
    ids, labels, ended = to_end(row["input_ids"], end), [], False
    for label in row["labels"][: len(ids)]:
        ended = ended and label != IGNORED
        labels.append(IGNORED if ended else label)
        ended = ended or label == end
    return {"input_ids": ids, "labels": labels}


def test_text_and_string_pairs_equal_trl(family: tuple[Any, str], tmp_path: Path) -> None:
    tokenizer, _ = family
    (theirs,) = trl_prepares("SFT", tokenizer, [{"text": SENTENCES[0]}], tmp_path)
    ours = encode_example(Text("t:1", SENTENCES[0]), tokenizer, max_length=None)
    assert ours == {"input_ids": theirs["input_ids"], "labels": theirs["labels"]}

    pairs = [("Please add two and three.", " The sum is five."), ("What is the capi", "tal of France?")]
    whole = tokenizer("What is the capital of France?")["input_ids"]
    prompt = tokenizer("What is the capi")["input_ids"]
    assert whole[: len(prompt)] != prompt, "the second prompt must end inside a token of the whole"
    records = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    for (prompt, completion), row in zip(pairs, trl_prepares("SFT", tokenizer, records, tmp_path), strict=True):
        ours = encode_example(Example("t:1", prompt, completion), tokenizer, max_length=None)
        assert ours == {"input_ids": row["input_ids"], "labels": row["labels"]}
        assert 0 < ours["labels"].count(IGNORED) < len(ours["labels"])


def test_conversations_equal_trl(family: tuple[Any, str], tmp_path: Path) -> None:
    tokenizer, end = family
    end_id = tokenizer.convert_tokens_to_ids(end)
    record = {"prompt": plain(TALK[:3]), "completion": plain(TALK[3:])}
    (theirs,) = trl_prepares("SFT", tokenizer, [record], tmp_path)
    ours = encode_example(Example("t:1", TALK[:3], TALK[3:]), tokenizer, max_length=None)
    assert ours == labels_to_end(theirs, end_id)

    messages = [{"messages": plain(TALK)}]
    (theirs,) = trl_prepares("SFT", tokenizer, messages, tmp_path, assistant_only_loss=True)
    ours = encode_example(Chat("t:1", TALK), tokenizer, max_length=None)
    assert ours == labels_to_end(theirs, end_id)
    assert ours["labels"].count(end_id) == 2 and ours["labels"][-1] == end_id

    (theirs,) = trl_prepares("SFT", tokenizer, messages, tmp_path)
    ours = encode_example(Chat("t:1", TALK), tokenizer, max_length=None, loss_on="all")
    assert ours == {"input_ids": theirs["input_ids"], "labels": theirs["labels"]}
    assert ours == encode_example(Example("t:1", TALK[:3], TALK[3:]), tokenizer, max_length=None, loss_on="all")


def test_preferences_equal_trl(family: tuple[Any, str], tmp_path: Path) -> None:
    tokenizer, end = family
    text = {"prompt": ASK, "chosen": " " + TELL, "rejected": " " + WRONG}
    talk = {"prompt": plain(TALK[:1]), "chosen": plain(TALK[1:2]), "rejected": plain((assistant(WRONG),))}
    rows = [
        (Preference("t:1", ASK, " " + TELL, " " + WRONG), text, tokenizer.eos_token_id),
        (Preference("t:2", TALK[:1], TALK[1:2], (assistant(WRONG),)), talk, tokenizer.convert_tokens_to_ids(end)),
    ]
    for row, record, end_id in rows:
        ours = encode_preference(row, tokenizer, max_length=None)
        (theirs,) = trl_prepares("DPO", tokenizer, [record], tmp_path)
        assert ours["prompt_ids"] == theirs["prompt_ids"]
        assert ours["chosen_ids"] == to_end(theirs["chosen_ids"], end_id)
        assert ours["rejected_ids"] == to_end(theirs["rejected_ids"], end_id)
        (theirs,) = trl_prepares("Reward", tokenizer, [record], tmp_path)
        assert ours["prompt_ids"] + ours["chosen_ids"] == to_end(theirs["chosen_ids"], end_id)
        assert ours["prompt_ids"] + ours["rejected_ids"] == to_end(theirs["rejected_ids"], end_id)


def test_unpaired_equal_trl(family: tuple[Any, str], tmp_path: Path) -> None:
    tokenizer, end = family
    rows = [Unpaired("t:1", ASK, " " + TELL, True), Unpaired("t:2", TALK[:3], TALK[3:], False)]
    records = [
        {"prompt": ASK, "completion": " " + TELL, "label": True},
        {"prompt": plain(TALK[:3]), "completion": plain(TALK[3:]), "label": False},
    ]
    ends = (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end))
    for row, record, end_id in zip(rows, records, ends, strict=True):
        ours = encode_unpaired(row, tokenizer, max_length=None)
        (theirs,) = trl_prepares("KTO", tokenizer, [record], tmp_path)
        assert ours.pop("completion_ids") == to_end(theirs["completion_ids"], end_id)
        assert ours == {key: theirs[key] for key in ("prompt_ids", "label")}


def test_truncation_equals_trl(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(CHATML, None)
    record = {"prompt": ASK, "completion": " " + TELL * 5}
    (theirs,) = trl_prepares("SFT", tokenizer, [record], tmp_path, max_length=20)
    ours = encode_example(Example("t:1", ASK, " " + TELL * 5), tokenizer, max_length=20)
    assert ours == {"input_ids": theirs["input_ids"], "labels": theirs["labels"]}
    assert len(ours["input_ids"]) == 20


def test_what_is_learnt_reads_as_written(family: tuple[Any, str]) -> None:
    tokenizer, end = family
    tokenizer.chat_template = tokenizer.chat_template.replace(MARKS[0], "").replace(MARKS[1], "")
    ours = encode_example(Chat("t:1", TALK), tokenizer, max_length=None)
    learnt = tokenizer.decode([token for token in ours["labels"] if token != IGNORED])
    assert learnt == f"{TELL}{end}The sum is five.{end}"
    bos = tokenizer.bos_token_id
    assert bos is None or ours["input_ids"].count(bos) == 1
    assert check_template(tokenizer) == tokenizer.convert_tokens_to_ids(end)


def test_a_system_turn_is_read_and_not_learnt() -> None:
    tokenizer = make_tokenizer(CHATML, None)
    talk = (Message("system", "be brief"), *TALK[:2])
    ours = encode_example(Chat("t:1", talk), tokenizer, max_length=None)
    assert tokenizer.decode(ours["input_ids"]).startswith("<|im_start|>system\nbe brief<|im_end|>")
    learnt = tokenizer.decode([token for token in ours["labels"] if token != IGNORED])
    assert learnt == f"{TELL}<|im_end|>"


def test_text_ends_with_one_eos_and_starts_with_one_bos() -> None:
    tokenizer = make_tokenizer(None, "<bos>")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for text in ("be polite", "be polite<eos>", "<bos>be polite"):
        ids = encode_example(Text("t:1", text), tokenizer, max_length=None)["input_ids"]
        assert (ids.count(bos), ids.count(eos)) == (1, 1) and (ids[0], ids[-1]) == (bos, eos)
    cut_off = encode_example(Text("t:1", "be polite", finish="length"), tokenizer, max_length=None)["input_ids"]
    assert eos not in cut_off and cut_off == ids[:-1]
    cut_off = encode_example(Example("t:1", "be", " polite", finish="length"), tokenizer, max_length=None)["input_ids"]
    assert eos not in cut_off


def test_an_answer_in_plain_text_ends_at_its_end_and_once() -> None:
    tokenizer = make_tokenizer(CHATML, "<bos>")
    asked = "<|im_start|>user\nbe polite<|im_end|>\n<|im_start|>assistant\n"
    ends = dict(zip(("<eos>", "<|im_end|>"), tokenizer.convert_tokens_to_ids(["<eos>", "<|im_end|>"]), strict=True))
    for written, end in (("", "<eos>"), ("<eos>", "<eos>"), ("<eos>\n", "<eos>"), ("<|im_end|>\n", "<|im_end|>")):
        ids = encode_unpaired(Unpaired("t:1", asked, f"be brief{written}", True), tokenizer, max_length=None)
        assert tokenizer.decode(ids["completion_ids"]) == f"be brief{end}" and ids["completion_ids"][-1] == ends[end]
        assert ids["prompt_ids"].count(ends["<|im_end|>"]) == 1, "a prompt may be a rendered template"
    cut_off = encode_example(Example("t:1", asked, "be brief", finish="length"), tokenizer, max_length=None)
    assert not set(ends.values()) & set(cut_off["labels"])
    for end in ends:
        for answer in (f"be{end} brief", f"be brief{end}{end}", f"{end}be brief<eos>"):
            rows: dict[str, tuple[Any, Any]] = {
                "completion": ("sft", Example("t:1", "be", answer)),
                "chosen": ("preference", Preference("t:1", "be", answer, "a")),
                "rejected": ("preference", Preference("t:1", "be", "a", answer)),
            }
            for key, (task, row) in rows.items():
                with pytest.raises(DataError) as caught:
                    encode_all([row], task, tokenizer, max_length=None)
                assert str(caught.value) == (
                    f"t:1: {key}: holds {end!r} at {answer.index(end)}, which ends an answer and may stand at its end "
                    "only; take it out, or what follows it"
                )


def test_a_template_that_cannot_be_used_is_no_matter_of_plain_text() -> None:
    tokenizer = make_tokenizer("{{ messages[0].content }}", None)
    encode_example(Example("t:1", "be", " polite<|im_end|> brief"), tokenizer, max_length=None)
    with pytest.raises(DataError, match="holds '<eos>' at 7"):
        encode_example(Example("t:1", "be", " polite<eos> brief"), tokenizer, max_length=None)


def test_a_tokenizer_that_adds_eos_itself_adds_none_here() -> None:
    tokenizer = make_tokenizer(None, "<bos>", adds_eos=True)
    assert tokenizer("be")["input_ids"][-1] == tokenizer.eos_token_id
    ours = encode_example(Example("t:1", "be", " polite"), tokenizer, max_length=None)
    assert ours["input_ids"].count(tokenizer.eos_token_id) == 1
    assert encode_prompt(Prompt("t:1", "be"), tokenizer)["prompt_ids"][-1] != tokenizer.eos_token_id


def test_a_cut_off_turn_does_not_learn_to_end() -> None:
    tokenizer = make_tokenizer(CHATML, None)
    whole = encode_example(Example("t:1", TALK[:1], TALK[1:2]), tokenizer, max_length=None)["input_ids"]
    cut = encode_example(Example("t:1", TALK[:1], TALK[1:2], finish="length"), tokenizer, max_length=None)["input_ids"]
    assert tokenizer.decode(whole[len(cut) :]) == "<|im_end|>" and whole[: len(cut)] == cut


def test_prompts_end_with_the_header_of_the_answer(family: tuple[Any, str]) -> None:
    tokenizer, _ = family
    ids = encode_prompt(Prompt("t:1", TALK[:1]), tokenizer)["prompt_ids"]
    assert tokenizer.decode(ids).endswith(("assistant\n", "assistant<|end_header_id|>\n\n", "model\n"))
    assert encode_prompt(PromptIds("t:1", (7, 8)), tokenizer) == {"prompt_ids": [7, 8]}


def test_ids_are_taken_exactly() -> None:
    tokenizer = make_tokenizer(None, "<bos>")
    ours = encode_example(ExampleIds("t:1", (5, 6), (7, 8)), tokenizer, max_length=3)
    assert ours == {"input_ids": [5, 6, 7], "labels": [IGNORED, IGNORED, 7]}
    pair = encode_preference(PreferenceIds("t:1", (5, 6), (7, 8, 9), (8,), 0.5), tokenizer, max_length=4)
    assert pair == {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [8], "margin": 0.5}
    single = encode_unpaired(UnpairedIds("t:1", (5,), (7, 8), False), tokenizer, max_length=None)
    assert single == {"prompt_ids": [5], "completion_ids": [7, 8], "label": False}


UNKNOWN = {
    "completion_ids": ("sft", ExampleIds("t:1", (5,), (7, 310, 400))),
    "prompt_ids": ("unpaired", UnpairedIds("t:1", (5, 310), (7,), True)),
    "rejected_ids": ("preference", PreferenceIds("t:1", (5,), (7,), (7, 310))),
}


@pytest.mark.parametrize("key", UNKNOWN)
def test_ids_that_the_model_has_no_embedding_for_are_bad_rows(key: str) -> None:
    tokenizer = make_tokenizer(None, "<bos>")
    size = len(tokenizer)
    assert size == 310
    task, row = UNKNOWN[key]
    with pytest.raises(Bad) as caught:
        Encoder(task, tokenizer, max_length=None)(row)  # type: ignore[arg-type]
    assert caught.value.cause == "bad value" and caught.value.problem == (
        f"{key}[1]: 310, the vocabulary has 310 ids (0 to 309); encode the row with this model's tokenizer, or drop it"
    )
    Encoder(task, tokenizer, max_length=None, vocabulary=401)(row)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"t:1: prompt_ids\[0\]: 310, the vocabulary has 310 ids"):
        encode_prompt(PromptIds("t:1", (310,)), tokenizer)


def test_text_may_not_hold_tokens_that_only_the_tokenizer_has() -> None:
    tokenizer = make_tokenizer(CHATML, "<bos>")
    tokenizer.add_tokens(["<new>"])
    encoder = Encoder("preference", tokenizer, max_length=None, vocabulary=310)
    encoder(Preference("t:1", "be", " polite", " brief"))
    with pytest.raises(
        Bad, match=r"text holds '<new>' \(id 310\), the model's vocabulary has 310 ids \(0 to 309\); take"
    ):
        encoder(Preference("t:1", "be", " polite", " <new>"))


def test_a_prompt_that_fills_the_length_is_named() -> None:
    tokenizer = make_tokenizer(None, None)
    rows = [ExampleIds("x.jsonl:1", (1, 2), (3,)), ExampleIds("x.jsonl:2", (1, 2, 3), (4,))]
    with pytest.raises(DataError) as caught:
        encode_all(rows, "sft", tokenizer, max_length=3)
    assert caught.value.problems == (
        "x.jsonl:2: prompt: 3 tokens before the first answer, at most 2 leave room for one; "
        "raise max_length or shorten the prompt",
    )
    with pytest.raises(DataError, match=r"p:1: prompt: 3 tokens"):
        encode_preference(PreferenceIds("p:1", (1, 2, 3), (4,), (5,)), tokenizer, max_length=3)


def test_stats_count_what_the_model_reads() -> None:
    tokenizer = make_tokenizer(None, None)
    rows = [PreferenceIds("p:1", (1, 2), (3, 4, 5), (6,)), *[PreferenceIds("p:2", (1,), (3,), (6,))] * 3]
    encoded, stats = encode_all(rows, "preference", tokenizer, max_length=4)
    assert [row["chosen_ids"] for row in encoded] == [[3, 4], [3], [3], [3]]
    assert (stats.rows, stats.tokens, stats.truncated, stats.longest) == (4, (4 + 3) + 3 * (2 + 2), 1, 5)


def test_some_margins_only_are_refused() -> None:
    rows = [PreferenceIds("p:1", (1,), (3,), (6,), 1.0), PreferenceIds("p:2", (1,), (3,), (6,))]
    with pytest.raises(DataError, match=r"p:2: margin: missing"):
        encode_all(rows, "preference", make_tokenizer(None, None), max_length=None)


def test_no_template_is_named() -> None:
    tokenizer = make_tokenizer(None, None)
    for encode in (
        lambda: encode_example(Chat("t:1", TALK), tokenizer, max_length=None),
        lambda: encode_prompt(Prompt("t:1", TALK[:1]), tokenizer),
        lambda: check_template(tokenizer),
    ):
        with pytest.raises(AlignError, match="chat_template:"):
            encode()


def test_a_template_without_an_end_is_refused() -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}", None)
    with pytest.raises(AlignError, match=r"nothing ends an assistant turn .*eos_token.*chat_template:"):
        check_template(tokenizer)


def test_a_second_bos_is_refused() -> None:
    template = "{% for m in messages %}{{ bos_token }}{{ m.content }}{{ eos_token }}{% endfor %}"
    with pytest.raises(AlignError, match="2 BOS tokens"):
        check_template(make_tokenizer(template, "<bos>"))


def test_a_template_that_refuses_a_row_names_the_row() -> None:
    tokenizer = make_tokenizer(GEMMA, "<bos>")
    rows = [Chat("x.jsonl:1", TALK), Chat("x.jsonl:2", (Message("system", "be brief"), *TALK))]
    with pytest.raises(DataError, match=r"x.jsonl:2: .*System role not supported") as caught:
        encode_all(rows, "sft", tokenizer, max_length=None)
    assert len(caught.value.problems) == 1


# An answer with a comma makes the template print the question anew, so what stands before the answer depends on it.
CHANGES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if ',' in messages[-1].content %}!{% endif %}\n"
    "{% if m.role == 'assistant' %}GEN{{ m.content }}<|im_end|>\nEND"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_turns_that_cannot_be_told_apart_need_marks() -> None:
    talk = (*TALK[:3], assistant(WRONG))
    bare = make_tokenizer(CHANGES.replace("GEN", "").replace("END", ""), None)
    with pytest.raises(DataError, match=r"x.jsonl:7: messages: .*generation.*prompt and completion"):
        encode_example(Chat("x.jsonl:7", talk), bare, max_length=None)
    assert learnt(bare, TALK) == f"{TELL}<|im_end|>The sum is five.<|im_end|>"

    marked = make_tokenizer(CHANGES.replace("GEN", MARKS[0]).replace("END", MARKS[1]), None)
    assert learnt(marked, talk) == f"{TELL}<|im_end|>{WRONG}<|im_end|>"

    without_end = CHANGES.replace("GEN", MARKS[0]).replace("<|im_end|>\nEND", f"{MARKS[1]}<|im_end|>\n")
    with pytest.raises(DataError, match=r"x.jsonl:7: .*end token is not among the tokens to learn"):
        encode_example(Chat("x.jsonl:7", talk), make_tokenizer(without_end, None), max_length=None)
    assert learnt(make_tokenizer(without_end, None), TALK) == f"{TELL}<|im_end|>The sum is five.<|im_end|>"


def learnt(tokenizer: Any, talk: tuple[Message, ...]) -> str:
    labels = encode_example(Chat("x.jsonl:7", talk), tokenizer, max_length=None)["labels"]
    return str(tokenizer.decode([token for token in labels if token != IGNORED]))


def test_an_end_that_is_not_learnt_is_refused() -> None:
    only_the_last = CHATML.replace("}}<|im_end|>", "}}{% if loop.last or m.role == 'user' %}<|im_end|>{% endif %}")
    no_end_after_a_system_turn = CHATML.replace(
        "}}<|im_end|>", "}}{% if messages[0].role == 'user' %}<|im_end|>{% endif %}"
    )
    system = (Message("system", "be brief"), *TALK[:1])
    for template, row in (
        (only_the_last, Chat("x.jsonl:7", TALK)),
        (no_end_after_a_system_turn, Example("x.jsonl:7", system, TALK[1:2])),
        (no_end_after_a_system_turn, Chat("x.jsonl:7", (*system, *TALK[1:2]))),
    ):
        with pytest.raises(DataError, match=r"x.jsonl:7: .*end token is not among the tokens to learn"):
            encode_example(row, make_tokenizer(template, None), max_length=None)


def test_a_pair_that_the_template_makes_equal_is_refused() -> None:
    row = Preference("p:3", TALK[:1], (assistant("Paris"),), (assistant("Paris "),))
    with pytest.raises(DataError, match=r"p:3: chosen: equals rejected as token ids"):
        encode_preference(row, make_tokenizer(LLAMA, "<bos>"), max_length=None)
