"""From an HTTP body to the engine's terms: chat template, tokens, limits, defaults. Bad input ends here.

Knows the tokenizer and the configuration; nothing of Ray handles or decoding.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import ValidationError
from transformers import AutoTokenizer

from deployments.config import RouterArgs, TreeArgs
from deployments.descriptions import TargetDescription
from deployments.errors import RequestError
from deployments.logprobs import TokenTexts
from deployments.schema import ChatRequest, CompletionRequest, TapsOptions, complaint
from taps.decoding.delivery import Delivery, end_tokens
from taps.drafting.drafter import Ask
from taps.session import SessionState
from taps.shaping import LEAST_TEMPERATURE, SamplingParams

_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions
_SEED_MASK = 0xFFFFFFFFFFFFFFFF
_MOST_TOKENS = (1 << 31) - 1  # of any vocabulary
_MOST_DRAFTERS = 64  # of one answer: each has a bit in its nodes' owners


@dataclass(frozen=True)
class Generation:
    """One answer to generate."""

    state: SessionState  # the prompt, and what was asked for
    stop: tuple[str, ...]
    strategy: str
    drafters: tuple[str, ...]  # names, in the order their nodes are marked
    ask: Ask
    explains: bool = False  # its steps, in the answer
    conversation: str = ""  # names those that begin alike; nothing where that is not known


class Drafters(NamedTuple):
    """Names that requests may say."""

    up: Collection[str]
    away: Collection[str] = ()  # they were up and will be again: an answer goes on without


class RequestReader:
    """Turns requests into generations; everything wrong with one is a `RequestError`."""

    def __init__(self, target_path: str, target: TargetDescription, args: RouterArgs) -> None:
        self._args = args
        self._target = target
        self._tokenizer: Any = AutoTokenizer.from_pretrained(target_path)
        self._token_texts = TokenTexts(self._tokenizer)
        self._end_tokens = tuple(sorted(end_tokens(target_path, self._tokenizer)))
        self._longest_token = max(map(len, self._tokenizer.get_vocab()))

    def read_chat(self, request: ChatRequest, drafters: Drafters) -> Generation:
        messages = [message.plain() for message in request.messages]
        if len(messages) > self._target.max_tokens:
            raise self._too_long(f"{len(messages)} messages", "messages")
        shown = (message.get(key, "") for message in messages for key in ("content", "name"))
        self._refuse_far_too_long(sum(map(len, shown)), "messages")
        try:
            templated = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        except Exception as error:  # templates raise errors of their own about roles and their order
            reason = f"the target's chat template refuses these messages: {error}"
            raise RequestError(reason, "messages") from error
        max_tokens = request.max_completion_tokens or request.max_tokens
        begins = _beginning(messages, request.cache_salt)
        return self._generation(request, templated["input_ids"], max_tokens, drafters, begins)

    def read_completion(self, request: CompletionRequest, drafters: Drafters) -> Generation:
        max_tokens = request.max_tokens or _DEFAULT_COMPLETION_TOKENS
        return self._generation(request, self._tokenize(request), max_tokens, drafters)

    @property
    def token_texts(self) -> TokenTexts:
        return self._token_texts

    def delivery(self, job: Generation) -> Delivery:
        """The text of `job`'s answer, as its tokens come."""
        state = job.state
        ends = frozenset(state.end_tokens)
        return Delivery(self._tokenizer, state.max_tokens, ends, job.stop, state.min_tokens)

    def _tokenize(self, request: CompletionRequest) -> list[int]:
        if isinstance(request.prompt, str):
            self._refuse_far_too_long(len(request.prompt), "prompt")
            try:
                ids: list[int] = self._tokenizer(request.prompt)["input_ids"]
            except (TypeError, ValueError) as error:
                raise RequestError(f"the prompt cannot be tokenized: {error}", "prompt") from error
            return ids
        return request.prompt

    def _refuse_far_too_long(self, num_characters: int, where: str) -> None:
        """Text that cannot fit however it is tokenized: that would take long, and every stream would wait."""
        if num_characters > self._target.max_tokens * self._longest_token:
            raise self._too_long(f"{num_characters} characters", where)

    def _too_long(self, size: str, where: str) -> RequestError:
        reason = f"the maximum context length is {self._target.max_tokens} tokens; the prompt has {size}"
        return RequestError(reason, where, code="context_length_exceeded")

    def _generation(
        self,
        request: ChatRequest | CompletionRequest,
        prompt: list[int],
        max_tokens: int | None,
        drafters: Drafters,
        begins: str = "",
    ) -> Generation:
        """Args: begins: names a conversation that no key of the request's own names."""
        where = "messages" if isinstance(request, ChatRequest) else "prompt"
        if not prompt:
            raise RequestError("the prompt is empty", where)
        # Text, too, may hold tokens that were added to the tokenizer alone.
        self._refuse_unknown(prompt, "the prompt", where)
        room = self._target.max_tokens - len(prompt)
        if room < 1 or (max_tokens or 1) > room:
            wanted = f" and {max_tokens} more were requested" if max_tokens else ""
            raise self._too_long(f"{len(prompt)}{wanted}", where)
        tree, params = self._tree(request.options), _sampling(request)
        self._refuse_unknown([token for token, _ in params.logit_bias], "logit_bias", "logit_bias")
        return Generation(
            SessionState(
                tuple(prompt),
                sampling=params,
                max_tokens=max_tokens or room,
                end_tokens=self._ends(request),
                min_tokens=_least(request.min_tokens, max_tokens or room),
                bad_words=self._bad_words(request.bad_words or ()),
                num_logprobs=request.num_logprobs,
                cache_salt=request.cache_salt or "",
            ),
            request.stop_strings,
            tree.strategy,
            self._choose(tree.strategy, request.options.drafters, drafters),
            Ask(tree.num_nodes, tree.depth, tree.top_k, params if tree.coupled else None),
            request.options.explain,
            request.prompt_cache_key or begins,
        )

    def _refuse_unknown(self, tokens: Collection[int], what: str, where: str) -> None:
        last = self._target.vocab_size - 1
        lowest, highest = min(tokens, default=0), max(tokens, default=0)
        if lowest < 0 or highest > last:
            other = lowest if lowest < 0 else highest
            raise RequestError(f"token ids must lie between 0 and {last}; {what} has {other}", where)

    def _ends(self, request: ChatRequest | CompletionRequest) -> tuple[int, ...]:
        """What ends the answer: the target's own end tokens, unless they are ignored, and those asked for."""
        asked = request.stop_token_ids or []
        self._refuse_unknown(asked, "stop_token_ids", "stop_token_ids")
        return tuple(dict.fromkeys((*(() if request.ignore_eos else self._end_tokens), *asked)))

    def _bad_words(self, words: Collection[str]) -> tuple[tuple[int, ...], ...]:
        """The tokens of each word, as they are at the beginning of a text and after a space."""
        texts = [text for word in words for text in (word, f" {word.lstrip()}")]
        runs = (tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
        return tuple(dict.fromkeys(run for run in runs if run))

    def _tree(self, options: TapsOptions) -> TreeArgs:
        chosen = options.model_dump(exclude={"drafters", "explain"}, exclude_none=True)
        try:
            return TreeArgs(**self._args.tree.model_dump() | chosen)
        except ValidationError as error:
            _, reason = complaint(error)
            raise RequestError(f"taps: {reason}", "taps") from error

    def _choose(self, strategy: str, names: list[str] | None, there: Drafters) -> tuple[str, ...]:
        """The drafters to ask: of those named, or else configured, the ones that are up."""
        unknown = [name for name in names or [] if name not in there.up and name not in there.away]
        if unknown:
            up = ", ".join(there.up) or "none"
            raise RequestError(f"no drafter {unknown[0]!r} is up; there are: {up}", "taps.drafters")
        wanted = names if names is not None else [*(self._args.drafters or ()), *there.up]
        chosen = tuple(name for name in dict.fromkeys(wanted) if name in there.up)
        if strategy == "off":
            return ()
        return chosen[:1] if strategy == "single" else chosen[:_MOST_DRAFTERS]


def _beginning(messages: Sequence[Mapping[str, Any]], salt: str | None) -> str:
    """Names a conversation by what all its turns have: its messages until the first answer."""
    answers = (n for n, message in enumerate(messages) if message["role"] == "assistant")
    begins = messages[: next(answers, len(messages))]
    return hashlib.sha256(json.dumps([salt, begins]).encode()).hexdigest()


def _least(min_tokens: int | None, max_tokens: int) -> int:
    least = min_tokens or 0
    if least > max_tokens:
        raise RequestError(f"min_tokens is {least}, more than the {max_tokens} there may be", "min_tokens")
    return least


def _sampling(request: ChatRequest | CompletionRequest) -> SamplingParams:
    temperature = 1.0 if request.temperature is None else request.temperature
    top_p = 1.0 if request.top_p is None else request.top_p
    likeliest = temperature < LEAST_TEMPERATURE or top_p == 0
    return SamplingParams(
        temperature=0.0 if likeliest else temperature,
        top_p=top_p or 1.0,
        top_k=min(max(request.top_k or 0, 0), _MOST_TOKENS),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        min_p=request.min_p or 0.0,
        repetition_penalty=request.repetition_penalty or 1.0,
        logit_bias=tuple(sorted((request.logit_bias or {}).items())),
        seed=secrets.randbits(64) if request.seed is None else request.seed & _SEED_MASK,
    )
