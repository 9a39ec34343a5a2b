"""Defects of a user interface: two screenshots, before and after an action, and the name of what went wrong."""

from __future__ import annotations

from megatron_vlmr1.rewards.text_task import text_task

TASK = text_task("gui", "all_match")
