"""What answers say: read by hand here, and by the stage."""

from __future__ import annotations

import time
from typing import Any

import pytest

from align_pipeline.data.rows import Message, Prompt, PromptIds
from align_pipeline.pipeline.errors import DataError
from align_pipeline.stages.labelled import known, normalised, problem_of, said


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The answer is 42.", "42"),
        ("87 oranges and 290 bananas make 1,234.50 in all.", "1234.5"),
        ("so 3-4 = -1", "-1"),
        ("it is −7 °C", "-7"),
        ("between 3-4", "4"),
        ("about .5", "0.5"),
        ("5 * 2 = 10.0", "10"),
        ("1.45e2", "145"),
        ("-0.0", "0"),
        ("12,5", None),
        ("$20,000!", "20000"),
        ("50%", "50"),
        ("v2 of x3", None),
        ("none at all", None),
        ("<think>maybe 3</think> It is 8", "8"),
        ("3.", "3"),
        ("the 3rd", None),
        ("There are 3 cars, so 60km.", "60"),
        ("It is 60km", "60"),
        ("2nd", None),
        ("1 000 000", "1000000"),
        ("$1\u202f234.50", "1234.5"),
        ("in 2020 100 people", "100"),
        ("1.000,50", None),
        ("1 000,50", None),
        ("It lasts 3 h, until 10:30", None),
        ("3/4", None),
        ("10^6", None),
        ("v2.5 or 1.5x2", None),
        ("...42", "42"),
        ("1e99999999999999999999", None),
        ("The answer is 42. I checked 3 times.", "42"),
        ("**Answer:** 42 apples\nfor 3 people", "42"),
        ("The answer is **42** km, in 3 hours", "42"),
        (r"Thus \boxed{42}, as 3 others say", "42"),
        ("The answer is 12,5. I checked 3 times.", None),
        ("The answer is 3 + 4 = 7.", "7"),
        ("Answer: There are 3 cars. So 60 km.", "60"),
    ],
)
def test_the_last_number(answer: str, expected: str | None) -> None:
    assert said(answer, "number") == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("(B)", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("**C**", "C"),
        ("**(C)** because", "C"),
        ("B) the doctor", "B"),
        ("A: yes", "A"),
        ("A man walks", None),
        ("I think so", None),
        ("Let us see. (A) is wrong, so the answer is (C).", "C"),
        ("The answer is **B**.\n(A) would be silly.", "B"),
        ("Answer: D\n", "D"),
        ("The answer is A, not B", "A"),
        ("The correct option is (A), rather than... no, (B)", "B"),
        ("<think>The answer is (A)</think>(B)", "B"),
        ('The answer is "B"', "B"),
        ("The answer is $B$", "B"),
        (r"\boxed{B}", "B"),
        (r"So it is \boxed{\text{(B)}}.", "B"),
        ("Answer: b", "B"),
        ("answer: b) the doctor", "B"),
        ("Answer: a man walks", None),
        ("The correct answer is option B", "B"),
        ("B is correct", "B"),
        ("**Option B** is the right one", "B"),
        ("B is not correct", None),
        ("I choose B.", "B"),
        ("I choose a bar", None),
        ("", None),
    ],
)
def test_the_letter_of_a_choice(answer: str, expected: str | None) -> None:
    assert said(answer, "choice") == expected


def test_a_choice_may_be_named_by_its_text() -> None:
    options = ("new york", "york", "paris")
    assert said("It is Paris, of course.", "choice", (), options) == "C"
    assert said("It is New York.", "choice", (), options) is None, "york is in it too"
    assert said("(Z)", "choice", (), options) is None
    assert said("the answer is (Z), I mean (B)", "choice", (), options) == "B"


def test_letters_beyond_the_labels_of_a_set_are_none() -> None:
    assert said("I. First, (A) is wrong", "choice", {"A", "C"}) == "A"
    assert said("I. First, (A) is wrong", "choice", {"A", "J"}) == "I"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("not ( True ) is False", "false"),
        ("So the answer is True. It is not False.", "true"),
        ("TRUE!", "true"),
        ("untrue", None),
        ("The answer is maybe; I say false", "false"),
    ],
)
def test_the_label_that_is_named(answer: str, expected: str | None) -> None:
    assert said(answer, "label", {"true", "false"}) == expected
    assert said("it is not valid", "label", {"valid", "not valid"}) == "not valid"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("It is not valid", None),
        ("It isn’t valid.", None),
        ("The argument is not deductively valid", None),
        ("The answer is not valid, it is invalid", "invalid"),
        ("Valid, not invalid", "valid"),
        (r"\boxed{\text{valid}}, which is not invalid", "valid"),
        ("It is not clear; valid", "valid"),
    ],
)
def test_a_label_that_is_denied_is_not_named(answer: str, expected: str | None) -> None:
    assert said(answer, "label", {"valid", "invalid"}) == expected


def test_long_answers_take_no_time() -> None:
    before = time.process_time()
    for part in ("1.1", " 100", "answer is (", "not ", "Option ", "1,", "a"):
        for extract in ("number", "choice", "label"):
            said(f"answer is {part * 20_000}xx", extract, {"C"})
    assert time.process_time() - before < 5, "where it grows with the square, it takes minutes"


def test_text_and_patterns() -> None:
    assert said("  Not   VALID. ", "text") == "not valid"
    assert said("…", "text") == "...", "where there is nothing else, punctuation is what is said"
    assert said("] )", "text") == normalised(" ]  )")
    assert said("", "text") is None
    assert said("x = 3; x = Four.", r"regex:x = (\w+)") == "four"
    assert said("x = 3", r"regex:y = (\w+)") is None
    assert said("ab12", r"regex:\d+") == "12"
    assert normalised("ＡＢＣ") == "abc"
    assert normalised("-3") != normalised("3")
    assert "did you mean choice" in str(problem_of("choise"))
    assert "no regular expression" in str(problem_of("regex:("))
    assert problem_of("regex:(a)") is problem_of("label") is None


def test_labels_come_in_the_form_that_answers_are_read_in() -> None:
    def label(extract: str, columns: dict[str, str] | None = None, **extra: Any) -> str:
        return known([Prompt("f:1", "q", extra)], extract, columns or {})[0].label

    assert label("number", answer=145.0) == "145"
    assert label("number", answer="1,000") == "1000"
    assert label("choice", answer="(B)") == label("choice", label="B") == "B"
    assert label("text", {"answer": "target"}, target="Yes.") == "yes"
    three = ["x", "y", "z"]
    assert label("choice", answer=2, choices=three) == "C"
    assert label("choice", answer="y", choices=three) == "B"
    assert label("choice", {"choices": "options"}, answer="C", options=three) == "C"


def test_options_are_written_below_the_question() -> None:
    text = known([Prompt("f:1", "Which?", {"answer": 0, "choices": ["Red", "Blue"]})], "choice", {})[0]
    assert text.row.prompt == "Which?\nOptions:\n(A) Red\n(B) Blue"
    assert text.options == ("red", "blue")
    turns = (Message("system", "s"), Message("user", "Which?"))
    chat = known([Prompt("f:1", turns, {"answer": 0, "choices": ["Red", "Blue"]})], "choice", {})[0]
    assert chat.row.prompt == (turns[0], Message("user", "Which?\nOptions:\n(A) Red\n(B) Blue"))


@pytest.mark.parametrize(
    ("extract", "extra", "message"),
    [
        ("text", {}, "f:1: answer: None, must be the right answer; fix the row, or name its column .no other column"),
        ("text", {"target": "x"}, r"or name its column \(target\)"),
        ("text", {"answer": " "}, "must be the right answer"),
        ("text", {"answer": ["x"]}, "must be the right answer"),
        ("number", {"answer": "four"}, "f:1: answer: 'four', must be a number"),
        ("number", {"answer": "nan"}, "must be a number"),
        ("number", {"answer": "12,5"}, "must be a number"),
        ("choice", {"answer": "Paris"}, r"must be a letter such as \(A\)"),
        ("choice", {"answer": "D", "choices": ["a b", "b"]}, "must be the letter, the text or the place"),
        ("choice", {"answer": 2, "choices": ["a", "b"]}, "the place of one of 2 choices, from 0"),
        ("choice", {"answer": "A", "choices": "a, b"}, "must be a list of 2 to 26 texts"),
        ("choice", {"answer": "A", "choices": ["a", "A "]}, "must differ"),
        ("text", {"answer": "A", "choices": ["a", "b"]}, "options are read with extract: choice"),
        ("label", {"answer": "yes"}, "all rows have the label 'yes'"),
    ],
)
def test_rows_without_a_right_answer_are_named(extract: str, extra: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        known([Prompt("f:1", "q", extra)], extract, {})


def test_options_need_words() -> None:
    with pytest.raises(DataError, match="cannot be written below token ids"):
        known([PromptIds("f:1", (1, 2), {"answer": 0, "choices": ["a", "b"]})], "choice", {})
