"""From ids to ids: prompts of unequal length in one batch, greedy or sampled, one id of every row at a time."""

import math

import torch

from ..kernels.frequencies import same_frequencies
from .llama import KVCache


def generate(
    model, input_ids, *, max_new_tokens, temperature=0.0, top_k=None, top_p=None, min_p=None, repetition_penalty=None,
    seed=None, eos=None, use_cache=True, stream=None,
):  # fmt: skip
    """The ids that follow each prompt: int64 [B, n] on the model's device, n <= max_new_tokens.

    input_ids: integers [B, S], or a list of B lists of unequal length. A row ends with its first id out of `eos`: None is the
    config's own, [] never ends, else an id or several. The rest of the row repeats that id; n is the length of the longest row.
    stream(ids): called once a step with the new ids [B] on the device, rows that have ended included.
    use_cache=False computes the whole sequence anew at each step.

    temperature 0 (below 1e-5) takes the most probable id. The others, in this order and as in transformers: logits of ids that
    the row has already are divided by repetition_penalty, or multiplied if negative (at temperature 0 too); all are divided by
    temperature; the top_k largest stay; of these the fewest whose probabilities reach top_p; of these the ones at least min_p
    times as probable as the first. seed: of a generator of its own; None draws from torch's.

    With longrope or dynamic scaling the longest row decides on the frequencies of all. Raises a ValueError that names the
    argument for anything out of range, and for more tokens than the model has positions.
    """
    config, device = model.config, model.lm_head.weight.device
    rows = _rows(input_ids, config.vocab_size)
    longest = max(map(len, rows))
    _check("max_new_tokens", max_new_tokens, type(max_new_tokens) is int and max_new_tokens >= 0, "an integer from 0 on")
    if longest + max_new_tokens > config.context_length:
        raise ValueError(
            f"input_ids and max_new_tokens come to {longest} + {max_new_tokens} tokens, "
            f"but the model has {config.context_length} positions"
        )
    _check("temperature", temperature, _number(temperature) and temperature >= 0, "a number from 0 on")
    _check("top_k", top_k, top_k is None or (type(top_k) is int and top_k >= 1), "an integer from 1 on")
    _check("top_p", top_p, top_p is None or (_number(top_p) and 0 < top_p <= 1), "a number above 0, at most 1")
    _check("min_p", min_p, min_p is None or (_number(min_p) and 0 <= min_p <= 1), "a number from 0 to 1")
    penalty = repetition_penalty
    _check("repetition_penalty", penalty, penalty is None or (_number(penalty) and penalty > 0), "a number above 0")
    _check("seed", seed, seed is None or (type(seed) is int and 0 <= seed < 2**63), "an integer from 0 to 2**63 - 1")
    ends = torch.tensor(_ends(eos, config), dtype=torch.int64, device=device)

    with torch.inference_mode():
        # Padded on the right, where causal attention never looks, with the row's own first id, which adds nothing to its set.
        prompt = torch.tensor([row + row[:1] * (longest - len(row)) for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        greedy = temperature < 1e-5 and penalty is None
        step = _Step(model, prompt, lengths, max_new_tokens if use_cache else None, model.likeliest if greedy else model.head)
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        seen = None
        if penalty is not None:
            seen = torch.zeros(len(rows), config.vocab_size, dtype=torch.bool, device=device).scatter_(1, prompt, True)
        new, ended, finished = [], torch.zeros(len(rows), dtype=torch.bool, device=device), None
        while len(new) < max_new_tokens:
            if finished is not None and not finished.late and finished.read():
                break
            logits = step(new)  # or already ids
            if finished is not None and finished.late and finished.read():
                break
            if seen is not None:
                logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
            ids = logits if greedy else model.ranks.same(sample(logits, temperature, top_k, top_p, min_p, generator))
            if len(ends):
                ids = torch.where(ended, new[-1], ids) if new else ids
                ended |= (ids[:, None] == ends).any(-1)
                finished = _Flag(ended.all())
            if seen is not None:
                seen.scatter_(1, ids[:, None], True)
            new.append(ids)
            if stream is not None:
                stream(ids)
        return torch.stack(new, 1) if new else prompt[:, :0]


class _Step:
    """What `head` makes of the hidden states [B, N] after the prompts and the new ids, with a cache or without (capacity None)."""

    def __init__(self, model, prompt, lengths, capacity, head):
        self.model, self.head, self.prompt, self.lengths, self.cache = model, head, prompt, lengths, None
        self.rows = torch.arange(len(prompt), device=prompt.device)
        if capacity is not None:
            weight = model.model.embed_tokens.weight
            self.cache = KVCache(model.config, len(prompt), prompt.shape[1] + capacity, weight.dtype, weight.device)

    def __call__(self, new):
        """new: the ids so far, [B] each."""
        width = self.prompt.shape[1] + len(new)
        # Where longrope goes over to its long factors, all keys change: the cache begins anew, as in transformers.
        switched = same_frequencies(self.model.config.rope_parameters, width) == (width, math.inf)
        if self.cache is not None and new and not switched:
            return self.head(self.model.hidden_states(new[-1][:, None], self.cache)[:, -1])
        ids, lengths = self.prompt, self.lengths + len(new)
        if new:  # each row's go to where its prompt ends; behind them padding is left
            new = torch.stack(new, 1)
            places = self.lengths[:, None] + torch.arange(new.shape[1], device=ids.device)
            ids = torch.cat((ids, new), 1).scatter_(1, places, new)
        if self.cache is not None:
            self.cache.reset()
        hidden = self.model.hidden_states(ids, self.cache)[self.rows, lengths - 1]
        if self.cache is not None:
            self.cache.lengths.copy_(lengths)  # what the padding wrote lies behind the ends and is overwritten
        return self.head(hidden)


def sample(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, generator=None):
    """One id [B] a row, drawn from float32 logits [B, vocab_size] as `generate` describes; nothing is read by the host."""
    if temperature < 1e-5:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None:
        ascending, order = logits.sort(-1)
        beyond = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        beyond[:, -1] = False
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -math.inf)
    if min_p:
        logits = logits.masked_fill(logits < math.log(min_p), -math.inf)  # the largest is 0
    # Of exponential clocks with rates p each is the first with probability p. (torch.multinomial stops the GPU for a check.)
    clocks = torch.empty_like(logits).exponential_(generator=generator).clamp_(min=torch.finfo(logits.dtype).tiny)
    return (logits.softmax(-1) / clocks).argmax(-1)


class _Flag:
    """A bool on its way from the device to the host. On a GPU it is `late`: read once the next step has been launched, so that
    the GPU works while the host waits."""

    def __init__(self, flag):
        self.late = flag.is_cuda
        self.value = flag.to("cpu", non_blocking=self.late)
        if self.late:
            self.arrived = torch.cuda.Event()
            self.arrived.record(torch.cuda.current_stream(flag.device))

    def read(self):
        if self.late:
            self.arrived.synchronize()
        return bool(self.value)


def _rows(input_ids, vocabulary):
    """The prompts as lists of ids, each id checked."""
    if isinstance(input_ids, torch.Tensor) and (input_ids.is_floating_point() or input_ids.dim() != 2):
        raise ValueError(f"input_ids is {input_ids.dtype} {tuple(input_ids.shape)}, expected integers [batch, tokens]")
    rows = input_ids.tolist() if hasattr(input_ids, "tolist") else input_ids
    if not isinstance(rows, (list, tuple)) or not rows or not all(isinstance(row, (list, tuple)) for row in rows):
        raise ValueError(f"input_ids is {_brief(input_ids)}, expected a list of lists of token ids, one for each prompt")
    for b, row in enumerate(rows):
        if not row:
            raise ValueError(f"input_ids[{b}] is empty, expected at least one token id")
        for i, token in enumerate(row):
            if type(token) is not int or not 0 <= token < vocabulary:
                raise ValueError(f"input_ids[{b}][{i}] is {_brief(token)}, expected a token id from 0 to {vocabulary - 1}")
    return [list(row) for row in rows]


def _ends(eos, config):
    if eos is None:
        return config.eos_token_id
    ends = eos.tolist() if hasattr(eos, "tolist") else eos
    ends = [ends] if isinstance(ends, int) else ends
    fits = isinstance(ends, (list, tuple, set, frozenset)) and all(type(i) is int and 0 <= i < config.vocab_size for i in ends)
    _check("eos", eos, fits, f"a token id from 0 to {config.vocab_size - 1}, a list of them, or None for the model's own")
    return list(ends)


def _number(value):
    return type(value) in (int, float) and abs(value) < math.inf


def _check(name, value, fits, expected):
    if not fits:
        raise ValueError(f"{name} is {_brief(value)}, expected {expected}")


def _brief(value):
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
