"""`_C.unchanged`, which compares what a block has seen of its submodules with what is there."""

from __future__ import annotations

import gc
import sys
import weakref
from collections import OrderedDict

import eager
import pytest
import torch

from gcnet_ext import GlobalContextBlock, _load, replace_blocks

pytestmark = pytest.mark.usefixtures("kernels")


class Base:
    pass


class Thing(Base):
    pass


@pytest.fixture
def seen():
    """An object of a kind, a field that holds a dictionary, its length, children in an order, and what is wanted."""
    thing, hooks = Thing(), OrderedDict()
    children = {"first": object(), "second": object()}
    fields = {"hooks": hooks, "weight": object(), "children": children}
    arguments = (
        (thing, Thing, _load.compiled.class_version(Thing)),
        (fields, "hooks", hooks, fields, "forward", None),
        (hooks, 0),
        (children, tuple(part for item in children.items() for part in item)),
        ((fields, "weight"), (), (fields, "weight", fields, "children")),
        (object, type(None), dict),
    )
    return thing, fields, hooks, arguments


def unchanged(arguments):
    return _load.compiled.unchanged(*arguments)


def test_returns_what_is_wanted_now(seen):
    _, fields, _, arguments = seen
    assert unchanged(arguments) == [[fields["weight"]], [], [fields["weight"], fields["children"]]]
    fields["weight"] = None
    fields["another"] = 1
    assert unchanged(arguments) == [[None], [], [None, fields["children"]]]


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


def another_method(thing, fields, hooks):
    Thing.method = lambda self: None


def another_method_of_a_base(thing, fields, hooks):
    Base.method = lambda self: None


def in_another_order(thing, fields, hooks):
    fields["children"]["first"] = fields["children"].pop("first")


def with_swapped_names(thing, fields, hooks):
    first, second = fields["children"].values()
    fields["children"].clear()
    fields["children"].update(second=first, first=second)


def another_child(thing, fields, hooks):
    fields["children"]["second"] = object()


def one_child_more(thing, fields, hooks):
    fields["children"]["third"] = object()


def one_child_less(thing, fields, hooks):
    del fields["children"]["second"]


def of_another_class(thing, fields, hooks):
    fields["weight"] = Thing()


def of_a_subclass(thing, fields, hooks):
    fields["weight"] = OrderedDict()


CHANGES = (
    *(of_another_class, of_a_subclass),
    *(other_kind, another_method, another_method_of_a_base),
    *(equal_but_another, gone, new, longer, not_there_any_more),
    *(in_another_order, with_swapped_names, another_child, one_child_more, one_child_less),
)


@pytest.mark.parametrize("change", CHANGES)
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


def test_an_ordered_dictionary_of_children_is_never_unchanged(seen):
    """Its order is not the one in which CPython goes through it."""
    *_, arguments = seen
    assert unchanged((*arguments[:3], (OrderedDict(), ()), *arguments[4:])) is None


@pytest.mark.parametrize(
    "arguments",
    [
        ((object(), object, "version"), (), (), (), (), ()),
        ((), (1, "a", None), (), (), (), ()),
        ((), (), (1, 0), (), (), ()),
        ((), (), (), (), ((None, "weight"),), ()),
        ((), (), (), (), ({}, "weight"), ()),
        ((), ({}, [], None), (), (), (), ()),
        ((), (), (), (), ()),
        ((), [], (), (), (), ()),
    ],
    ids=[
        "version that is no number",
        "field of no dictionary",
        "length of no dictionary",
        "wanted of no dictionary",
        "wanted in no tuples",
        "a name without a hash",
        "too few tuples",
        "a list",
    ],
)
def test_raises_rather_than_crashes(arguments):
    with pytest.raises((SystemError, TypeError)):
        unchanged(arguments)


def test_class_version():
    """It stays as long as the class and its bases stay."""
    version = _load.compiled.class_version(Thing)
    assert version != 0
    assert _load.compiled.class_version(Thing) == version
    Base.another = 1
    assert _load.compiled.class_version(Thing) not in (0, version)
    with pytest.raises(TypeError, match="class_version takes a class"):
        _load.compiled.class_version(Thing())


@pytest.mark.parametrize("replaced", [False, True])
def test_a_block_is_freed_when_the_last_name_of_it_goes(replaced):
    """Its parameters need not wait for the garbage collector."""
    block = eager.ContextBlock(16, 1 / 4) if replaced else GlobalContextBlock(16, 1 / 4)
    if replaced:
        assert len(replace_blocks(block).replaced) == 1
    x = torch.randn(2, 16, 4, 4)
    with torch.no_grad():
        block(x)
        block(x)
    assert block._seen is not None
    left = [weakref.ref(part) for part in (block, *block.parameters())]
    gc.collect()
    gc.disable()
    try:
        del block
        assert [each() for each in left] == [None] * len(left)
    finally:
        gc.enable()
