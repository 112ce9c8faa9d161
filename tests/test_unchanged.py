"""`_C.unchanged`, which compares what a block has seen of its submodules with what is there."""

from __future__ import annotations

import sys
from collections import OrderedDict

import pytest

from gcnet_ext import _library

pytestmark = pytest.mark.usefixtures("kernels")


class Thing:
    pass


@pytest.fixture
def seen():
    """An object of a kind, a field that holds a dictionary, its length, and what is wanted."""
    thing, hooks = Thing(), OrderedDict()
    fields = {"hooks": hooks, "weight": object()}
    arguments = (thing, Thing), (fields, "hooks", hooks, fields, "forward", None), (hooks, 0), (fields, "weight")
    return thing, fields, hooks, arguments


def unchanged(arguments):
    return _library.compiled.unchanged(*arguments)


def test_returns_what_is_wanted_now(seen):
    _, fields, _, arguments = seen
    assert unchanged(arguments) == [fields["weight"]]
    fields["weight"] = None
    fields["another"] = 1
    assert unchanged(arguments) == [None]


def other_kind(thing, fields, hooks):
    thing.__class__ = type("Other", (Thing,), {})


def equal_but_another(thing, fields, hooks):
    fields["hooks"] = OrderedDict()


def gone(thing, fields, hooks):
    del fields["hooks"]


def new(thing, fields, hooks):
    fields["forward"] = print


def longer(thing, fields, hooks):
    hooks[0] = print


def not_there_any_more(thing, fields, hooks):
    del fields["weight"]


@pytest.mark.parametrize("change", [other_kind, equal_but_another, gone, new, longer, not_there_any_more])
def test_notices(seen, change):
    *found, arguments = seen
    change(*found)
    assert unchanged(arguments) is None


def test_nothing_is_kept(seen):
    thing, fields, hooks, arguments = seen
    before = [sys.getrefcount(part) for part in (thing, fields, hooks, fields["weight"])]
    for _ in range(100):
        unchanged(arguments)
    assert [sys.getrefcount(part) for part in (thing, fields, hooks, fields["weight"])] == before


@pytest.mark.parametrize(
    "arguments",
    [
        ((), (1, "a", None), (), ()),
        ((), (), (1, 0), ()),
        ((), (), (), (None, "weight")),
        ((), ({}, [], None), (), ()),
        ((), (), ()),
        ((), [], (), ()),
    ],
    ids=[
        "field of no dictionary",
        "length of no dictionary",
        "wanted of no dictionary",
        "a name without a hash",
        "too few tuples",
        "a list",
    ],
)
def test_raises_rather_than_crashes(arguments):
    with pytest.raises((SystemError, TypeError)):
        unchanged(arguments)
