"""Every check of adapters against a base, without building anything.

Each adapter is checked by itself, also when several are named. Nothing stops at the first problem:
an adapter that cannot be opened gives its errors, and the next one is looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from pathlib import PurePosixPath, PureWindowsPath

import numpy as np

from adaptrix_export.errors import InputError
from adaptrix_export.load import open_adapter, open_base
from adaptrix_export.load.adapters.peft_adapter import CONFIG, config_problems
from adaptrix_export.load.adapters.targets import ALL_LINEAR, is_targeted, modules
from adaptrix_export.load.files.finite import blocks, not_finite, shipped_tensors
from adaptrix_export.load.files.tensors import read_json
from adaptrix_export.load.fit.adjust import adjusted
from adaptrix_export.load.fit.invariants import misfits
from adaptrix_export.load.fit.replication import repeat_layers
from adaptrix_export.load.source import resolve
from adaptrix_export.manage.findings import ERROR, OK, WARNING, Finding, Validation
from adaptrix_export.merge.norms import LARGEST, SMALLEST, delta_norm, tensor_norm
from adaptrix_export.package.tokenizer import AUTO, choose_tokenizer, missing_tokenizer
from adaptrix_export.plan import Adapter, Base, Plan, Tensor, Term
from adaptrix_export.progress import Progress, Silent


@dataclass(frozen=True)
class Subject:
    """An adapter as it is on disk, and the plan in which it is read as it means on the base.

    `norms` keeps those of the base's tensors from one adapter to the next.
    """

    adapter: Adapter
    plan: Plan
    norms: dict[str, float] = field(default_factory=dict)

    @property
    def base(self) -> Base:
        return self.plan.base

    @property
    def read(self) -> Adapter:
        return self.plan.adapters[0]

    @cached_property
    def ratios(self) -> dict[str, float]:
        """Module -> |delta| / |weight|, for every site that fits and has low-rank terms."""
        wrong = {misfit.site for misfit in misfits(self.plan)}
        ratios: dict[str, float] = {}
        for delta in self.read.deltas:
            if delta.parameter != "weight" or delta.site in wrong:
                continue
            if (norm := delta_norm(delta)) is not None:
                weight = self._norm(self.base.tensors[self.base.tied.get(delta.name, delta.name)])
                ratios[delta.site.path] = norm / weight if weight else inf
        return ratios

    def _norm(self, tensor: Tensor) -> float:
        if tensor.name not in self.norms:
            self.norms[tensor.name] = tensor_norm(tensor)
        return self.norms[tensor.name]


def validate(base: str, adapters: Sequence[str], progress: Progress | None = None) -> Validation:
    """Check every adapter against the base.

    Raises what opening the base raises; whatever is wrong with an adapter is a finding.
    """
    progress = progress or Silent()
    opened = open_base(base, adapters=adapters)
    norms: dict[str, float] = {}
    findings: list[tuple[str, Finding]] = []
    for spec in adapters:
        try:
            adapter = open_adapter(spec, opened)
            plan = adjusted(repeat_layers(Plan(opened, (adapter,))))
        except InputError as error:
            findings += [(spec, finding) for finding in _unopened(spec, error)]
            continue
        subject = Subject(adapter, plan, norms)
        with progress.stage(adapter.name, len(CHECKS), "checks") as advance:
            for check in CHECKS:
                findings += [(adapter.name, finding) for finding in _run(check, subject)]
                advance(1)
    return Validation(opened.spec, tuple(findings))


def _unopened(spec: str, error: InputError) -> Iterator[Finding]:
    """Why an adapter cannot be opened: everything in its config, if it is the config."""
    try:
        config = read_json(resolve(spec).folder / CONFIG)
    except InputError:
        yield Finding.of(error, "format")  # the same fault, met again
        return
    errors: list[InputError] = [*config_problems(spec, config)]
    yield from (Finding.of(problem, "format") for problem in errors or [error])


Rows = Iterator[Finding]


@dataclass(frozen=True)
class Check:
    """`look` yields what is wrong; `fine` is what the one row says if nothing is."""

    name: str
    look: Callable[[Subject], Rows]
    fine: Callable[[Subject], str]


def _run(check: Check, subject: Subject) -> list[Finding]:
    try:
        findings = list(check.look(subject))
    except InputError as error:
        return [Finding.of(error, check.name)]
    if any(finding.severity != OK for finding in findings):
        return findings
    return [*findings, Finding(OK, check.name, subject.adapter.name, check.fine(subject))]


def _fit(subject: Subject) -> Rows:
    """All that `verify` would raise, and what was read otherwise than it is stored."""
    for note in subject.plan.adjustments:
        yield Finding(OK, "fit", note.place, note.text, "", f"{note.kind}: done while building")
    for misfit in misfits(subject.plan):
        yield Finding.of(misfit.error, "fit")


def _values(subject: Subject) -> Rows:
    for error in not_finite(subject.adapter):
        yield Finding.of(error, "values")


def _zeros(subject: Subject) -> Rows:
    """An adapter of which every product is zero, as PEFT initialises it."""
    terms = [term for delta in subject.adapter.deltas for term in delta.terms]
    if subject.adapter.replacements or not terms:
        return
    if all(_is_zero(term) for term in terms):
        yield Finding(
            WARNING, "zeros", subject.adapter.name, "every lora_B (or lora_A) is zero",
            "an adapter that changes something", "the adapter does nothing; was it ever trained?",
        )  # fmt: skip


def _is_zero(term: Term) -> bool:
    tensors = term.vanishes_with  # none for what can change a weight also with zero factors
    return bool(tensors) and (term.scaling == 0 or any(map(_all_zero, tensors)))


def _all_zero(tensor: Tensor) -> bool:
    return not any(np.any(values != 0) for values in blocks(tensor))


def _sizes(subject: Subject) -> Rows:
    """Sites whose delta is unusually large or small beside the weight."""
    ratios = subject.ratios
    if not any(ratios.values()):
        return  # `zeros` says so
    for path, ratio in ratios.items():
        if not SMALLEST <= ratio <= LARGEST:  # also for NaN, which `values` names
            what = "is lost in rounding" if ratio < SMALLEST else "drowns the weight"
            yield Finding(
                WARNING, "size", path, f"|delta| / |weight| = {ratio:.2g}",
                f"{SMALLEST:g} to {LARGEST:g}", f"the delta {what}; check alpha and the training",
            )  # fmt: skip


def _sizes_fine(subject: Subject) -> str:
    ratios = subject.ratios.values()
    others = sum(d.parameter == "weight" for d in subject.read.deltas) - len(ratios)
    if not ratios:
        return "no low-rank site to measure"
    left = f"; {others} sites of other kinds not measured" if others else ""
    return f"{len(ratios)} sites, |delta| / |weight| {min(ratios):.2g} to {max(ratios):.2g}{left}"


def _targets(subject: Subject) -> Rows:
    """Config and file must mean the same modules, or PEFT trains or drops some in silence."""
    config = subject.adapter.config
    target_modules, sites = (
        config.get("target_modules"),
        {d.site.path for d in subject.adapter.deltas},
    )
    if isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
        return
    names = target_modules if isinstance(target_modules, list) else []
    unused = [n for n in names if not _ends(n, sites) and not _excluded(subject, n)]
    if unused:
        yield Finding(
            WARNING, "targets", CONFIG, f"target_modules names {', '.join(unused[:5])}",
            "tensors for each", "the file has none for them; PEFT would leave them untrained",
        )  # fmt: skip
    yield from _untrained(subject, unused)
    others = [str(name) for name in config.get("target_parameters") or ()]
    for path in sorted(sites):
        meant = is_targeted(config, path) or is_targeted(
            config, subject.adapter.written.get(path, path)
        )
        if target_modules and not meant and not path.endswith(tuple(others) or ("\0",)):
            yield Finding(
                ERROR, "targets", path, "tensors for a module that the config does not target",
                "target_modules to name it", "PEFT would drop them in silence; correct the config",
            )  # fmt: skip


def _excluded(subject: Subject, name: str) -> bool:
    """Whether the base has modules of that name and the config itself takes them all out."""
    matching = [path for path in modules(subject.base) if _ends(name, (path,))]
    return bool(matching) and not any(is_targeted(subject.adapter.config, p) for p in matching)


def _ends(name: str, paths: Iterable[str]) -> bool:
    """PEFT's rule for a name in a list: any of the paths is it, or ends with it."""
    return any(path == name or path.endswith(f".{name}") for path in paths)


def _untrained(subject: Subject, unused: list[str]) -> Rows:
    """Modules that the config targets and the file has no tensors for, one row a kind."""
    adapter, base = subject.read, subject.base
    have = {delta.site for delta in adapter.deltas} | {r.site for r in adapter.replacements}
    missing = [
        site
        for site in map(base.architecture.site_of, modules(base))
        if site not in have
        and not site.path.endswith(tuple(unused) or ("\0",))
        and is_targeted(adapter.config, site.path)
    ]
    for kind, count in Counter(site.module for site in missing).items():
        first = next(site.path for site in missing if site.module == kind)
        yield Finding(
            WARNING, "targets", first, f"no tensors, like {count - 1} more of its kind",
            "tensors, since the config targets it", "PEFT would leave them untrained",
        )  # fmt: skip


def _dtypes(subject: Subject) -> Rows:
    dtypes = Counter(tensor.dtype for _, tensor in shipped_tensors(subject.adapter))
    if len(dtypes) > 1:
        shown = ", ".join(f"{count} {dtype}" for dtype, count in sorted(dtypes.items()))
        yield Finding(
            WARNING, "dtypes", subject.adapter.name, f"tensors in {shown}", "one dtype",
            "was it put together from two files?",
        )  # fmt: skip
    if "F64" in dtypes:
        yield Finding(
            WARNING, "dtypes", subject.adapter.name, f"{dtypes['F64']} tensors in F64",
            "F32, F16 or BF16", "PEFT rounds them to F32 on loading, and a build does not",
        )  # fmt: skip


def _origin(subject: Subject) -> Rows:
    """The base that the adapter says it was trained on, by name and revision."""
    config, names = subject.adapter.config, _names(subject.base)
    trained = config.get("base_model_name_or_path")
    if trained and not any(_same_model(_last(str(trained)), name) for name in names):
        yield Finding(
            WARNING, "origin", CONFIG, f"base_model_name_or_path {trained!r}",
            " or ".join(sorted(names)), "is this the base that it was trained on?",
        )  # fmt: skip
    revision, here = config.get("revision"), _revision(subject.base)
    if revision and here and revision != here:
        yield Finding(
            WARNING, "origin", CONFIG, f"revision {revision!r}", f"{here!r}, the base's",
            "is this the base that it was trained on?",
        )  # fmt: skip


def _origin_fine(subject: Subject) -> str:
    trained = subject.adapter.config.get("base_model_name_or_path")
    return f"trained on {_last(str(trained))}" if trained else "no base recorded"


def _last(path: str) -> str:
    return PureWindowsPath(path.rstrip("/\\")).name  # splits at both kinds of slash


def _names(base: Base) -> set[str]:
    """What the base may be called: by its spec, its folder, its config, the hub's cache."""
    spec = base.spec.partition("@")[0] if base.spec.startswith("hf:") else base.spec
    names = {_last(spec.removeprefix("hf:")), base.folder.resolve().name}
    if recorded := base.config.get("_name_or_path"):
        names.add(_last(str(recorded)))
    if base.folder.parent.name == "snapshots":
        names.add(base.folder.parent.parent.name.rpartition("--")[2])
    return names - {"", "."}


def _same_model(trained: str, name: str) -> bool:
    """Equal but for case, or a GGUF file of it: `SmolLM2.Q4_1.gguf` is of SmolLM2."""
    trained, name = trained.lower(), name.lower()
    return name == trained or (
        PurePosixPath(name).suffix == ".gguf" and name.startswith((f"{trained}.", f"{trained}-"))
    )


def _revision(base: Base) -> str | None:
    """The base's revision by its spec, or the commit of the hub's cache that it lies in."""
    if base.spec.startswith("hf:") and "@" in base.spec:
        return base.spec.partition("@")[2]
    return base.folder.name if base.folder.parent.name == "snapshots" else None


def _tokenizer(subject: Subject) -> Rows:
    """Tokens that were added, and the tokenizer that knows them; not of an adapter that misfits."""
    if next(misfits(subject.plan), None) is not None:
        return
    if text := missing_tokenizer(subject.plan):
        yield Finding(
            WARNING, "tokenizer", subject.adapter.name, text, "the tokenizer with the added tokens",
            "the artifact gets the base's, which does not know them; save the tokenizer into the "
            "adapter's folder",
        )  # fmt: skip
    choose_tokenizer(subject.plan, AUTO)  # raises what a build would


def _tokenizer_fine(subject: Subject) -> str:
    if next(misfits(subject.plan), None) is not None:
        return "not looked at, because the adapter does not fit"
    return choose_tokenizer(subject.plan, AUTO).note or "that of the base"


def _count(subject: Subject) -> str:
    sites = len({delta.site for delta in subject.read.deltas})
    return f"{sites} sites and {len(subject.read.replacements)} whole tensors fit"


CHECKS = (
    Check("fit", _fit, _count),
    Check("values", _values, lambda s: f"{s.adapter.parameters} finite numbers"),
    Check("zeros", _zeros, lambda s: "not all zero"),
    Check("size", _sizes, _sizes_fine),
    Check("targets", _targets, lambda s: "config and tensors name the same modules"),
    Check("tokenizer", _tokenizer, _tokenizer_fine),
    Check("dtypes", _dtypes, lambda s: " ".join({t.dtype for _, t in shipped_tensors(s.adapter)})),
    Check("origin", _origin, _origin_fine),
)
