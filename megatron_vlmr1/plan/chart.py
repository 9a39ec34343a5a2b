"""The memory of a plan as a picture: stacked bars, a bar for each phase."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  # after the choice of a backend that needs no screen

from megatron_vlmr1.plan.document import Document, fullest  # noqa: E402
from megatron_vlmr1.plan.tables import layout_text  # noqa: E402
from megatron_vlmr1.telemetry.files import write_atomic  # noqa: E402


def draw(document: Document, path: Path) -> None:
    """Write the fullest rank's memory as a PNG, in the config's own layout and in the recommended one, if there."""
    plans = [("own", document["own"]), ("recommended", document["best"])]
    plans = [(name, plan) for name, plan in plans if plan is not None and "memory" in plan]
    stages = [fullest(plan) for _, plan in plans]
    highest: dict[str, int] = {}
    for held in (held for stage in stages for held in stage["phases"].values()):
        for part, count in held.items():
            highest[part] = max(highest.get(part, 0), count)
    parts = sorted((part for part, count in highest.items() if count), key=lambda part: -highest[part])
    figure, axes = pyplot.subplots(1, len(plans), figsize=(5 * len(plans) + 2, 5), squeeze=False, sharey=True)
    for axis, (name, plan), stage in zip(axes[0], plans, stages, strict=True):
        phases = stage["phases"]
        below = [0.0] * len(phases)
        for i, part in enumerate(parts):
            heights = [held.get(part, 0) / 1e9 for held in phases.values()]
            axis.bar(list(phases), heights, bottom=below, label=part, color=pyplot.get_cmap("tab20")(i % 20))
            below = [a + b for a, b in zip(below, heights, strict=True)]
        axis.axhline(document["memory_bytes"] / 1e9, color="black", linewidth=1)
        axis.axhline(document["usable_bytes"] / 1e9, color="black", linewidth=1, linestyle="--")
        where = layout_text(plan["layout"]).split(", ")[0]
        axis.set_title(f"{name}: {where}, stage {stage['stage']}", fontsize=9)
    axes[0][-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes[0][0].set_ylabel(f"GB of {document['gpu']}")
    figure.suptitle(f"{document['model']} on {document['gpus']} x {document['gpu']}")
    figure.tight_layout()
    picture = BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    pyplot.close(figure)
    write_atomic(path, picture.getvalue())
