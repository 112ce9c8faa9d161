"""The list of `make mutants` has not rotted: every text is where the list says, once."""

from __future__ import annotations

import re

import pytest
from checkout import ROOT
from make_mutants import MUTANTS, NUMBERS, applied, path_of, with_choices


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_is_where_the_list_says(mutant):
    source = (ROOT / mutant.file).read_text()
    changed = applied(source, mutant, mutant.replaced_by(mutant.mistake))
    assert changed != source
    assert mutant.text.count("«") == mutant.text.count("»") == 1
    assert mutant.parts()[1] != mutant.mistake
    if not mutant.compiled:
        compile(changed, mutant.file, "exec")


def test_a_text_that_is_gone_or_there_twice_is_an_error():
    for source in ("", MUTANTS[0].original * 2):
        with pytest.raises(ValueError, match=rf"{MUTANTS[0].name}: its text occurs \d times in .* and must occur once"):
            applied(source, MUTANTS[0], "")


def test_names_tests_and_number():
    names = [mutant.name for mutant in MUTANTS]
    assert len(names) == len(set(names)) >= 60
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in names)
    assert all((ROOT / path_of(test).partition("::")[0]).is_file() for mutant in MUTANTS for test in mutant.tests)
    assert all(mutant.tests and mutant.what.endswith(".") for mutant in MUTANTS)


def test_choices_of_one_file_do_not_disturb_each_other():
    """Every mistake in C++ is compiled, beside the code that it stands for."""
    for file in {mutant.file for mutant in MUTANTS if mutant.compiled}:
        source = with_choices(file, (ROOT / file).read_text())
        for mutant, number in NUMBERS.items():
            assert (f"mutant({number})" in source) == (mutant.file == file)
