"""What is said between the engine and a vLLM server: who are you, this request, its response."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from lit_stepwise.errors import EngineError
from lit_stepwise.types import Completion, Request, VersionSpan

_NO_LOGPROB = -9999.0  # what a server sends for one that is not finite
_NOT_COMPARED = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


def plain_config(config: Any) -> dict[str, Any]:
    """A Hugging Face configuration in full, as it looks after a journey as JSON."""
    plain: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return plain


def facts_in(answer: Any) -> dict[str, Any]:
    """What ``worker.WorkerExtension`` says of a server. Raises ``EngineError`` for any other answer."""
    try:
        facts: dict[str, Any] = answer["results"][0]
        facts["config"]
    except (KeyError, IndexError, TypeError) as error:
        raise EngineError(f"a server said {str(answer)[:200]!r} when it was asked what it serves") from error
    return facts


def check_facts(url: str, facts: dict[str, Any], config: Any, max_context_tokens: int, seeds: bool) -> None:
    """Raise ``EngineError`` when the server at ``url`` cannot play for this trainer.

    ``config`` is the trainer's Hugging Face configuration.
    """
    ours, theirs = plain_config(config), facts["config"]
    # another version of transformers may know more settings
    differ = [name for name in sorted(ours.keys() & theirs.keys() - _NOT_COMPARED) if ours[name] != theirs[name]]
    if differ:
        shown = ", ".join(f"{name} {theirs[name]!r} there and {ours[name]!r} here" for name in differ[:4])
        raise EngineError(f"{url} serves another model than model.model_path: {shown}")
    if facts["max_context_tokens"] < max_context_tokens:
        raise EngineError(
            f"{url} takes {facts['max_context_tokens']} tokens of prompt and response, but "
            f"rollout.limits.max_context_tokens={max_context_tokens}; lower it, or start the server with "
            f"--max_context_tokens {max_context_tokens}"
        )
    if facts["logprobs_mode"] != "processed_logprobs":
        raise EngineError(
            f"{url} reports {facts['logprobs_mode']}, but only processed_logprobs are those that tokens were drawn by; "
            "leave logprobs_mode out of its server_kwargs"
        )
    if seeds and not facts["takes_seeds"]:
        raise EngineError(
            f"{url} reads prompts in chunks on a CPU, where vLLM fails on requests with a seed; leave "
            "enable_chunked_prefill out of its server_kwargs, or set seed_requests: false"
        )


def check_here(urls: Sequence[str]) -> None:
    """Raise ``EngineError`` for a server that cannot read what lies in the memory of this machine."""
    here = {None, "localhost", "0.0.0.0", "::1", socket.gethostname()}
    for url in urls:
        host = urlsplit(url).hostname
        if host not in here and not str(host).startswith("127."):
            raise EngineError(
                f"{url} is on another machine and takes new weights as files; set rollout.engine.weights_folder to a "
                "folder that both see, or start it with --weights_backend nccl"
            )


def request_body(request: Request, max_new_tokens: int, salt: str, seeded: bool) -> dict[str, Any]:
    """For ``/inference/v1/generate``."""
    sampling: dict[str, Any] = {
        "temperature": request.sampling.temperature,
        "top_p": request.sampling.top_p,
        "stop": list(request.sampling.stop) or None,
        "include_stop_str_in_output": True,
        "detokenize": bool(request.sampling.stop),
        "skip_special_tokens": False,  # a stop string is looked for in the text that the environment reads
        "max_tokens": max_new_tokens,
        "logprobs": 0,  # of the sampled token alone
        "seed": request.seed % 2**63 if seeded else None,
    }
    return {"token_ids": list(request.prompt_ids), "sampling_params": sampling, "cache_salt": salt}


def completion(request: Request, answer: Any, token: str) -> Completion:
    """What a server sampled for ``request``. Raises ``EngineError`` for anything but that.

    ``token`` is what the labels of our weights begin with; empty before any were loaded.
    """
    try:
        choice = answer["choices"][0]
        content = choice["logprobs"]["content"]
        if [each["token_id"] for each in content] != choice["token_ids"]:
            raise EngineError(f"a vLLM server gave logprobs of other tokens than it sampled for {request.request_id}")
        if min((each["logprob"] for each in content), default=0.0) <= _NO_LOGPROB:
            raise EngineError("the logprobs of a vLLM server are not finite; the weights have diverged")
        return Completion(
            request_id=request.request_id,
            response_ids=choice["token_ids"],
            logprobs=[each["logprob"] for each in content],
            finish_reason=choice["finish_reason"],
            versions=[
                VersionSpan(_version(span["version"], token), span["end"] - span["start"])
                for span in choice["weight_versions"]
            ],
            num_cached_tokens=answer["usage"]["prompt_tokens_details"]["cached_tokens"] or 0,
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise EngineError(
            f"a server answered {str(answer)[:200]!r}, which is not what vLLM 0.32 says; start it with "
            "`lit-stepwise serve`"
        ) from error


def _version(label: str, token: str) -> int:
    if not token and label == "default":
        return -1
    if not token or not label.startswith(token):
        raise EngineError(
            f"a vLLM server sampled with the weights {label!r}, which are not those it was given: it was started anew, "
            "or another trainer uses it"
        )
    return int(label.removeprefix(token))
