"""Multiple choice: the answer is a letter."""

from __future__ import annotations

from megatron_vlmr1.rewards.text_task import text_task

TASK = text_task("mcq", "mcq")
