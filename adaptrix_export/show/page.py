"""report.html: one file that needs nothing else, and asks for nothing over a network.

The same facts give the same bytes: there is no clock and no path of the machine in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from adaptrix_export import __version__
from adaptrix_export.show import sections
from adaptrix_export.show.facts import Facts
from adaptrix_export.show.load_code import snippets
from adaptrix_export.show.picture import energy_pictures, gate_pictures

if TYPE_CHECKING:
    from jinja2 import Environment

PAGE = "report.html"


def report_page(facts: Facts) -> str:
    """The page of one artifact."""
    return _render(
        "report.html.j2",
        {
            "title": facts.title,
            "facts": facts,
            "verdict": sections.verdict(facts),
            "tiles": sections.tiles(facts),
            "pictures": energy_pictures(facts),
            "gate_pictures": gate_pictures(facts),
            "checks": sections.checks(facts),
            "proof": sections.proof_sheets(facts),
            "behaviour": sections.behaviour_sheets(facts),
            "inputs": sections.input_sheet(facts),
            "outputs": sections.output_sheet(facts),
            "stages": sections.stage_sheet(facts),
            "versions": sections.versions(facts),
            "passes": sections.passes(facts),
            "notes": sections.notes(facts),
            "snippets": snippets(facts, facts.name),
        },
    )


def compare_page(titles: Sequence[str], sheet: sections.Sheet, facts: Sequence[Facts]) -> str:
    """The page of several artifacts side by side."""
    return _render(
        "compare.html.j2",
        {
            "title": " / ".join(titles),
            "sheet": sheet,
            "artifacts": [(f.name, sections.verdict(f), energy_pictures(f)) for f in facts],
        },
    )


def _render(template: str, values: Mapping[str, Any]) -> str:
    return _environment().get_template(template).render(version=__version__, **values)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import BaseLoader, Environment, StrictUndefined, TemplateNotFound

    folder = files(__package__) / "pages"

    class Packaged(BaseLoader):
        """Templates that lie in the package, also where that is a zip file."""

        def get_source(self, environment: Environment, template: str) -> tuple[str, str, Any]:
            place = folder / template
            if not place.is_file():
                raise TemplateNotFound(template)
            return place.read_text(encoding="utf-8"), template, lambda: True

    return Environment(
        loader=Packaged(),
        autoescape=True,  # names in a manifest come from files of others
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
