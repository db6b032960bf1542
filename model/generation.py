"""From ids to ids: prompts of unequal length in one batch, greedy or sampled, one id of every row at a time."""

import contextlib
import math
import threading
from collections.abc import Callable

import torch

from ..kernels.attention import _precision
from ..kernels.decode import counters
from ..kernels.dispatch import dependence, next_power_of_2, observe, uses_triton
from ..kernels.frequencies import same_frequencies
from ..kernels.sampling import advance, choose_, is_greedy, sample, settle_, start
from .limits import brief, check, check_sampling
from .llama import KVCache, Llama

STEPS = 4  # kinds of steps that are kept with a cache


def generate(
    model: Llama, input_ids: torch.Tensor | list[list[int]], *, max_new_tokens: int, temperature: float = 0.0,
    top_k: int | None = None, top_p: float | None = None, min_p: float | None = None, repetition_penalty: float | None = None,
    seed: int | None = None, eos: int | list[int] | None = None, use_cache: bool = True, cache: KVCache | None = None,
    stream: Callable[[torch.Tensor], list[bool] | None] | None = None,
) -> torch.Tensor:  # fmt: skip
    """The ids that follow each prompt: int64 [B, n] on the model's device, n <= max_new_tokens.

    input_ids: integers [B, S], or a list of B lists of unequal length. A row ends with its first id out of `eos`: None is the
    config's own, [] never ends, else an id or several. The rest of the row repeats that id; n is the length of the longest row.
    stream(ids): called once a step with the new ids [B] on the device, rows that have ended included; it may return a list of B
    bools, those of rows which end here (a stop string was met: see `Tokenizer.stream`).
    use_cache=False computes the whole sequence anew at each step. cache: a KVCache of B rows that holds the first `cache.filled`
    ids of each row already, fewer than the row has; what follows is added to it.

    temperature 0 (below 1e-5) takes the most probable id. The others, in this order and as in transformers: logits of ids that
    the row has already are divided by repetition_penalty, or multiplied if negative (at temperature 0 too); all are divided by
    temperature; the top_k largest stay; of these the fewest whose probabilities reach top_p; of these the ones at least min_p
    times as probable as the first. seed: row b draws by the seed and b alone, so it has the same ids whatever its neighbours are;
    None takes a seed from torch's generator.

    With longrope or dynamic scaling the longest row decides on the frequencies of all. Raises a ValueError that names the
    argument for anything out of range, and for more tokens than the model has positions.

    On a GPU a step is captured as a CUDA graph, which takes some milliseconds, and kept for later calls with as many rows and the
    same options (seed, prompts and the ids of `eos` may differ): with a caller's cache, or, with a cache of its own that the call
    has made, in `model.kept`. That is one cache, the last one, with room for at least as many tokens as any call since; it goes
    when a call needs another, when the model is moved, or by `model.kept.clear()`. Who alternates between numbers of rows passes a
    cache for each. A capture that fails is a RuntimeError, as torch is not as it was before: no step is run without one instead.
    """
    config, device = model.config, model.lm_head.weight.device
    rows = _rows(input_ids, config.vocab_size)
    longest = max(map(len, rows))
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty}
    check_sampling(max_new_tokens=max_new_tokens, seed=seed, **options)
    if longest + max_new_tokens > config.context_length:
        raise ValueError(
            f"input_ids and max_new_tokens come to {longest} + {max_new_tokens} tokens, "
            f"but the model has {config.context_length} positions"
        )
    _check_cache(cache, use_cache, rows, longest + max_new_tokens)
    ends = torch.tensor(_ends(eos, config), dtype=torch.int64)
    seed = torch.randint(2**63 - 1, ()).item() if seed is None else seed
    own = cache is None and use_cache  # what a caller's cache holds of a row that has ended is the caller's

    with torch.inference_mode(), on(device):
        # Padded on the right, where causal attention never looks, with the row's own first id, which adds nothing to its set.
        prompt = torch.tensor([row + row[:1] * (longest - len(row)) for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        with own_cache(model, len(rows), longest + max_new_tokens) if own else contextlib.nullcontext(cache) as cache:
            if cache is not None:
                cache.streams.pop("compiled", None)  # a turn of a dialogue may be the first with the compiled step
            step = Step(model, cache, prompt, start(seed, len(rows), device), ends, options, own)
            new = _ids(Prefill(model, prompt, lengths, cache), step, longest, max_new_tokens, len(ends) > 0, stream)
        return torch.stack(new, 1) if new else prompt[:, :0]


def _ids(first, step, longest, limit, may_end, stream):
    """The new ids [B], one tensor a step. longest: tokens of the longest prompt. may_end: whether there are ids that end a row."""
    new, finished, rope = [], None, step.model.config.rope_parameters
    with counters(step.ids.device) if step.ids.is_cuda else contextlib.nullcontext():
        while len(new) < limit:
            if finished is not None and not finished.late and finished.read():
                break
            width = longest + len(new)
            # Where longrope goes over to its long factors, all keys change: the cache begins anew, as in transformers.
            if step.cache is None or not new or same_frequencies(rope, width) == (width, math.inf):
                step.choose(first(new))
            else:
                step(width)
            if finished is not None and finished.late and finished.read():
                break
            new.append(step.ids.clone())
            stops = None if stream is None else stream(new[-1])
            if isinstance(stops, list) and any(stops):
                step.end(stops)
                may_end = True
            if may_end:
                finished = _Flag(step.finished)
    return new


def on(device):
    """The device as the current one within the block: streams, events and graphs are of the current GPU, not of their tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def own_cache(model, rows, length):
    """An empty cache for so many rows and tokens. Where steps are captured it has room for more, or is what the last call has left
    on this stream, and is left to the next one: nobody else has it meanwhile, be it a call out of `stream` or another thread."""
    weight = model.model.embed_tokens.weight
    if not capturable(model):
        yield KVCache(model.config, rows, length, weight.dtype, weight.device)
        return
    now = _stream(weight)
    stream, cache = model.kept.pop("cache", (None, None))
    fits = cache is not None and (stream, cache.batch, cache.k[0].dtype, cache.k[0].device) == (
        now, rows, weight.dtype, weight.device
    )  # fmt: skip
    if not fits or cache.max_length < length:
        cache = None  # first: its memory may be needed
        unit = max(256, next_power_of_2(length) // 16)
        room = min(-(-length // unit) * unit, max(length, model.config.context_length))
        cache = KVCache(model.config, rows, room, weight.dtype, weight.device)
    cache.reset()
    try:
        yield cache
    finally:
        model.kept["cache"] = now, cache


class Prefill:
    """The logits [B, rows of lm_head] after the prompts and the new ids so far, of all of them anew; with a cache or without."""

    def __init__(self, model, prompt, lengths, cache):
        self.model, self.prompt, self.lengths, self.cache = model, prompt, lengths, cache
        self.rows = torch.arange(len(prompt), device=prompt.device)

    def __call__(self, new):
        """new: the ids so far, [B] each."""
        ids, lengths, begin = self.prompt, self.lengths + len(new), 0
        if new:  # each row's go to where its prompt ends; behind them padding is left
            new = torch.stack(new, 1)
            places = self.lengths[:, None] + torch.arange(new.shape[1], device=ids.device)
            ids = torch.cat((ids, new), 1).scatter_(1, places, new)
        elif self.cache is not None and self.cache.filled:
            frequencies = self.model.config.rope_parameters
            before, now = (same_frequencies(frequencies, n)[0] for n in (self.cache.filled, ids.shape[1]))
            begin = self.cache.filled if before == now else 0
        if self.cache is not None and not begin:
            self.cache.reset()
        hidden = self.model.hidden_states(ids[:, begin:], self.cache)[self.rows, lengths - 1 - begin]
        if self.cache is not None:
            self.cache.lengths.copy_(lengths)  # what the padding wrote lies behind the ends and is overwritten
        return self.model.lm_head(hidden)


class Step:
    """One id of every row as one unit: embedding, layers, head, sampling and what has ended, on tensors that stay where they are
    and are read by no host. Where it is `capturable` the second step is captured as a CUDA graph, which the later ones replay: the
    first has compiled what it launches. Elsewhere every step runs as it is.

    ids: int64 [B], the last of each row. ended: bool [B]; such a row repeats its id. finished: bool [], whether all have ended.
    """

    def __init__(self, model, cache, prompt, state, ends, options, own):
        self.model, self.cache, self.options = model, cache, options
        self.lengths = cache.lengths if own else None  # which become 0 where a row has ended
        self.graphs = cache is not None and capturable(model)
        penalised = options["repetition_penalty"] is not None
        kind = len(prompt), next_power_of_2(len(ends)), model.config.vocab_size if penalised else None
        slots = None
        if self.graphs:
            # Aliases: the memory that a graph reads stays in place during this call, whatever `stream` does to the model.
            self.reads = [t.detach() for t in (*model.tensors(), *cache.k, *cache.v, cache.lengths)]
            reads = ((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in self.reads)
            key = (*kind, own, *options.values(), *constants(model), *reads)
            slots = cache.steps.pop(key, None)
        slots = slots or Slots(*kind, prompt.device)
        if self.graphs:
            cache.steps[key] = slots  # behind the others, of which the first goes
            while len(cache.steps) > STEPS:
                cache.steps.pop(next(iter(cache.steps)))
        slots.begin(prompt, state, ends)
        self.ids, self.ended, self.finished, self.captured = slots.ids, slots.ended, slots.finished, slots.captured
        self.follows = {"ends": slots.ends, "seen": slots.seen, "lengths": self.lengths}
        self.state, self.span = slots.state, None

    def __call__(self, width):
        """width: of the longest row with this id's predecessor; decides on the rotary tables."""
        span = same_frequencies(self.model.config.rope_parameters, width)
        if not self.graphs or span[0] == span[1]:  # dynamic scaling has frequencies of its own for every width
            self.work()
        elif span in self.captured:
            self.cache.reserve(1)
            self.captured[span].replay()
        elif self.span != span:
            self.span = span
            self.work()
        else:
            self.captured[span] = Captured(self)
            self.captured[span].replay()

    def work(self):
        self.choose(self.model.step(self.ids, self.cache))

    def choose(self, logits):
        """The ids that follow, from the logits [B, rows of lm_head] of this rank."""
        ranks, vocabulary, seen = self.model.ranks, self.model.config.vocab_size, self.follows["seen"]
        if ranks.size == 1:
            choose_(logits, self.ids, self.ended, self.finished, state=self.state, **self.follows, **self.options)
            return
        if is_greedy(self.options["temperature"]) and seen is None:
            new = ranks.argmax(logits.float(), vocabulary)
        else:
            new = ranks.same(sample(ranks.gather(logits.float(), vocabulary), self.state, seen=seen, **self.options))
            self.state.copy_(advance(self.state))
        settle_(new, self.ids, self.ended, self.finished, **self.follows)

    def end(self, rows):
        """The rows (bools) end here. They cost nothing from now on: their caches are as if empty."""
        self.ended |= torch.as_tensor(rows, device=self.ended.device)
        settle_(self.ids, self.ids, self.ended, self.finished, **self.follows)


class Slots:
    """What steps of one kind work on beside weights and cache, and the graphs captured of them, by the widths of one rotary table.

    They are kept with the cache, under all that is constant in a graph; what differs from call to call is written by `begin`.
    ends: int64, filled up with -1, which is no id.
    """

    def __init__(self, rows, ends, vocabulary, device):
        self.ids, self.state = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.finished = torch.zeros((), dtype=torch.bool, device=device)
        self.ends = torch.zeros(ends, dtype=torch.int64, device=device)
        self.seen = None if vocabulary is None else torch.zeros(rows, vocabulary, dtype=torch.bool, device=device)
        self.captured = {}

    def begin(self, prompt, state, ends):
        self.ended.zero_()
        self.finished.zero_()
        self.state.copy_(state)
        self.ends.fill_(-1)[: len(ends)].copy_(ends)
        if self.seen is not None:
            self.seen.zero_().scatter_(1, prompt, True)


class Captured:
    """A step as a CUDA graph, with what it reads and nobody else may keep: the counters of its launches and the rotary tables."""

    def __init__(self, step):
        with counters(step.ids.device) as self.counters:
            self.replay = capture(step.work)
        self.tables = step.model.rope(step.cache.filled, step.cache.max_length, step.ids.device)


def capturable(model):
    """Whether a CUDA graph can hold a step of the model. It can where kernels compute it: the reference reads lengths on the host,
    and ranks talk to each other."""
    weight = model.model.embed_tokens.weight
    return weight.is_cuda and model.ranks.size == 1 and uses_triton(weight)


def constants(model):
    """What a graph has in it beside addresses and options: how kernels are launched, and on which stream."""
    weight = model.model.embed_tokens.weight
    return _stream(weight), _precision(weight), dependence(weight)["PDL"]


def _stream(x):
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None


def capture(work):
    """A function that repeats what `work` launches on the current GPU, and nothing that it does on the host.

    RuntimeError where that cannot be captured. Nothing is run in its place: torch's generator of random numbers on this GPU may
    then be as if within a capture for good.
    """
    graph, pool, cause = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), None
    # On a stream of this GPU: torch's own for captures is of the one that first had need of it. Torch leaves it the current one
    # where a capture fails, hence `current`. Other threads may go on meanwhile, but not begin one: that waits for all streams.
    stream, current = torch.cuda.Stream(), torch.cuda.stream(torch.cuda.current_stream())
    try:
        with _one_at_a_time, current, torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                work()
            except BaseException as error:  # the end of the capture fails too, and says less
                cause = error
                raise
    except BaseException as error:
        with contextlib.suppress(Exception):  # torch before 2.12 goes on allocating as if within a capture that has failed
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        cause = cause or error
        if not isinstance(cause, Exception):
            raise cause from None
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise RuntimeError(f"the decode step cannot be captured as a CUDA graph: {reason}") from cause
    return graph.replay


_one_at_a_time = threading.Lock()


def warmup(model: Llama, *, batch: int = 1, prompt: int = 16, max_length: int | None = None) -> dict[str, int]:
    """Compiles what a later `generate` with `batch` rows and a cache of max_length (default: the model's positions, at most 2048)
    launches, by running one with `prompt` tokens, and keeps the captured step if it is greedy; on a CPU the step (`Llama.prepare`).
    Returns {kernel: how many variants were compiled}."""
    before = {}

    def variants(kernel):
        return sum(len(caches[0]) for caches in getattr(kernel, "device_caches", {}).values())

    def note(kernel, *_):
        before.setdefault(kernel, variants(kernel))

    length = min(model.config.context_length, max_length or 2048)
    if capturable(model):
        with torch.inference_mode(), own_cache(model, batch, length):
            pass  # leaves it for the next call
    model.prepare(wait=True)
    with observe(note):
        generate(model, [[0] * prompt] * batch, max_new_tokens=min(4, length - prompt), eos=[])
    return {kernel.__name__.strip("_"): variants(kernel) - count for kernel, count in before.items()}


# --- ends, arguments -------------------------------------------------------------------------------------------------------


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
        raise ValueError(f"input_ids is {brief(input_ids)}, expected a list of lists of token ids, one for each prompt")
    for b, row in enumerate(rows):
        if not row:
            raise ValueError(f"input_ids[{b}] is empty, expected at least one token id")
        for i, token in enumerate(row):
            if type(token) is not int or not 0 <= token < vocabulary:
                raise ValueError(f"input_ids[{b}][{i}] is {brief(token)}, expected a token id from 0 to {vocabulary - 1}")
    return [list(row) for row in rows]


def _check_cache(cache, use_cache, rows, length):
    if cache is None:
        return
    if not use_cache:
        raise ValueError("cache is given, expected None with use_cache=False")
    if cache.batch != len(rows) or cache.max_length < length:
        raise ValueError(f"cache has {cache.batch} rows of {cache.max_length}, expected {len(rows)} of at least {length}")
    if cache.filled >= min(map(len, rows)):
        raise ValueError(f"cache holds {cache.filled} tokens, expected fewer than the shortest row, {min(map(len, rows))}")


def _ends(eos, config):
    if eos is None:
        return config.eos_token_id
    ends = eos.tolist() if hasattr(eos, "tolist") else eos
    ends = [ends] if isinstance(ends, int) else ends
    fits = isinstance(ends, (list, tuple, set, frozenset)) and all(type(i) is int and 0 <= i < config.vocab_size for i in ends)
    check("eos", eos, fits, f"a token id from 0 to {config.vocab_size - 1}, a list of them, or None for the model's own")
    return list(ends)
