"""An engine of plain PyTorch: any Hugging Face decoder, on any machine, with the model's own logprobs.

The requests in play are the first rows of one padded key/value cache; a step appends one token to each of them. The
rows behind keep what they computed, for a later prompt that begins alike::

    row 0   p p p p r r .     in play: the next token goes to the first dot
    row 1   p p r r r r .
    row 2   p p p r . . .     finished; of a prompt  p p p r p' p'  only  p' p'  is left to compute
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lit_stepwise.errors import ConfigError, EngineError
from lit_stepwise.interfaces import Engine
from lit_stepwise.types import Completion, Request

_Array = npt.NDArray[Any]
_PREFILL_TOKENS = 4096
"""Padded tokens of one forward pass over prompts; bounds its memory."""


class TransformersEngine(Engine):
    """Samples from the Hugging Face model itself, many requests at a time; each joins and leaves at any step.

    A response is a function of the weights and of its own request, whatever else is in the batch.
    """

    def __init__(self, dtype: str = "float32", max_batch_size: int = 256, device: str = "auto") -> None:
        """Settings only; ``start`` loads the model.

        Args:
            dtype: Of weights and cache; the name of a torch dtype.
            max_batch_size: Requests decoded together; more wait until a row is free.
            device: ``auto`` takes CUDA where there is one.
        """
        if max_batch_size < 1:
            raise ConfigError(f"engine.max_batch_size={max_batch_size} leaves no room for a request; use 1 or more")
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ConfigError(f"engine.dtype={dtype} is no dtype of torch; use float32 or bfloat16")
        self.dtype = dtype
        self.max_batch_size = max_batch_size
        self.device = device
        self._model: Any = None
        self._policy_version = -1

    def start(self, model_path: str, max_context_tokens: int) -> None:
        """Load model and tokenizer. Raises ``EngineError`` for a model that does more than full attention."""
        from transformers import AttentionInterface

        model, tokenizer = _load(model_path, getattr(torch, self.dtype))
        _check(model.config.get_text_config(), model_path, max_context_tokens)
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        self._model = model.to(device)
        if device == "cpu" and model.config._attn_implementation == "sdpa":
            AttentionInterface.register("lit_stepwise_grouped", _grouped_attention)
            model.set_attn_implementation("lit_stepwise_grouped")
        self._ends = _Ends(tokenizer, model)
        self._cache = _KeyValues()
        self._rows = np.zeros(self.max_batch_size, _row(max_context_tokens))  # takes memory only once it is written
        self._requests: dict[int, Request] = {}
        self._waiting: deque[Request] = deque()
        self._num_running = self._num_admitted = 0

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Copy them in. Raises ``EngineError`` naming a weight that is unknown, misshapen or missing."""
        self._expect_idle("load_weights")
        own = self._model.state_dict()  # tied weights are here under each of their names, and share memory
        missing = {parameter.data_ptr(): name for name, parameter in self._model.named_parameters()}
        self._policy_version = -1
        for name, weight in weights:
            if name not in own:
                raise EngineError(f"load_weights got {name}, which the engine's model does not have")
            if own[name].shape != weight.shape:
                raise EngineError(f"load_weights got {name} of {tuple(weight.shape)}, not {tuple(own[name].shape)}")
            own[name].copy_(weight.detach())
            missing.pop(own[name].data_ptr(), None)
        if missing:
            raise EngineError(f"load_weights got no {', '.join(sorted(missing.values()))}; send every weight")
        self._rows["cached"] = 0
        self._policy_version = policy_version

    def begin_phase(self, seed: int) -> None:
        """Forget what is cached; ``seed`` itself is in the seed of every request."""
        self._expect_idle("begin_phase")
        self._rows["cached"] = 0

    def submit(self, request: Request) -> None:
        """Queue it; it joins the batch with the next step."""
        if self._model is None:
            raise EngineError("submit was called before start")
        size, limit = len(request.prompt_ids), self._rows["tokens"].shape[1]
        if size >= limit:
            raise EngineError(
                f"request {request.request_id} has a prompt of {size} tokens, which leaves no room for a response "
                f"within max_context_tokens={limit}"
            )
        self._waiting.append(request)

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """One token for every request that has a row; what finished, in the order of submission."""
        if not self.num_pending:
            return []
        if self._waiting:
            self._admit()
        rows = self._rows[: self._num_running]
        place = np.arange(len(rows)), rows["length"].copy()
        logits = self._forward(slice(0, len(rows)), rows["length"]).logits[:, -1]
        tokens, logprobs = _sample(logits.float(), rows["temperature"], rows["top_p"], rows["uniforms"][place])
        rows["tokens"][place], rows["logprobs"][place] = tokens, logprobs
        rows["length"] += 1
        stopped = self._ends.reached(rows)
        return self._release(stopped, stopped | (rows["length"] == rows["limit"]))

    @property
    def num_pending(self) -> int:
        """Requests submitted and not finished."""
        return self._num_running + len(self._waiting) if self._model is not None else 0

    @property
    def policy_version(self) -> int:
        """``global_step`` of the weights it samples from."""
        return self._policy_version

    @property
    def description(self) -> str:
        """One line for people."""
        where = f" on {self._model.device}" if self._model is not None else ""
        return f"transformers, {self.dtype}{where}, at most {self.max_batch_size} requests at a time"

    def close(self) -> None:
        """Give the memory back."""
        if self._model is not None:
            self._model = None
            del self._ends, self._cache, self._rows, self._requests, self._waiting

    def _expect_idle(self, call: str) -> None:
        if self._model is None:
            raise EngineError(f"{call} was called before start")
        if self.num_pending:
            raise EngineError(f"{call} was called with {self.num_pending} requests pending; step until none is")

    def _admit(self) -> None:
        """Rows for those who wait. A request that repeats a prompt comes after its first, and finds it computed."""
        firsts: dict[tuple[int, ...], Request] = {}
        repeats = []
        for _ in range(min(len(self._waiting), self.max_batch_size - self._num_running)):
            request = self._waiting.popleft()
            if firsts.setdefault(tuple(request.prompt_ids), request) is not request:
                repeats.append(request)
        for requests in (list(firsts.values()), repeats):
            self._prefill(requests)

    def _prefill(self, requests: Sequence[Request]) -> None:
        """Compute the prompts but for their last token, which the step itself reads."""
        first, last = self._num_running, self._num_running + len(requests)
        taken: list[int] = []
        for request in requests:
            taken.append(self._place(request, taken))
        # rows with about as much to compute stand side by side, so that little of a padded batch is padding
        taken.sort(key=lambda row: int(self._rows["length"][row] - self._rows["cached"][row]))
        self._move(np.arange(first, last), np.array(taken, dtype=int))
        self._num_running = last
        for chunk in _chunks(self._rows["length"] - 1 - self._rows["cached"], first, last):
            rows = self._rows[chunk]
            while (rows["cached"] < rows["length"] - 1).any():
                self._forward(chunk, np.minimum(rows["cached"] + _PREFILL_TOKENS, rows["length"] - 1), prompt=True)

    def _place(self, request: Request, taken: Sequence[int]) -> int:
        """Write the request into a free row, with as much of its prompt computed as any row has computed."""
        rows, size = self._rows, len(request.prompt_ids)
        prompt = np.array(request.prompt_ids)
        shared = _shared_prefix(rows, prompt[:-1])
        # first choice is a row that is shared entirely, as the last turn of the same trajectory is; an empty row shares
        # all of its nothing; else the row that was begun first is given up
        score = np.where(shared == rows["cached"], shared, -1 - rows["order"])
        score[: self._num_running] = score[list(taken)] = np.iinfo(score.dtype).min
        row, source = int(score.argmax()), int(shared.argmax())
        if shared[source] > shared[row]:
            self._cache.copy(source, row, int(shared[source]))
        limit = min(size + request.max_new_tokens, rows["tokens"].shape[1])
        generator = np.random.Generator(np.random.PCG64(request.seed))
        rows["tokens"][row, :size] = prompt
        rows["uniforms"][row, size:limit] = generator.random(limit - size)
        rows["temperature"][row], rows["top_p"][row] = request.sampling.temperature, request.sampling.top_p
        rows["stop"][row] = self._ends.index(tuple(request.sampling.stop))
        rows["prompt"][row] = rows["length"][row] = size
        rows["limit"][row], rows["order"][row] = limit, self._num_admitted
        rows["cached"][row] = rows["reused"][row] = shared[source]
        self._requests[self._num_admitted] = request
        self._num_admitted += 1
        return row

    def _forward(self, chunk: slice, stop: _Array, prompt: bool = False) -> Any:
        """Compute the rows of ``chunk`` from where they are up to ``stop`` [n], padded to the longest such stretch."""
        rows = self._rows[chunk]
        columns = rows["cached"][:, None] + np.arange((stop - rows["cached"]).max())  # [n, q]
        inside = columns < stop[:, None]
        columns = np.minimum(columns, stop.max() - 1)
        visible = np.arange(stop.max()) <= columns[:, None, :, None]  # [n, 1, q, stop.max()]
        device, dtype = self._model.device, self._model.dtype
        self._cache.open(chunk, int(stop.max()), torch.from_numpy(inside).to(device), torch.from_numpy(columns[inside]))
        output = (self._model.base_model if prompt else self._model)(
            input_ids=torch.from_numpy(np.take_along_axis(rows["tokens"], columns, 1)).to(device),
            position_ids=torch.from_numpy(columns).to(device),
            attention_mask=torch.from_numpy(np.where(visible, np.float32(0), -np.float32("inf"))).to(device, dtype),
            past_key_values=self._cache,
            use_cache=True,
        )
        rows["cached"] = stop
        return output

    def _release(self, stopped: _Array, ended: _Array) -> list[Completion]:
        rows, done = self._rows, np.flatnonzero(ended)
        completions = []
        for row in sorted(done, key=lambda row: int(rows["order"][row])):
            response = slice(rows["prompt"][row], rows["length"][row])
            completions.append(
                Completion(
                    request_id=self._requests.pop(int(rows["order"][row])).request_id,
                    response_ids=rows["tokens"][row, response].tolist(),
                    logprobs=rows["logprobs"][row, response].tolist(),
                    finish_reason="stop" if stopped[row] else "length",
                    policy_version=self._policy_version,
                    num_cached_tokens=int(rows["reused"][row]),
                )
            )
        left = self._num_running - len(done)
        self._move(done[done < left], np.setdiff1d(np.arange(left, self._num_running), done))
        self._num_running = left
        return completions

    def _move(self, targets: _Array, sources: _Array) -> None:
        """Bring the rows at ``sources`` to ``targets``; what stood there goes where there is room now."""
        order = np.arange(len(self._rows))
        order[np.setdiff1d(sources, targets)] = np.setdiff1d(targets, sources)
        order[targets] = sources
        moved = np.flatnonzero(order != np.arange(len(order)))
        if len(moved):
            self._cache.move(order[moved], moved, int(self._rows["cached"][moved].max()))
            self._rows[moved] = self._rows[order[moved]]


class _KeyValues:
    """The part of a Hugging Face ``Cache`` that a decoder calls: rows of different lengths, written in place."""

    def __init__(self) -> None:
        self._layers: list[list[Tensor]] = []  # keys and values, each [rows, heads, columns, head_dim]
        self._shape = (0, 0)

    def open(self, rows: slice, width: int, inside: Tensor, columns: Tensor) -> None:
        """Choose where ``update`` writes and what it returns: ``width`` columns of ``rows``.

        ``inside`` [n, q] marks the new tokens that are no padding, ``columns`` [inside.sum()] is where they go.
        """
        self._reserve(rows.stop, width)
        self._view = rows, slice(None), slice(width)
        self._inside = inside
        self._place = inside.nonzero()[:, 0] + rows.start, slice(None), columns.to(inside.device)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by each attention layer with the new keys and values, [n, heads, q, head_dim]."""
        if layer_idx == len(self._layers):
            self._layers.append([_zeros(states, self._shape) for states in (keys, values)])
        layer = self._layers[layer_idx]
        for states, new in zip(layer, (keys, values), strict=True):
            states[self._place] = new.transpose(1, 2)[self._inside]
        return layer[0][self._view], layer[1][self._view]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Asked by decoders that were given no positions; ours always are."""
        return 0

    def copy(self, source: int, target: int, width: int) -> None:
        """Copy the first ``width`` columns of a row."""
        self._reserve(target + 1, width)
        for states in (states for layer in self._layers for states in layer):
            states[target, :, :width] = states[source, :, :width]

    def move(self, sources: _Array, targets: _Array, width: int) -> None:
        """Rearrange rows, as far as ``width`` columns."""
        self._reserve(int(max(sources.max(), targets.max())) + 1, width)
        for states in (states for layer in self._layers for states in layer):
            states[targets, :, :width] = states[sources, :, :width]

    def _reserve(self, rows: int, width: int) -> None:
        old_rows, old_width = self._shape
        if rows <= old_rows and width <= old_width:
            return
        # in larger strides than asked for, so that a growing batch is not copied at every step
        rows = old_rows if rows <= old_rows else max(rows, old_rows * 3 // 2)
        width = old_width if width <= old_width else -(-width // 128) * 128
        self._shape = rows, width
        for index, layer in enumerate(self._layers):
            grown = [_zeros(states, self._shape) for states in layer]
            for states, old in zip(grown, layer, strict=True):
                states[:old_rows, :, :old_width] = old
            self._layers[index] = grown


class _Ends:
    """Says which responses ended with their newest token."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self._tokenizer = tokenizer
        self._eos = np.zeros(model.config.get_text_config().vocab_size, dtype=bool)
        configured = model.generation_config.eos_token_id
        ids = [*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id]
        self._eos[[token for token in ids if token is not None]] = True
        self._stops: list[tuple[str, ...]] = []
        self._suspects = np.zeros((0, len(self._eos)), dtype=bool)
        """[stops, vocabulary] Tokens that can be the last of a stop string: only after them is any text decoded."""

    def index(self, stop: tuple[str, ...]) -> int:
        """A number for these stop strings."""
        if stop not in self._stops:
            texts = self._tokenizer.batch_decode([[token] for token in range(len(self._eos))])
            # a character of several bytes may be split between tokens, and a lone token may lose its white space
            plain = all(string[-1].isascii() and not string[-1].isspace() for string in stop)
            suspects = [not plain or any(string[-1] in text for string in stop) for text in texts]
            self._suspects = np.vstack([self._suspects, suspects])
            self._stops.append(stop)
        return self._stops.index(stop)

    def reached(self, rows: _Array) -> _Array:
        """[n] Whether the newest token is an end-of-turn token or completes a stop string."""
        newest = rows["tokens"][np.arange(len(rows)), rows["length"] - 1]
        ended: _Array = self._eos[newest]
        for row in np.flatnonzero(self._suspects[rows["stop"], newest] & ~ended):
            response = rows["tokens"][row, rows["prompt"][row] : rows["length"][row]]
            text = self._tokenizer.decode(response.tolist())
            ended[row] = any(string in text for string in self._stops[rows["stop"][row]])
        return ended


def _load(model_path: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = Path(model_path).is_dir()  # then nothing may ask the hub, which a machine without a network waits for
    try:
        with torch.random.fork_rng(devices=[]):  # loading may draw numbers
            model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, local_files_only=local)
        tokenizer = AutoTokenizer.from_pretrained(model_path, local_files_only=local)
    except (OSError, ValueError) as error:
        raise EngineError(f"model.model_path={model_path} cannot be loaded: {error}") from error
    return model.eval().requires_grad_(False), tokenizer


def _check(config: Any, model_path: str, max_context_tokens: int) -> None:
    if max_context_tokens > config.max_position_embeddings:
        raise EngineError(
            f"limits.max_context_tokens={max_context_tokens} is more than the {config.max_position_embeddings} that "
            f"{model_path} was built for; lower it"
        )
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or (["sliding_attention"] if window else []))
    if window and window >= max_context_tokens:
        kinds.discard("sliding_attention")
    if kinds - {"full_attention"}:
        raise EngineError(
            f"{model_path} has layers of {', '.join(sorted(kinds))}, and the transformers engine can only do full "
            "attention; use the vLLM engine"
        )


def _grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """As transformers' own ``sdpa``, which with a mask first copies all keys and values for each query of a group."""
    output = scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


def _row(width: int) -> np.dtype[Any]:
    counts = [(name, "i8") for name in ("order", "prompt", "length", "limit", "cached", "reused", "stop")]
    settings = [("temperature", "f4"), ("top_p", "f4")]
    tokens = [("tokens", "i8", (width,)), ("logprobs", "f4", (width,)), ("uniforms", "f8", (width,))]
    return np.dtype([*counts, *settings, *tokens])


def _zeros(like: Tensor, shape: tuple[int, int]) -> Tensor:
    return like.new_zeros(shape[0], like.shape[1], shape[1], like.shape[3])


def _shared_prefix(rows: _Array, prompt: _Array) -> _Array:
    """[rows] Leading tokens of ``prompt`` that each row has computed."""
    differs = np.ones((len(rows), len(prompt) + 1), dtype=bool)
    differs[:, :-1] = rows["tokens"][:, : len(prompt)] != prompt
    shared: _Array = np.minimum(differs.argmax(axis=1), rows["cached"])
    return shared


def _chunks(todo: _Array, first: int, last: int) -> Iterator[slice]:
    """Cut the rows ``first:last``, which are sorted by ``todo``, so that padded none has over ``_PREFILL_TOKENS``."""
    first += int((todo[first:last] == 0).sum())
    while first < last:
        sizes = np.arange(1, last - first + 1) * todo[first:last]
        stop = first + max(1, int(np.searchsorted(sizes, _PREFILL_TOKENS, side="right")))
        yield slice(first, stop)
        first = stop


def _sample(logits: Tensor, temperature: _Array, top_p: _Array, uniforms: _Array) -> tuple[_Array, _Array]:
    """Invert each row's distribution function [n, V] at its uniform number: the tokens, and their logprobs."""
    heat = torch.from_numpy(temperature).to(logits.device)[:, None]
    logprobs = (logits / heat.where(heat > 0, 1)).log_softmax(-1)
    if ((top_p < 1) & (temperature > 0)).any():
        mass = torch.from_numpy(np.where(temperature > 0, top_p, 1)).to(logits.device)[:, None]
        logprobs = _nucleus(logprobs, mass)
    distribution = logprobs.double().exp().cumsum(-1)
    drawn = torch.from_numpy(uniforms).to(logits.device)[:, None] * distribution[:, -1:]
    # the first place that lies above the number has a probability, so a token outside the nucleus is never drawn
    tokens = torch.searchsorted(distribution, drawn, right=True).clamp(max=logits.shape[-1] - 1)
    tokens = tokens.where(heat > 0, logits.argmax(-1, keepdim=True))
    chosen = logprobs.gather(-1, tokens)
    if not chosen.isfinite().all():
        raise EngineError("the model's logits are not finite; its weights have diverged")
    return tokens[:, 0].cpu().numpy(), chosen[:, 0].cpu().numpy()


def _nucleus(logprobs: Tensor, mass: Tensor) -> Tensor:
    """Keep the likeliest tokens until they hold ``mass`` [n, 1], and renormalise."""
    ordered, order = logprobs.sort(descending=True, stable=True)
    probabilities = ordered.exp()
    outside = (probabilities.cumsum(-1) - probabilities >= mass) & (mass < 1)
    return logprobs.masked_fill(outside.scatter(-1, order, outside), -torch.inf).log_softmax(-1)
