"""`align data check|show`: what it prints, the numbers in it, and its exit codes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from align_pipeline.pipeline import data_cli
from align_pipeline.pipeline.cli import app
from align_pipeline.pipeline.errors import AlignError
from align_pipeline.pipeline.store import Store
from tiny import write_tiny_model

STORIES = Path(__file__).parents[3] / "shared/data/models/stories260K"
GOOD = {"prompt": "q", "completion": "yes"}
PAIR = {"prompt": "where is the milk?\n", "chosen": "left shelf", "rejected": "no idea"}
REMEDY = "must hold text; fill it in or drop the row"
NOTHING: dict[str, Any] = {"metrics": {}, "resources": {"seconds": 1.0}, "inputs": {}}
"""What the records of artifacts hold, where it is no matter here."""


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CHAT = [turn("user", "where is the milk?"), turn("assistant", "left shelf"),
        turn("user", "and 漢字 ü?"), turn("assistant", "no 😀\nidea")]  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder, ["where is the milk? left shelf, no idea"] * 4, vocab_size=300)
    return str(folder)


@pytest.fixture(scope="module")
def bare(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bare") / "model"
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").unlink()
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def write(name: str, *records: Any) -> str:
    Path(name).write_text("".join(f"{json.dumps(record)}\n" for record in records), "utf-8")
    return name


def data(*arguments: str) -> tuple[int, str]:
    """Run `align data`; return its exit code and all that a user reads."""
    result = CliRunner().invoke(app, ["data", *arguments])
    error = result.exception
    if isinstance(error, AlignError):
        return error.exit_code, f"{result.output}{error}\n"
    assert error is None or isinstance(error, SystemExit), repr(error)
    return result.exit_code, result.output


def characters(*lengths: int, p50: int, p95: int) -> str:
    shares = f"half of the rows up to {p50}, 95 % up to {p95}, the longest {max(lengths)}"
    return f"  characters: {sum(lengths)} in all, {shares}\n"


# The command itself.


def test_check_in_a_process_of_its_own_is_quick_and_imports_nothing_heavy() -> None:
    write("a.jsonl", *[GOOD] * 100, {"prompt": "q", "completion": ""})
    code = (
        "import sys, time\nsys.argv = ['align', 'data', 'check', 'a.jsonl', 'a.jsnol']\n"
        "from align_pipeline.pipeline.cli import main\n"
        "try:\n    main()\nfinally:\n    print(time.process_time(), *sys.modules, file=open('used', 'w'))\n"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(2)]
    seconds, *modules = Path("used").read_text().split()
    assert float(seconds) < 1.0
    heavy = {"torch", "transformers", "datasets", "trl", "align_pipeline.stages", "tokenizers"}
    assert "align_pipeline.data.load" in modules and not heavy & set(modules)
    said = runs[0].stdout.splitlines()
    assert said[:3] == [
        "a.jsonl: read as prompt-completion: 101 rows, 1 of them bad",
        "  empty: 1 row",
        f"    a.jsonl:101: completion: empty, {REMEDY}",
    ]
    near = "a.jsnol does not exist; did you mean a.jsonl?; nor is it the key of an artifact in runs\n"
    assert (runs[0].returncode, runs[0].stderr) == (3, near)


@pytest.mark.parametrize("command", ["check", "show"])
def test_help_tells_of_every_option(command: str) -> None:
    code, page = data(command, "--help")
    assert code == 0
    known = get_command(data_cli.app).commands[command]  # type: ignore[attr-defined]
    options = [name for one in known.params for name in one.opts if name.startswith("-")]
    assert len(options) >= 6
    for name in options:
        assert re.search(rf"^ +{re.escape(name)}\b.*", page, re.MULTILINE), name
    assert all(one.help and one.help.split()[0] in page for one in known.params if hasattr(one, "help"))
    assert all(task in page for task in data_cli.TASKS) and command in data("--help")[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check"], "Missing argument"),
        (["show", "a.jsonl"], "Missing option '--model'"),
        (["check", "a.jsonl", "--max-length", "1"], "greater than or equal to 2"),
        (["check", "a.jsonl", "--taks", "sft"], "No such option: --taks"),
        (["check", "a.jsonl", "--task", "stf"], "--task stf: no such task; did you mean sft?\n"),
        (["check", "a.jsonl", "--task", "x"],
         "--task x: no such task; choose sft, preference, unpaired, prompt, text\n"),
        (["check", "a.jsonl", "--column", "prompt"],
         "--column prompt: must be OURS=THEIRS, as in --column prompt=question\n"),
        (["check", "a.jsonl", "--column", "promt=q"], "--column promt=q: promt is no field; did you mean prompt?\n"),
        (["check", "a.jsonl", "--task", "sft", "--column", "chosen=q"],
         "--column chosen=q: chosen is no field of rows for sft; choose completion, completion_ids, conversations, "),
        (["check", "a.jsonl", "--column", "chosen=q", "--column", "rejected=q"],
         "--column: q is mapped to chosen and to rejected, a column is one field; name another column\n"),
        (["check", "a.jsonl", "--task", "sft", "--format", "implicit"],
         "--format implicit: no format of task sft; choose alpaca, messages, prompt-completion, sharegpt, text, "),
    ],
)  # fmt: skip
def test_a_wrong_command_is_exit_code_2(arguments: list[str], said: str) -> None:
    write("a.jsonl", GOOD)
    code, output = data(*arguments)
    assert code == 2 and said in output


IS_NO_KEY = "nor is it the key of an artifact in runs"
CANNOT_BE_USED = {
    "rows.jsnl": f"rows.jsnl does not exist; did you mean rows.jsonl?; {IS_NO_KEY}",
    "rows.jsonl --model no": f"no does not exist; {IS_NO_KEY}",
    "rows.jsonl --model folder": "file:folder: no config.json in it; it must be a folder that `save_pretrained` wrote",
    "rows.jsonl --task text":
        "rows.jsonl:1: completion, prompt: no format of task text, which reads {text}; rename or map them (columns: "
        "{text: prompt})",
    "rows.jsonl --task sft --column prompt=promt":
        "rows.jsonl:1: columns.prompt: no column promt in the file; did you mean prompt?; it has completion, prompt",
    "empty.jsonl --task sft": "empty.jsonl: 0 rows\n  no rows, at least one is needed; check how the file was written",
}  # fmt: skip


@pytest.mark.parametrize("arguments", CANNOT_BE_USED)
def test_what_cannot_be_used_is_exit_code_3(arguments: str) -> None:
    write("rows.jsonl", {"prompt": "what is it?", "completion": "a"})
    write("empty.jsonl")
    Path("folder").mkdir()
    assert data("check", *arguments.split()) == (3, f"{CANNOT_BE_USED[arguments]}\n")


# Check.


def test_several_files_are_checked_one_after_the_other() -> None:
    write("a.jsonl", GOOD, {"prompt": "why", "completion": "no"})
    write("b.jsonl", PAIR, PAIR | {"rejected": "left shelf"}, PAIR)
    code, output = data("check", "a.jsonl", "b.jsonl")
    sides = [len(PAIR["prompt"] + side) for side in ("left shelf", "no idea")]
    lengths = f"half of the rows up to {sides[0]}, 95 % up to {sides[0]}, the longest {sides[0]}"
    assert code == 3 and output == (
        f"a.jsonl: read as prompt-completion: 2 rows\n{characters(4, 5, p50=4, p95=5)}"
        "b.jsonl: read as preference: 3 rows, 1 of them bad\n  equal sides: 1 row\n"
        "    b.jsonl:2: chosen: equals rejected, a pair must differ; drop the row or fix the log\n"
        f"  characters: {2 * sum(sides)} in all, {lengths} (of a pair the longer side)\n"
        "  note: 1 row says what an earlier row says; each counts each time\n"
        "    b.jsonl:3: says what b.jsonl:1 says\n"
    )
    assert data("check", "file:a.jsonl", "a.jsonl")[0] == 0


@pytest.mark.parametrize(
    ("record", "arguments", "read_as", "length"),
    [
        ({"text": "one", "prompt": "four"}, ["--task", "prompt"], "prompt", 4),
        ({"instruction": "q", "output": "yes", "text": "all of it"}, ["--format", "text"], "text", 9),
        ({"instruction": "q", "output": "yes", "text": "all of it"}, ["--format", "alpaca"], "alpaca", 4),
        ({"q": "what", "a": "it"}, ["--column", "prompt=q", "--column", "completion=a"], "prompt-completion", 6),
        ({"a=b": "what"}, ["--task", "prompt", "--column", "prompt=a=b"], "prompt", 4),
        ({"messages": CHAT, "label": True}, ["--format", "messages"], "messages",
         sum(len(one["content"]) for one in CHAT)),
    ],
)  # fmt: skip
def test_task_format_and_column_say_how_rows_are_read(
    record: Any, arguments: list[str], read_as: str, length: int
) -> None:
    code, output = data("check", write("a.jsonl", record), *arguments)
    assert code == 0, output
    said = f"a.jsonl: read as {read_as}: 1 row\n{characters(length, p50=length, p95=length)}"
    assert output.removesuffix("  note: label: all rows are true; learning what is liked needs both\n") == said


def test_a_folder_and_the_key_of_an_artifact_are_files_of_rows() -> None:
    store = Store(Path("kept"))
    store.open()
    out = store.work_path("sample-1") / "out"
    out.mkdir(parents=True)
    write(str(out / "rows.jsonl"), {"prompt": "q", "completion": "yes"})
    store.publish("sample-1", {"kind": "dataset", "stage": "sample", **NOTHING})
    for name in ("sample-1", str(store.artifact_path("sample-1"))):
        code, output = data("check", name, "--store", "kept")
        assert (code, output) == (0, f"{name}: read as prompt-completion: 1 row\n{characters(4, p50=4, p95=4)}")


def test_the_model_may_be_an_adapter_that_a_stage_made(model: str, tokenizer: Any) -> None:
    from align_pipeline.pipeline.inputs import Digests

    store = Store(Path("kept"))
    store.open()
    out = store.work_path("sft-1") / "out"
    (out / "adapter").mkdir(parents=True)
    tokenizer.save_pretrained(out / "adapter")
    digest = Digests(None).of(Path(model))
    (out / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": digest}))
    base = {"base": f"file:{model}", "base_digest": digest, "adapter": "adapter"}
    store.publish("sft-1", {"kind": "model", "stage": "sft", "model": base, **NOTHING})
    write("a.jsonl", {"messages": CHAT})
    told = [data("check", "a.jsonl", "--model", name, "--store", "kept") for name in ("sft-1", model)]
    assert told[0] == told[1] and told[0][0] == 0 and "tokens: " in told[0][1]


def test_tokens_are_those_of_the_tokenizer(model: str, tokenizer: Any) -> None:
    """Counted here from the whole text of each sequence, with the end token and nothing after it."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    end = "<|im_end|>"
    chat = "".join(f"<|im_start|>{one['role']}\n{one['content']}{end}\n" for one in CHAT).removesuffix("\n")
    prompt = PAIR["prompt"]
    cases = [
        ({"prompt": prompt, "completion": "left shelf"}, [prompt + "left shelf" + end]),
        ({"messages": CHAT}, [chat]),
        (PAIR, [prompt + "left shelf" + end, prompt + "no idea" + end]),
        ({"prompt": CHAT[:3], "completion": CHAT[3:], "label": False}, [chat]),
        ({"text": "left shelf"}, ["left shelf" + end]),
    ]
    for record, texts in cases:
        code, output = data("check", write("a.jsonl", record), "--model", model)
        assert code == 0 and re.findall(r"tokens: (\d+) in all", output) == [str(sum(map(count, texts)))], record
    short, long = count(f"a: b{end}"), count(f"a: {'left shelf ' * 9}{end}")
    write("a.jsonl", {"prompt": "a:", "completion": " b"}, {"prompt": "a:", "completion": f" {'left shelf ' * 9}"})
    code, output = data("check", "a.jsonl", "--model", model, "--max-length", "10")
    assert code == 0 and f"  tokens: {short + 10} in all" in output
    cut = f"1 row is longer than max_length and loses its end ({long - 10} tokens); raise max_length to keep it"
    assert f"  note: {cut}\n" in output


# Show.

SHOWN: list[tuple[Any, str]] = [  # a row, and what is shown of it between `N tokens` and the empty line
    ({"prompt": "q:\n", "completion": "left\nshelf"}, "q:\n⟦left\nshelf<|im_end|>⟧"),
    ({"prompt": "q:\n", "completion": "left", "finish": "length"}, "q:\n⟦left⟧"),
    ({"messages": CHAT},
     "<|im_start|>user\nwhere is the milk?<|im_end|>\n<|im_start|>assistant\n⟦left shelf<|im_end|>⟧\n"
     "<|im_start|>user\nand 漢字 ü?<|im_end|>\n<|im_start|>assistant\n⟦no 😀\nidea<|im_end|>⟧"),
    (PAIR, "where is the milk?\n⟦left shelf<|im_end|>⟧\nwhere is the milk?\n⟦no idea<|im_end|>⟧"),
    ({"prompt": CHAT[:1], "completion": CHAT[1:2], "label": True},
     "<|im_start|>user\nwhere is the milk?<|im_end|>\n<|im_start|>assistant\n⟦left shelf<|im_end|>⟧"),
    ({"prompt": CHAT[:1], "id": 3}, "<|im_start|>user\nwhere is the milk?<|im_end|>\n<|im_start|>assistant\n"),
    ({"text": "left shelf"}, "⟦left shelf<|im_end|>⟧"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "text"), SHOWN, ids=[" ".join(record) for record, _ in SHOWN])
def test_between_the_brackets_is_what_is_learnt(record: Any, text: str, model: str, tokenizer: Any) -> None:
    code, output = data("show", write("a.jsonl", record), "--model", model)
    head, shown, rest = re.fullmatch(
        r"(a\.jsonl:1  read as [a-z-]+)\n(.*)\n\n(tokens of 1 .*)", output, re.DOTALL
    ).groups()  # type: ignore[union-attr]
    counts = re.compile(r"^(?:(?:chosen|rejected|liked): )?(\d+) tokens(?:, (\d+) of them learnt)?\n", re.MULTILINE)
    cut = "cut at 1,024" if {"completion", "messages", "chosen"} & record.keys() else "none is cut"
    assert code == 0 and counts.sub("", shown) == text and head and rest.startswith(f"tokens of 1 row, {cut}:\n")
    ids = len(tokenizer(re.sub("[⟦⟧]", "", text), add_special_tokens=False)["input_ids"])
    learnt = [
        len(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in re.findall("⟦(.*?)⟧", text, re.DOTALL)
    ]
    assert sum(int(total) for total, _ in counts.findall(shown)) in (
        ids,
        ids - 1,
    )  # a pair's sides meet in a line break
    assert sum(int(count or 0) for _, count in counts.findall(shown)) == sum(learnt)


def test_show_shows_n_rows_and_measures_all(model: str) -> None:
    write("a.jsonl", *[{"prompt": "q:", "completion": " left" * count} for count in range(1, 41)], {"prompt": "q"})
    code, output = data("show", "a.jsonl", "--model", model, "-n", "2", "--max-length", "16")
    assert code == 3 and re.findall(r"a.jsonl:(\d+)  read as", output) == ["1", "2"]
    rows = {int(top): int(count) for top, count in re.findall(r"up to (\d+) +(\d+)", output)}
    assert sum(rows.values()) == 40 and max(rows) == 16 and "tokens of 40 rows, cut at 16:" in output
    assert output.endswith("1 row cannot be used; `align data check` tells which\n")
    assert "read as" not in data("show", "a.jsonl", "--model", model, "-n", "0")[1]
    code, output = data("show", "a.jsonl", "--model", model, "-n", "1", "--max-length", "2")
    assert "\ncannot be used: prompt: 2 tokens before the first answer, at most 1 leave room for one; raise" in output


# What is easily taken for something else.


def story(*records: Any, said: str, code: int = 3, arguments: str = "check a.jsonl") -> tuple[Any, ...]:
    """Take the rows of a.jsonl and what `align data` must say; MODEL stands for a model's folder, BARE for one
    without a chat template."""
    return records, arguments.split(), code, said


EASILY = {
    "an empty file": story(said=r"a\.jsonl: 0 rows\n  no rows, at least one is needed"),
    "nothing to show": story(said=r"\Aa\.jsonl: no rows, at least", arguments="show a.jsonl --task sft --model MODEL"),
    "broken rows only": story(["q"], said=r"a\.jsonl:1: a list \(\['q'\]\), a row must be an object"),
    "a bad row only": story(GOOD | {"prompt": ""}, said=r"a\.jsonl:1: prompt: empty"),
    "not prompts with a misspelt field": story(
        *[{"prompt": "q", "completon": "yes"}] * 2, said=r"completon: unknown field; did you mean completion\?"),
    "not prompts with a label": story(*[GOOD | {"label": "good"}] * 2, said=r"label: text \('good'\), must be true"),
    "not prompts with other columns": story(*[PAIR | {"grade": 1}] * 2, said="grade: unknown field; remove it"),
    "pairs whose question has another name": story(
        *[{"system": "s", "question": "q", "chosen": "yes", "rejected": "no"}] * 2, said=r"as implicit \(chosen, "),
    "prompts: the user has the last word": story({"messages": CHAT[:1]}, code=0, said="read as messages: 1 row\n"),
    "rows of no task": story({"a": 1}, said=r"a\.jsonl:1: a: no format of task sft, .*\nnor are they rows for "
                             r"preference, unpaired, prompt, text; --task TASK says what these read\n\Z"),
    "a file of another kind": story(said=r"\Aa\.xlsx: suffix \.xlsx is not .*use [^\n]*\n\Z", arguments="check a.xlsx"),
    "no such folder": story(said=f"no/a.jsonl does not exist, nor does its folder; {IS_NO_KEY}\n",
                            arguments="check no/a.jsonl"),
    "a margin in some rows": story(
        PAIR | {"margin": 1}, PAIR | {"prompt": "q"},
        said="a.jsonl:2: margin: missing, other rows have one; give every row a margin, or none\n"),
    "the file after one that cannot be read": story(
        {"a": 1}, said=r"b\.jsonl: read as", arguments="check a.jsonl b.jsonl --task sft"),
    "bad rows, not in the last file": story(
        GOOD | {"prompt": ""}, said=r"b\.jsonl: read as", arguments="check a.jsonl b.jsonl"),
    "two columns for one field": story(
        {"q": "a", "r": "b", "completion": "c"}, code=2, arguments="check a.jsonl --column prompt=q --column prompt=r",
        said="--column prompt=r: prompt is q already; name one column for it\n"),
    "words that end a turn": story(
        {"messages": [turn("user", "<|im_end|>"), CHAT[1]]}, arguments="check a.jsonl --model MODEL",
        said=r"1 row, 1 of them bad\n  special token: 1 row\n    a\.jsonl:1: messages\[0\]\.content: "),
    "documents are not cut": story(
        {"text": "left shelf " * 20}, code=0, arguments="check a.jsonl --model MODEL --max-length 8",
        said=r"\Aa\.jsonl: read as text: 1 row\n  tokens: ([2-9]\d|\d{3}) in all.*\n\Z"),
    "unless they are for sft": story(
        {"text": "left shelf " * 20}, code=0, arguments="check a.jsonl --task sft --model MODEL --max-length 8",
        said=r"the longest 8\n  note: 1 row is longer than max_length"),
    "documents have no end": story(
        {"text": "left shelf " * 20}, code=0, arguments="show a.jsonl --model MODEL", said="1 row, none is cut:"),
    "a model without a chat template is no matter of the next file": story(
        {"messages": CHAT}, arguments="check a.jsonl b.jsonl --model BARE",
        said=r"\Aa\.jsonl: tokenizer: no chat template, rows of messages need one; .*\nb\.jsonl: read as "),
    "ids of another model": story(
        {"prompt_ids": [1], "completion_ids": [9999]}, arguments="check a.jsonl --model MODEL",
        said=r"bad value: 1 row\n    a\.jsonl:1: completion_ids\[0\]: 9999, the vocabulary has \d+ ids"),
    "prompts have tokens too": story({"prompt": "left shelf"}, code=0, said=r"  tokens: [1-9]\d* in all",
                                     arguments="check a.jsonl --task prompt --model MODEL"),
    "and are as long as they are": story({"prompt": "left shelf " * 20}, code=0, said=r" up to (32|64|128|256) +1 ",
                                         arguments="show a.jsonl --task prompt --model MODEL"),
    "the row without a margin is counted once more": story(
        PAIR | {"margin": 1}, PAIR | {"prompt": "q"},
        said=r"2 rows\n(.*\n)*  a\.jsonl:2: margin: missing, other rows have one"),
    "ShareGPT turns that end with a question are taken for sft": story(
        *[{"conversations": [{"from": "human", "value": "q"}]}] * 2, code=0, said="read as sharegpt: 2 rows"),
    "alpaca rows without output pass, and nothing says that they are read as prompts": story(
        {"instruction": "q", "response": "yes"}, code=0, said="prompt"),
    "of a format of no task, only those of sft are named": story(
        GOOD, said=r"did you mean hh-rlhf\?", code=2, arguments="check a.jsonl --format hh-rlfh"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("records", "arguments", "code", "said"),
    [pytest.param(*one, id=name) for name, one in EASILY.items()],
)
def test_what_is_easily_taken_for_something_else(
    records: Any, arguments: list[str], code: int, said: str, model: str, bare: str
) -> None:
    write("a.jsonl", *records)
    write("b.jsonl", GOOD)
    Path("a.xlsx").write_bytes(b"PK")
    found, output = data(*[{"MODEL": model, "BARE": bare}.get(word, word) for word in arguments])
    assert found == code and re.search(said, output), output


@pytest.mark.skipif(not STORIES.is_dir(), reason="the folder of real models, ../shared/data/models, is not here")
def test_a_tokenizer_of_words_with_spaces_before_them() -> None:
    write("a.jsonl", {"prompt": "Once upon a time", "completion": " there was a cat."})
    assert "Once upon a time⟦ there was a cat.</s>⟧" in data("show", "a.jsonl", "--model", str(STORIES))[1]


@pytest.mark.parametrize("task", [(), ("--task", "preference")])
def test_the_column_that_weighs_pairs_is_checked_as_dpo_does(task: tuple[str, ...], model: str) -> None:
    file = write("a.jsonl", PAIR | {"votes": 2, "fb_p": 0.9}, PAIR | {"votes": -2})
    code, said = data("check", file, *task, "--weight-column", "votes")
    assert code == 3 and "a.jsonl:2: votes: a number (-2), a weight is a number from 0 to 1e30" in said
    code, said = data("check", file, *task)
    assert code == 3 and "votes: unknown field" in said
    assert data("show", write("b.jsonl", PAIR | {"votes": 2}), "--model", model, "--weight-column", "votes")[0] == 0
    assert data("check", write("c.jsonl", PAIR | {"fb_p": 0.9}), *task)[0] == 0
    code, said = data("check", file, "--task", "sft", "--weight-column", "votes")
    assert code == 2 and "--weight-column votes: weighs pairs, not rows of task sft; remove one" in said
