"""What cells and their arguments are called, and how a text is brought into lines."""

import pytest

from decinb.utils.labels import describe, label, plain, printable, spreadsheet_cell, wrap


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("strength", 0.8500000000000001, "strength 0.85"),
        ("guidance_scale", 7, "guidance 7"),
        ("seed", 2**63 - 1, "seed 9223372036854775807"),
        ("prompt", "a house", "a house"),
        ("prompt", "", "no prompt"),
        ("negative_prompt", "fog", "negative prompt: fog"),
        ("negative_prompt", None, "no negative prompt"),
        ("scheduler", "DDIMScheduler", "scheduler DDIMScheduler"),
    ],
)
def test_an_argument_is_told_in_a_few_words(name, value, words):
    assert describe(name, value) == words


def test_a_cell_is_told_by_what_it_names():
    assert label({"seed": 3, "strength": 0.5, "prompt": "a house"}) == "strength 0.5, seed 3"
    assert label({}) == "defaults"
    assert plain(30) == "30"


def at_most(letters):
    return lambda line: len(line) <= letters


def test_a_text_is_broken_between_words_and_a_word_only_where_it_is_too_long():
    assert wrap("a painting of a house", at_most(10)) == ["a painting", "of a house"]
    assert wrap("a superlongword here", at_most(5)) == ["a", "super", "longw", "ord", "here"]
    assert wrap("", at_most(5)) == [""]


def test_a_text_of_too_many_lines_is_cut_and_says_so():
    assert wrap("one two three four", at_most(5), most=2) == ["one", "two…"]
    assert wrap("one two three four", at_most(5), most=2, end=True) == ["…hree", "four"]
    assert wrap("one two", at_most(5), most=2) == ["one", "two"]


@pytest.mark.parametrize("text", ["=1+2", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_text_that_a_spreadsheet_would_run_gets_an_apostrophe(text):
    assert spreadsheet_cell(text) == "'" + text


@pytest.mark.parametrize("value", ["a house", "", "a=b", -1, 0.5, None, True])
def test_other_values_of_a_spreadsheet_stay(value):
    assert spreadsheet_cell(value) is value


def test_what_cannot_be_encoded_is_written_as_an_escape():
    assert printable("caf\udce9 \0") == "caf\\udce9 \\0"
    assert describe("image", "caf\udce9.png") == "caf\\udce9.png"
