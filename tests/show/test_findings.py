"""The table of `validate`: what is alike is one line."""

from adaptrix_export.manage.findings import ERROR, OK, WARNING, Finding, Validation
from adaptrix_export.show.findings import grouped


def test_findings_that_differ_in_their_places_alone_are_one_line():
    same = [("a", Finding(WARNING, "values", f"a: layer {n}", "zero", "not")) for n in range(11)]
    other = [("a", Finding(WARNING, "values", "a: layer 3", "NaN", "finite"))]
    second = [("b", Finding(WARNING, "values", "b: layer 3", "zero", "not"))]
    last = [("a", Finding(OK, "shapes", "a", "fit")), ("a", Finding(ERROR, "shapes", "a", "fit"))]
    lines = grouped(Validation("base", (*same[:5], *other, *same[5:], *second, *last)))
    assert [(f.severity, f.found, place) for f, place in lines] == [
        (WARNING, "zero", "a: layer 0 and 10 more"),
        (WARNING, "NaN", "a: layer 3"),
        (WARNING, "zero", "b: layer 3"),
        (OK, "fit", "a"),
        (ERROR, "fit", "a"),
    ]
