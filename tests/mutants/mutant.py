"""One mistake, and how it is put into a copy of the tree."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Mutant(NamedTuple):
    """A mistake that a tired developer could make.

    Attributes:
        name: short, of letters, digits and dashes.
        file: relative to the root.
        text: occurs in the file exactly once. What the mistake replaces stands between « and », which are not in the file.
        mistake: what stands there instead. In C++ an expression of the same type, or statements if `text` has some there.
        what: one sentence: what is wrong then.
        tests: names of the test files that run, in any folder of tests, or of tests in them, in the order in which they are
            likely to notice it.
    """

    name: str
    file: str
    text: str
    mistake: str
    what: str
    tests: tuple[str, ...]

    @property
    def compiled(self) -> bool:
        return self.file.startswith("csrc/")

    @property
    def original(self) -> str:
        """The text of the file."""
        return self.text.replace("«", "").replace("»", "")

    def parts(self) -> tuple[str, str, str]:
        """What comes before the mistake, what it replaces, and what comes behind."""
        before, _, rest = self.text.partition("«")
        replaced, _, behind = rest.partition("»")
        return before, replaced, behind

    def replaced_by(self, replacement: str) -> str:
        before, _, behind = self.parts()
        return before + replacement + behind

    def choice(self, number: int) -> str:
        """The text in C++, with the mistake if that number is chosen at run time."""
        replaced = self.parts()[1]
        chosen = f"gcnet_ext::mutant({number})"
        if replaced.endswith(";"):
            return self.replaced_by(f"if ({chosen}) {{ {self.mistake} }} else {{ {replaced} }}")
        return self.replaced_by(f"({chosen} ? ({self.mistake}) : ({replaced}))")


def path_of(test: str) -> str:
    """The test with the folder of its file; names of test files are unique."""
    name, separator, function = test.partition("::")
    (path,) = (ROOT / "tests").rglob(name)
    return f"{path.relative_to(ROOT)}{separator}{function}"


def applied(source: str, mutant: Mutant, replacement: str) -> str:
    """The source with the text of the mutant replaced.

    Raises:
        ValueError: the text is not there, or more than once.
    """
    count = source.count(mutant.original)
    if count != 1:
        raise ValueError(
            f"{mutant.name}: its text occurs {count} times in {mutant.file}, and must occur once: {mutant.original!r}"
        )
    return source.replace(mutant.original, replacement)
