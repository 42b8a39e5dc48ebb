"""The versions of other libraries that this package was tried with: those that its metadata allows.

pip keeps to them unless it is forced. What lies outside may well work, so it is said and not
refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version

DISTRIBUTION = "adaptrix-export"


def outside_ranges(requirements: Iterable[str] | None = None) -> str | None:
    """One line naming each installed library outside its range; None where there is none.

    `requirements` are those of this package, of its extras too, unless others are given.
    """
    found = sorted(set(_outside(_declared() if requirements is None else requirements)))
    if not found:
        return None
    return f"outside the versions that this package is tested with: {'; '.join(found)}"


def _declared() -> Iterable[str]:
    try:
        return requires(DISTRIBUTION) or ()
    except PackageNotFoundError:
        return ()  # run from its sources, without having been installed


def _outside(requirements: Iterable[str]) -> Iterator[str]:
    from packaging.requirements import Requirement

    for line in requirements:
        wanted = Requirement(line)
        if wanted.extras:
            continue  # an extra of this package that takes in another
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            continue  # of an extra that was not asked for
        if not wanted.specifier.contains(found, prereleases=True):
            yield f"{wanted.name} {found}, tested {wanted.specifier}"
