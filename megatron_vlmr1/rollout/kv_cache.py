"""Key/value cache of groups: each prompt's keys once, and each completion's own."""

from __future__ import annotations

import torch

from megatron_vlmr1.models.attention import AttentionPlan


class GroupCache:
    """Keys and values of P prompts and their G completions each, for every layer of this stage.

    Used in turn as the `Attend` of the prefill (`prefill`), then of decoding. H query heads, Hkv key/value heads.
    """

    def __init__(self, prompt_lengths: list[int], generations: int, max_new_tokens: int) -> None:
        self.generations = generations
        self.length = 0  # tokens of each completion that are in the cache
        self._max_new = max_new_tokens
        self._lengths = torch.tensor(prompt_lengths)
        self._plan: AttentionPlan | None = None
        self._prompt_k: dict[int, torch.Tensor] = {}  # layer -> [P, Hkv, Lp, D]
        self._prompt_v: dict[int, torch.Tensor] = {}
        self._own_k: dict[int, torch.Tensor] = {}  # layer -> [P * G, Hkv, max_new, D]
        self._own_v: dict[int, torch.Tensor] = {}
        self._hidden: torch.Tensor | None = None  # [P, 1, Lp], True beyond a prompt's end

    def prefill(self, plan: AttentionPlan) -> GroupCache:
        """Expect the packed prompts next, laid one after another."""
        self._plan = plan
        return self

    def decode(self) -> GroupCache:
        """Expect one token of every completion next."""
        self._plan = None
        return self

    def keep(self, groups: torch.Tensor) -> None:
        """Keep only these groups (indices, ascending)."""
        g = self.generations
        rows = (groups[:, None] * g + torch.arange(g, device=groups.device)).reshape(-1)
        self._lengths = self._lengths[groups.to(self._lengths.device)]
        self._hidden = None if self._hidden is None else self._hidden[groups]
        for table, index in (
            (self._prompt_k, groups),
            (self._prompt_v, groups),
            (self._own_k, rows),
            (self._own_v, rows),
        ):
            for layer in table:
                table[layer] = table[layer][index]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `models.attention.Attend`. Rows beyond the sequences are padding and come back as zeros."""
        if self._plan is not None:
            self._prompt_k[layer], self._prompt_v[layer] = self._by_prompt(k), self._by_prompt(v)
            return self._plan.attend(layer, q, k, v)
        n = len(self._lengths) * self.generations
        out = q.new_zeros(q.shape)
        out[:n] = self._decode(layer, q[:n], k[:n], v[:n])
        return out

    def _by_prompt(self, rows: torch.Tensor) -> torch.Tensor:
        lengths = self._lengths.tolist()
        parts = rows[: sum(lengths)].split(lengths)
        padded = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)  # [P, Lp, Hkv, D]
        if self._hidden is None:
            beyond = torch.arange(padded.shape[1])[None, None] >= self._lengths[:, None, None]
            self._hidden = beyond.to(rows.device)
        return padded.transpose(1, 2).contiguous()

    def _decode(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        n, heads, d = q.shape
        kv = k.shape[1]
        if layer not in self._own_k:
            size = (n, kv, self._max_new, d)
            self._own_k[layer], self._own_v[layer] = k.new_empty(size), v.new_empty(size)
        self._own_k[layer][:, :, self.length] = k
        self._own_v[layer][:, :, self.length] = v
        own_k = self._own_k[layer][:, :, : self.length + 1]
        own_v = self._own_v[layer][:, :, : self.length + 1]
        prompts, per = len(self._lengths), heads // kv
        q = (q * d**-0.5).view(n, kv, per, d)
        # All completions of a group ask the same prompt keys: one product a prompt and head group.
        grouped = q.view(prompts, self.generations, kv, per, d).transpose(1, 2).reshape(prompts, kv, -1, d)
        to_prompt = grouped @ self._prompt_k[layer].transpose(2, 3)  # [P, kv, G * per, Lp]
        assert self._hidden is not None
        to_prompt = to_prompt.float().masked_fill(self._hidden[:, None], float("-inf"))
        to_prompt = self._by_row(to_prompt, per)  # [N, kv, per, Lp]
        scores = torch.cat((to_prompt, (q @ own_k.transpose(2, 3)).float()), dim=-1)
        weights = torch.softmax(scores, dim=-1).to(v.dtype)
        at_prompt, at_own = weights.split((to_prompt.shape[-1], own_k.shape[2]), dim=-1)
        shared = at_prompt.view(prompts, self.generations, kv, per, -1).transpose(1, 2).reshape(*grouped.shape[:3], -1)
        mixed = self._by_row(shared @ self._prompt_v[layer], per) + at_own @ own_v
        return mixed.reshape(n, heads, d)

    def _by_row(self, x: torch.Tensor, per: int) -> torch.Tensor:
        """[P, kv, G * per, X] -> [P * G, kv, per, X]."""
        prompts, kv, _, last = x.shape
        return x.view(prompts, kv, self.generations, per, last).transpose(1, 2).reshape(-1, kv, per, last)
