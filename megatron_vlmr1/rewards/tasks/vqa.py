"""Questions about a picture with a short answer. A row may name its own reward in `accu_reward_method`."""

from __future__ import annotations

from megatron_vlmr1.rewards.text_task import text_task

TASK = text_task("vqa", "default", by_row=True)
