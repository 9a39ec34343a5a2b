"""The loops: grpo and sft."""
