"""A plan's document as tables and bars on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_vlmr1.plan.document import Document, fullest

_STAGES = 8  # more are left out between the first, the fullest and the last
_BAR = 60  # characters of a device's memory
_FILLS = "█▓▒░▚▞▟▙▜▛"
_COLOURS = ("blue", "green", "magenta", "cyan", "yellow", "red", "white")


def show(document: Document, console: Console) -> None:
    """Print the config's own plan, the recommendation and the second best."""
    own, best = document["own"], document["best"]
    console.print(_headline(document))
    if "phases" in own:
        console.print(Text("\nThe config's own layout: " + layout_text(own["layout"]), style="bold"))
        for part in _plan(own, document):
            console.print(part)
    if "refused" in own:
        console.print(Text(f"\nThe config's own layout is refused: {own['refused']}"))
    if best is None:
        console.print(Text(f"\nNo setting divides and fits {document['gpus']} x {document['gpu']}."))
        if near := document["nearest"]:
            console.print(Text(f"The least: {gb(near['peak_bytes'])} a rank with {_words(near)}"))
        if more := document["fits_from"]:
            console.print(Text(f"{more['gpus']} would do, with {_words(more)}"))
    for name, plan in (("Recommended", best), ("Second best", document["second"])):
        if plan is not None:
            console.print(Text(f"\n{name}: {layout_text(plan['layout'])}", style="bold"))
            for part in _summary(plan):
                console.print(part)
    if best is not None:
        for part in _plan(best, document):
            console.print(part)
    if document["refused"]:
        console.print(_refused(document))


def _headline(document: Document) -> Text:
    work = document["workload"]
    grid = work["grid"]
    image = f", one image of {grid[0]} x {grid[1]} patches among them" if grid else ""
    return Text(
        f"{document['model']} on {document['gpus']} x {document['gpu']}: a step of {work['prompts']} prompts of "
        f"{work['prompt_tokens']:.0f} tokens{image}, {work['generations']} completions each of "
        f"{work['completion_tokens']:.0f} tokens (at most {work['longest_completion']})"
    )


def layout_text(layout: Mapping[str, Any]) -> str:
    """Return a layout as one line."""
    virtual = f" (in {layout['virtual']} virtual stages)" if layout["virtual"] > 1 else ""
    recompute = layout["recompute"]
    modules = "+".join(recompute.get("modules") or ())
    again = recompute["granularity"] + (f" {modules}" if modules else "") + (" + tower" if recompute["tower"] else "")
    tensor, pipeline = layout["generation"]
    generation = "" if tensor is pipeline is None else f", generation on copies of {tensor or 1} x {pipeline or 1}"
    return (
        f"tensor {layout['tensor']} x pipeline {layout['pipeline']}{virtual} x data {layout['data']}, micro-batches of "
        f"{layout['micro_batch_tokens']:,} tokens, recompute {again}{generation}"
    )


def _summary(plan: Document) -> Iterator[Text]:
    phase, count = fullest(plan)["worst"]
    yield Text(
        f"  {plan['step_s']:.2f} s a step, {plan['rates']['perf/tokens_per_s_per_gpu']:,.0f} completion tokens/s/GPU; "
        f"fullest rank {gb(count)} in the phase {phase}"
    )
    yield Text(f"  {_words(plan)}")
    for line in plan["why"]:
        yield Text(f"  - {line}")


def _words(plan: Mapping[str, Any]) -> str:
    return " ".join(plan["overrides"]) or "the config as it is"


def _plan(plan: Document, document: Document) -> Iterator[RenderableType]:
    yield _memory(plan["memory"], document["usable_bytes"])
    yield from bars(fullest(plan), document["memory_bytes"], document["usable_bytes"])
    host = ", ".join(f"{part} {gb(count)}" for part, count in plan["host_bytes"].items() if count)
    yield Text(f"host memory of its process: at most {gb(plan['host_peak_bytes'])} at a time ({host})")
    yield _times(plan)
    yield _traffic(plan)
    yield from _closing(plan)


def _memory(stages: Sequence[Mapping[str, Any]], usable: float) -> Table:
    table = Table(title="memory of a rank, GB", title_justify="left")
    phases = list(stages[0]["phases"])
    for name in ("stage", "parameters", *phases, "free at worst"):
        table.add_column(name, justify="right")
    shown = stages
    if len(stages) > _STAGES:
        most = max(stages, key=lambda stage: stage["worst"][1])
        shown = sorted({s["stage"]: s for s in (stages[0], most, stages[-1])}.values(), key=lambda s: s["stage"])
    for stage in shown:
        peaks = [f"{sum(stage['phases'][phase].values()) / 1e9:.1f}" for phase in phases]
        free = (usable - stage["worst"][1]) / 1e9
        table.add_row(str(stage["stage"]), f"{stage['parameters'] / 1e9:.2f} B", *peaks, f"{free:.1f}")
    return table


def bars(stage: Mapping[str, Any], memory: float, usable: float) -> Iterator[Text]:
    """Yield the peak of each phase as a bar of its parts, the whole of a device being as wide as the line."""
    parts = sorted({part for phase in stage["phases"].values() for part in phase})
    totals = {part: max(phase.get(part, 0) for phase in stage["phases"].values()) for part in parts}
    order = sorted(parts, key=lambda part: -totals[part])
    yield Text(f"stage {stage['stage']}, the fullest; | is where a plan stops")
    for phase, held in stage["phases"].items():
        line, used, drawn = Text(f"{phase:>9} "), 0.0, 0
        for i, part in enumerate(order):
            used += held.get(part, 0)
            width = round(used / memory * _BAR) - drawn
            line.append(_FILLS[i % len(_FILLS)] * width, style=_COLOURS[i % len(_COLOURS)])
            drawn += width
        mark = round(usable / memory * _BAR)
        line.append(" " * (mark - drawn) + "|" if drawn <= mark else "!")
        yield line.append(f" {gb(sum(held.values()))}")
    legend = Text(" " * 10)
    for i, part in enumerate(order):
        if totals[part] >= memory / _BAR / 2:
            legend.append(f"{_FILLS[i % len(_FILLS)]} {part}  ", style=_COLOURS[i % len(_COLOURS)])
    yield legend


def _times(plan: Document) -> Table:
    table = Table(title="time of a step", title_justify="left")
    for name, side in (("phase", "left"), ("seconds", "right"), ("share", "right"), ("most of it", "left")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for phase, cost in plan["phases"].items():
        parts = sorted(cost["parts"].items(), key=lambda pair: -pair[1])[:4]
        said = ", ".join(f"{part} {seconds:.2f}" for part, seconds in parts if seconds >= 0.005)
        table.add_row(phase, f"{cost['seconds']:.2f}", f"{cost['seconds'] / plan['step_s']:.0%}", said)
    table.add_row("step", f"{plan['step_s']:.2f}", "", f"{plan['micro_batches']} micro-batches")
    return table


def _traffic(plan: Document) -> Table:
    table = Table(title="sent by a rank in a step, GB", title_justify="left")
    for name in ("phase", "link", "what for", "GB"):
        table.add_column(name, justify="right" if name == "GB" else "left")
    for phase, cost in plan["phases"].items():
        for link, sent in cost["sent_bytes"].items():
            for what, count in sent.items():
                if count >= 5e6:
                    table.add_row(phase, link, what, f"{count / 1e9:.2f}")
    return table


def _closing(plan: Document) -> Iterator[Text]:
    rates, saved, flops = plan["rates"], plan["checkpoint"], plan["flops"]
    yield Text(
        f"{rates['perf/tokens_per_s_per_gpu']:,.0f} completion tokens/s/GPU "
        f"({rates['sequence_tokens_per_s_per_gpu']:,.0f} with the prompt counted for each completion), "
        f"{rates['perf/tflops']:.0f} TFLOP/s/GPU, MFU {rates['perf/mfu_lm']:.1%} language + "
        f"{rates['perf/mfu_vit']:.1%} vision; a step is {flops['language'] / 1e15:.2f} + {flops['vision'] / 1e15:.2f} "
        "PFLOP"
    )
    yield Text(
        f"checkpoint: {gb(saved['weights_bytes'])} of weights and {gb(saved['optimizer_bytes'])} of optimizer state, "
        f"{saved['write_s']:.0f} s to write; training waits {saved['exposed_s']:.1f} s"
    )


def _refused(document: Document) -> Table:
    table = Table(title=f"refused of {document['settings']:,} settings", title_justify="left")
    table.add_column("settings", justify="right")
    table.add_column("first reason")
    for reason, count in sorted(document["refused"].items(), key=lambda pair: -pair[1]):
        table.add_row(f"{count:,}", reason)
    return table


def gb(count: float) -> str:
    """Return bytes as gigabytes, or megabytes where they are few."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
