"""The page of a comparison: report.html (one file that fetches nothing), its two main pictures and results.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cispo.compare.comparison import (
    COLLAPSE,
    MEASURES,
    ArmResult,
    Comparison,
    DroppedToken,
    Summary,
    summarise,
)
from cispo.compare.figures import COLOURS, comparison_pictures
from cispo.compare.results import results
from cispo.compare.scaling import fit_arm
from cispo.compare.statistics import BOOTSTRAP_COVERAGE, Interval, digits_for, number, seeds_text

if TYPE_CHECKING:
    from jinja2 import Environment
    from rich.console import RenderableType

_TOP_TOKENS = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFiles:
    """The files of a report."""

    page: Path
    curves: Path
    diagnostics: Path
    results: Path


def write_report(comparison: Comparison, folder: Path, fit: bool = False) -> ReportFiles:
    """Writes the page into `folder`, which it creates; `fit` adds ScaleRL's curve.

    Raises:
        UserError: no run of an arm logged the metric.
    """
    summary = summarise(comparison)
    folder.mkdir(parents=True, exist_ok=True)
    files = ReportFiles(
        page=folder / "report.html", curves=folder / "comparison.png", diagnostics=folder / "diagnostics.png",
        results=folder / "results.json",
    )  # fmt: skip
    fits = (
        [fit_arm(arm, comparison.metric, max_level=_highest_level(summary)) for arm in comparison.arms] if fit else []
    )
    pictures = comparison_pictures(summary, fits, curves=files.curves, diagnostics=files.diagnostics)
    page = environment().get_template("comparison.html.j2").render(
        summary=summary, comparison=comparison, fits=fits, pictures=pictures, measures=MEASURES, collapse=COLLAPSE,
        tokens={arm.name: dropped_tokens(arm) for arm in comparison.arms}, top=_TOP_TOKENS, coverage=BOOTSTRAP_COVERAGE,
        seeds_text=seeds_text, colours=COLOURS,
    )  # fmt: skip
    files.page.write_text(page, encoding="utf-8")
    files.results.write_text(json.dumps(results(summary), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return files


def environment() -> Environment:
    """The templates of this package, with filters for numbers and tokens; every value is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("cispo.compare"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": number, "amount": amount, "duration": duration, "token": visible, "span": span}
    return made


def summary_lines(comparison: Comparison) -> list[RenderableType]:
    """The terminal's summary: the verdicts, a table with a row an arm, the remarks."""
    from rich.table import Table
    from rich.text import Text

    summary = summarise(comparison)
    table = Table(box=None, pad_edge=False, header_style="bold")
    headings = ("", f"final {comparison.metric}", "best", "average", "tokens to reference", "reached", "collapsed")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for arm in summary.arms:
        cells = []
        for name in MEASURES:
            value = arm.estimates[name]
            interval = f" ({span(value.mean_interval)})" if value and value.mean_interval and name == "final" else ""
            cells.append((number(value.mean) if value else "-") + interval)
        reach = "-" if arm.tokens_to_reference is None else amount(arm.tokens_to_reference)
        of = f" of {len(arm.runs)}"
        # As Text: rich would take brackets in a name for markup.
        table.add_row(*map(Text, (arm.name, *cells, reach, f"{arm.reached}{of}", f"{arm.collapsed}{of}")))
    verdicts = [Text(sentence, style="bold") for sentence in summary.verdicts]
    return [*verdicts, table, *(Text(remark) for remark in summary.remarks)]


def dropped_tokens(arm: ArmResult) -> list[DroppedToken]:
    """The tokens that PPO's clip would have dropped most often, counts summed over the runs."""
    names = ("count", "kept", *(f"{band}_dropped_{side}adv" for band in ("ppo", "dapo") for side in ("pos", "neg")))
    # By id too: different ids may be decoded to the same text.
    totals: dict[tuple[object, str], dict[str, int]] = {}
    for run in arm.runs:
        for row in run.dropped_tokens:
            total = totals.setdefault((row.get("id"), str(row["token"])), dict.fromkeys(names, 0))
            for name in names:
                total[name] += int(row[name])
    ordered = sorted(totals.items(), key=lambda item: -(item[1]["ppo_dropped_posadv"] + item[1]["ppo_dropped_negadv"]))
    return [{"token": token, **total} for (_, token), total in ordered[:_TOP_TOKENS]]


def visible(token: str) -> str:
    """A token with its spaces and control characters made visible."""
    shown = (
        "␣" if c == " " else "\\\\" if c == "\\" else c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in token
    )
    return "".join(shown) or "(empty)"


def amount(value: float) -> str:
    """A count for people: 950, 12.3 k, 1.23 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 999.5 * size else f"{value / size:.0f} {unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 3 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def span(interval: Interval, *beside: Interval) -> str:
    """An interval as text, with as many digits as it and the intervals `beside` it need."""
    digits = digits_for(interval, *beside)
    return f"{number(interval.low, digits)}..{number(interval.high, digits)}"


def _highest_level(summary: Summary) -> float:
    """Upper bound of a fitted ceiling: 1 where all values lie in [0, 1], else far above the highest."""
    values = [v for arm in summary.arms for run in arm.runs for v in run.curve.values]
    low, high = min(values), max(values)
    return 1.0 if low >= 0 and high <= 1 else high + 10 * (high - low) + 1e-6
