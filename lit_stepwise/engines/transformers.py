"""An engine of plain PyTorch: any Hugging Face decoder, on any machine, with the model's own logprobs.

The requests in play are the first rows of one padded key/value cache; a step appends one token to each of them. The
rows behind keep what they computed, for a later prompt that begins alike::

    row 0   p p p p r r .     in play: the next token goes to the first dot
    row 1   p p r r r r .
    row 2   p p p r . . .     finished; of a prompt  p p p r p' p'  only  p' p'  is left to compute
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_stepwise.engines.decoder import load_decoder
from lit_stepwise.engines.kv_cache import KeyValues
from lit_stepwise.engines.rows import Array, chunks, row_dtype, shared_prefix
from lit_stepwise.engines.sampling import Ends, sample
from lit_stepwise.errors import ConfigError, EngineError
from lit_stepwise.interfaces import Engine
from lit_stepwise.types import Completion, Request, VersionSpan

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

    def start(self, model_path: str, max_context_tokens: int, adapter_rank: int = 0) -> None:
        """Load model and tokenizer. Raises ``EngineError`` for a model that does more than full attention."""
        dtype = getattr(torch, self.dtype)
        self._model, tokenizer = load_decoder(model_path, dtype, max_context_tokens, self.device)
        self._ends = Ends(tokenizer, self._model)
        self._cache = KeyValues()
        self._rows = np.zeros(self.max_batch_size, row_dtype(max_context_tokens))  # takes memory only once written
        self._requests: dict[int, Request] = {}
        self._waiting: deque[Request] = deque()
        self._num_running = self._num_admitted = 0

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Copy them in. Raises ``EngineError`` naming a weight that is unknown, misshapen or missing."""
        self._expect_started("load_weights")
        own = self._model.state_dict()  # tied weights are here under each of their names, and share memory
        missing = {parameter.data_ptr(): name for name, parameter in self._model.named_parameters()}
        self._policy_version = -1
        self._rows["cached"] = 0  # what is in play is computed anew by the next step
        for name, weight in weights:
            if name not in own:
                raise EngineError(f"load_weights got {name}, which the engine's model does not have")
            if own[name].shape != weight.shape:
                raise EngineError(f"load_weights got {name} of {tuple(weight.shape)}, not {tuple(own[name].shape)}")
            own[name].copy_(weight.detach())
            missing.pop(own[name].data_ptr(), None)
        if missing:
            raise EngineError(f"load_weights got no {', '.join(sorted(missing.values()))}; send every weight")
        self._policy_version = policy_version

    def begin_phase(self, seed: int) -> None:
        """Forget what is cached; ``seed`` itself is in the seed of every request."""
        self._expect_started("begin_phase")
        if self.num_pending:
            raise EngineError(f"begin_phase was called with {self.num_pending} requests pending; call end_phase first")
        self._rows["cached"] = 0

    def end_phase(self) -> None:
        """Give up what is pending."""
        if self.num_pending:
            self.abort([request.request_id for request in (*self._requests.values(), *self._waiting)])

    def submit(self, request: Request) -> None:
        """Queue it; it joins the batch with the next step."""
        self._expect_started("submit")
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
        rows = self._rows[: self._num_running]
        if (rows["cached"] < rows["length"] - 1).any():
            self._compute(0, range(self._num_running))
        if self._waiting:
            self._admit()
        rows = self._rows[: self._num_running]
        place = np.arange(len(rows)), rows["length"].copy()
        logits = self._forward(slice(0, len(rows)), rows["length"]).logits[:, -1]
        tokens, logprobs = sample(logits.float(), rows["temperature"], rows["top_p"], rows["uniforms"][place])
        rows["tokens"][place], rows["logprobs"][place], rows["versions"][place] = tokens, logprobs, self._policy_version
        rows["length"] += 1
        stopped = self._ends.reached(rows)
        return self._finish(stopped, stopped | (rows["length"] == rows["limit"]))

    @torch.inference_mode()
    def abort(self, request_ids: Sequence[str]) -> None:
        """Give these up. Their rows are free, and keep what they computed."""
        if not self.num_pending:
            return
        given_up = set(request_ids)
        self._waiting = deque(request for request in self._waiting if request.request_id not in given_up)
        orders = [order for order, request in self._requests.items() if request.request_id in given_up]
        for order in orders:
            del self._requests[order]
        self._release(np.flatnonzero(np.isin(self._rows["order"][: self._num_running], orders)))

    @property
    def num_pending(self) -> int:
        """Requests submitted and not finished."""
        return len(self._requests) + len(self._waiting) if self._model is not None else 0

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

    def _expect_started(self, call: str) -> None:
        if self._model is None:
            raise EngineError(f"{call} was called before start")

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
        """Put them in rows of their own behind those in play."""
        taken: list[int] = []
        for request in requests:
            taken.append(self._place(request, taken))
        first = self._num_running
        self._num_running += len(requests)
        self._compute(first, taken)

    def _compute(self, first: int, rows: Iterable[int]) -> None:
        """Bring ``rows`` to ``first`` and on, and compute all but their last token, which the step itself reads."""
        # rows with about as much to compute stand side by side, so that little of a padded batch is padding
        ordered = sorted(rows, key=lambda row: int(self._rows["length"][row] - self._rows["cached"][row]))
        last = first + len(ordered)
        self._move(np.arange(first, last), np.array(ordered, dtype=int))
        for chunk in chunks(self._rows["length"] - 1 - self._rows["cached"], first, last, _PREFILL_TOKENS):
            part = self._rows[chunk]
            while (part["cached"] < part["length"] - 1).any():
                self._forward(chunk, np.minimum(part["cached"] + _PREFILL_TOKENS, part["length"] - 1), prompt=True)

    def _place(self, request: Request, taken: Sequence[int]) -> int:
        """Write the request into a free row, with as much of its prompt computed as any row has computed."""
        rows, size = self._rows, len(request.prompt_ids)
        prompt = np.array(request.prompt_ids)
        shared = shared_prefix(rows, prompt[:-1])
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

    def _forward(self, chunk: slice, stop: Array, prompt: bool = False) -> Any:
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

    def _finish(self, stopped: Array, ended: Array) -> list[Completion]:
        rows, done = self._rows, np.flatnonzero(ended)
        completions = []
        for row in sorted(done, key=lambda row: int(rows["order"][row])):
            response = slice(rows["prompt"][row], rows["length"][row])
            versions = groupby(rows["versions"][row, response].tolist())
            completions.append(
                Completion(
                    request_id=self._requests.pop(int(rows["order"][row])).request_id,
                    response_ids=rows["tokens"][row, response].tolist(),
                    logprobs=rows["logprobs"][row, response].tolist(),
                    finish_reason="stop" if stopped[row] else "length",
                    versions=[VersionSpan(version, len(list(tokens))) for version, tokens in versions],
                    num_cached_tokens=int(rows["reused"][row]),
                )
            )
        self._release(done)
        return completions

    def _release(self, done: Array) -> None:
        """Close the gaps that these rows leave among those in play."""
        left = self._num_running - len(done)
        self._move(done[done < left], np.setdiff1d(np.arange(left, self._num_running), done))
        self._num_running = left

    def _move(self, targets: Array, sources: Array) -> None:
        """Bring the rows at ``sources`` to ``targets``; what stood there goes where there is room now."""
        order = np.arange(len(self._rows))
        order[np.setdiff1d(sources, targets)] = np.setdiff1d(targets, sources)
        order[targets] = sources
        moved = np.flatnonzero(order != np.arange(len(order)))
        if len(moved):
            self._cache.move(order[moved], moved, int(self._rows["cached"][moved].max()))
            self._rows[moved] = self._rows[order[moved]]
