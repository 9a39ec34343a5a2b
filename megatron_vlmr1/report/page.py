"""Builds ``report.html``: one page that needs nothing but itself."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megatron_vlmr1.report import curves, facts
from megatron_vlmr1.report.machines import machines
from megatron_vlmr1.report.numbers import short
from megatron_vlmr1.report.pictures import build_grid, split_think
from megatron_vlmr1.report.run import load_run
from megatron_vlmr1.telemetry.files import write_atomic

_MAX_TEXT = 1500  # characters of one completion


def build(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run's directory and return its path.

    The page shows what the run has: metrics alone are enough. It holds no script and loads nothing.

    Raises:
        ValueError: the directory is no run, or one of its files is damaged; one line that names it.
        OSError: the page cannot be written.
    """
    run = load_run(run_dir)
    splits, measures, notes = facts.comparison(run)
    nodes, node_count = machines(run.path)
    page = (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=run.path.resolve().name,
            headline=facts.headline(run),
            splits=splits,
            measures=measures,
            notes=notes,
            charts=curves.main_charts(run.metrics, facts.accuracy_series(run)),
            smoothed=len(run.metrics) >= curves.SMOOTHED_FROM,
            further=curves.further_charts(run.metrics),
            phases=curves.phase_chart(run.metrics),
            seconds=facts.seconds(run),
            nodes=nodes,
            node_count=node_count,
            grid=build_grid(run.path, run.evaluations),
            samples=run.samples,
            setup=facts.setup(run),
            config_text=run.config_text,
        )
    )
    path = run.path / "report.html"
    # Model text may hold lone surrogates, which UTF-8 has no form for.
    write_atomic(path, page.encode("utf-8", errors="replace"))
    return path


def _environment() -> Environment:
    # Completions are hostile text: everything is escaped except the charts, which hold no text of the run.
    environment = Environment(
        loader=PackageLoader("megatron_vlmr1.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(clip=_clip, number=_number, svg=Markup, think=split_think)  # noqa: S704 - see above
    return environment


def _clip(text: object, limit: int = _MAX_TEXT) -> str:
    """The text, or its beginning and how much is left out."""
    whole = str(text)
    return whole if len(whole) <= limit else f"{whole[:limit]} … ({len(whole) - limit:,} more characters)"


def _number(value: float | None) -> str:
    return "–" if value is None else short(value)
