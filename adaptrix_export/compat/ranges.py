"""Warns of installed libraries outside the version ranges of this package's metadata.

The ranges are the tested versions. pip keeps to them unless it is forced. Other versions may work,
so they are not refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version

DISTRIBUTION = "adaptrix-export"


def outside_ranges(requirements: Iterable[str] | None = None) -> str | None:
    """One line that names each installed library outside its range; None if there is none.

    `requirements` default to those of this package and its extras.
    """
    outside = sorted(set(_outside(_declared() if requirements is None else requirements)))
    if not outside:
        return None
    return f"outside the versions that this package is tested with: {'; '.join(outside)}"


def _declared() -> Iterable[str]:
    try:
        return requires(DISTRIBUTION) or ()
    except PackageNotFoundError:
        return ()  # run from source, not installed


def _outside(requirements: Iterable[str]) -> Iterator[str]:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    ranges: dict[str, list[SpecifierSet]] = {}
    for line in requirements:
        requirement = Requirement(line)
        if not requirement.extras:  # else an extra of this package that includes another
            ranges.setdefault(requirement.name, []).append(requirement.specifier)
    for name, specifiers in ranges.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue  # of an extra that is not installed
        # Extras may differ: to run artifacts, an older ONNX Runtime will do than to build them.
        if not any(specifier.contains(installed, prereleases=True) for specifier in specifiers):
            yield f"{name} {installed}, tested {' or '.join(map(str, specifiers))}"
