"""Questions whose answer is a number or a formula, with or without a picture."""

from __future__ import annotations

from megatron_vlmr1.rewards.text_task import text_task

TASK = text_task("math", "math")
