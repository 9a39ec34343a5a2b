"""What is taken out of a distribution before a token is drawn: pure functions of whole rows of logits."""

from __future__ import annotations

import torch

_NEVER = float("-inf")


def filtered(
    logits: torch.Tensor,
    seen: torch.Tensor | None,
    repetition_penalty: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> torch.Tensor:
    """Return logits [n, v] of the distribution to draw from, each step as transformers' processor of that name.

    Args:
        logits: fp32 [n, v], -inf where banned.
        seen: bool [n, v], tokens of the prompt and the completion so far; None where there is no penalty.
        repetition_penalty: divides positive logits of seen tokens and multiplies negative ones (arXiv 1909.05858).
        temperature: divides all logits.
        top_k: keep so many likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens whose probabilities reach this (arXiv 1904.09751); 1 keeps all.
        min_p: keep tokens of at least this share of the likeliest one's probability (arXiv 2407.01082); 0 keeps all.
    """
    if seen is not None and repetition_penalty != 1.0:
        penalised = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if temperature != 1.0:
        logits = logits / temperature
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], _NEVER)
    if top_p < 1.0:
        logits = _nucleus(logits, top_p)
    if min_p > 0.0:
        p = torch.softmax(logits, dim=-1)
        logits = logits.masked_fill(p < min_p * p.amax(-1, keepdim=True), _NEVER)
    return logits


def _nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Drop the least likely tokens that together have at most 1 - top_p; the likeliest always stays."""
    ascending, order = logits.sort(dim=-1)
    dropped = torch.softmax(ascending, dim=-1).cumsum(-1) <= 1.0 - top_p
    dropped[:, -1].fill_(False)
    return logits.masked_fill(dropped.scatter(1, order, dropped), _NEVER)
