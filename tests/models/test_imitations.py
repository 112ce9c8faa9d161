"""The imitations stand where the libraries have their classes: gcnet_ext finds a class by its name and its module."""

from __future__ import annotations

import imitations
import pytest

PLACES = [
    pytest.param(place, name, kind, id=f"{place}.{name}")
    for place, those in imitations.IMITATIONS.items()
    for name, kind in vars(those).items()
]


@pytest.mark.parametrize(("place", "name", "kind"), PLACES)
def test_the_library_has_the_class_there(place, name, kind):
    theirs = getattr(imitations.real(place), name)
    assert theirs.__name__ == kind.__name__
    assert theirs.__module__ == kind.__module__


@pytest.mark.parametrize(
    "kind", [each for each in vars(imitations).values() if isinstance(each, type) and imitations.is_imitation(each)]
)
def test_the_library_has_a_class_of_that_name(kind):
    assert getattr(imitations.real(kind.__module__), kind.__name__).__module__ == kind.__module__
