"""From an HTTP body to the engine's terms: chat template, tokens, limits, defaults. Bad input ends here.

Knows the tokenizer and the configuration; nothing of Ray handles or decoding.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, NamedTuple

from pydantic import ValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from deployments.config import RouterArgs, TreeArgs
from deployments.descriptions import TargetDescription
from deployments.errors import RequestError
from deployments.logprobs import TokenTexts
from deployments.schema import ChatRequest, CompletionRequest, TapsOptions, complaint
from deployments.structured import grammar_of
from deployments.tools import Tools, form_of, tools_of, with_ids_for, without_tools
from taps.decoding.delivery import Delivery, end_tokens
from taps.drafting.drafter import Ask
from taps.session import SessionState
from taps.shaping import LEAST_TEMPERATURE, SamplingParams

_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions
_SEED_MASK = 0xFFFFFFFFFFFFFFFF
_MOST_TOKENS = (1 << 31) - 1  # of any vocabulary
_MOST_DRAFTERS = 64  # of one answer: each has a bit in its nodes' owners
# What applying a template takes beside what is the template's.
_OF_TEMPLATING = frozenset(signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


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
    echo: str = ""  # what its text begins with
    tells_ids: bool = False  # the prompt's tokens and its own, in the answer
    tools: Tools | None = None  # that it may call


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
        template = str(self._tokenizer.chat_template)
        self._knows_tools, self._calls = "tools" in template, form_of(template, self._tokenizer.get_vocab().get)
        self._end_tokens = tuple(sorted(end_tokens(target_path, self._tokenizer)))
        self._longest_token = max(map(len, self._tokenizer.get_vocab()))

    def read_chat(self, request: ChatRequest, drafters: Drafters) -> list[Generation]:
        """What to generate, each choice's answer by itself."""
        messages = [message.plain() for message in request.messages]
        given = [tool.plain() for tool in request.tools]
        tools = tools_of(given, request.tool_choice, request.parallel_tool_calls, self._calls)
        if len(messages) > self._target.max_tokens:
            raise self._too_long(f"{len(messages)} messages", "messages")
        shown = (message.get(key, "") for message in messages for key in ("content", "name"))
        called = (json.dumps(message["tool_calls"]) for message in messages if "tool_calls" in message)
        self._refuse_far_too_long(sum(map(len, (*shown, *called))), "messages")
        if tools is not None:
            self._refuse_far_too_long(len(json.dumps(tools.functions)), "tools")
        max_tokens = request.max_completion_tokens or request.max_tokens
        begins = _beginning(messages, request.cache_salt)
        prompt = self._templated(request, messages, tools)
        job = self._generation(request, prompt, max_tokens, drafters, begins, tools=tools)
        return _choices(job, request.num_choices)

    def read_completion(self, request: CompletionRequest, drafters: Drafters) -> list[Generation]:
        """What to generate, each choice's answer to each prompt by itself; a prompt's choices lie together."""
        max_tokens = request.max_tokens or _DEFAULT_COMPLETION_TOKENS
        jobs: list[Generation] = []
        seed = _seed(request)  # the same for all prompts: each is answered as if it were alone
        for prompt in request.prompt:
            job = self._generation(request, self._tokenize(prompt), max_tokens, drafters, seed=seed)
            if request.echo:
                job = replace(job, echo=self._text_of(prompt))
            jobs += _choices(job, request.num_choices)
        return jobs

    @property
    def token_texts(self) -> TokenTexts:
        return self._token_texts

    def delivery(self, job: Generation) -> Delivery:
        """The text of `job`'s answer, as its tokens come."""
        state = job.state
        ends = frozenset(state.end_tokens)
        return Delivery(self._tokenizer, state.max_tokens, ends, job.stop, state.min_tokens)

    def _templated(
        self, request: ChatRequest, messages: Sequence[dict[str, Any]], tools: Tools | None
    ) -> list[int]:
        """The messages and tools as the target's chat template writes them."""
        given = dict(request.chat_template_kwargs)
        if taken := sorted({*given} & _OF_TEMPLATING):
            reason = f"chat_template_kwargs are the template's own; {taken[0]!r} is not"
            raise RequestError(reason, "chat_template_kwargs")
        self._refuse_far_too_long(len(json.dumps(given)), "chat_template_kwargs")
        if self._knows_tools:
            messages = with_ids_for(self._calls, messages)
            if tools is not None:
                given["tools"] = [{"type": "function", "function": function} for function in tools.functions]
        else:
            messages = without_tools(messages)
            messages = messages if tools is None else tools.told(messages)
        try:
            templated = self._tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=request.add_generation_prompt,
                continue_final_message=request.continue_final_message,
                **given,
            )
        except Exception as error:  # templates raise errors of their own about roles and their order
            reason = f"the target's chat template refuses these messages: {error}"
            raise RequestError(reason, "messages") from error
        ids: list[int] = templated["input_ids"]
        return ids

    def _tokenize(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            self._refuse_far_too_long(len(prompt), "prompt")
            try:
                ids: list[int] = self._tokenizer(prompt)["input_ids"]
            except (TypeError, ValueError) as error:
                raise RequestError(f"the prompt cannot be tokenized: {error}", "prompt") from error
            return ids
        return prompt

    def _text_of(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        text: str = self._tokenizer.decode(prompt, skip_special_tokens=True)
        return text

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
        seed: int | None = None,
        tools: Tools | None = None,
    ) -> Generation:
        """Args: begins: names a conversation that no key of the request's names; seed: by default its own."""
        where = "messages" if isinstance(request, ChatRequest) else "prompt"
        if not prompt:
            raise RequestError("the prompt is empty", where)
        # Text, too, may hold tokens that were added to the tokenizer alone.
        self._refuse_unknown(prompt, "the prompt", where)
        room = self._target.max_tokens - len(prompt)
        if room < 1 or (max_tokens or 1) > room:
            wanted = f" and {max_tokens} more were requested" if max_tokens else ""
            raise self._too_long(f"{len(prompt)}{wanted}", where)
        tree = self._tree(request.options)
        params = _sampling(request, _seed(request) if seed is None else seed)
        self._refuse_unknown([token for token, _ in params.logit_bias], "logit_bias", "logit_bias")
        grammar = grammar_of(request.forms)
        if grammar and tools is not None:
            raise RequestError("an answer has a form or calls tools; leave one of them out", "tools")
        grammar = grammar if tools is None else tools.grammar()
        if grammar and (request.min_tokens or request.ignore_eos):
            reason = "an answer of a given form ends where that ends: leave out min_tokens and ignore_eos"
            raise RequestError(reason, "min_tokens" if request.min_tokens else "ignore_eos")
        return Generation(
            SessionState(
                tuple(prompt),
                sampling=params,
                max_tokens=max_tokens or room,
                end_tokens=self._ends(request),
                min_tokens=_least(request.min_tokens, max_tokens or room),
                bad_words=self._bad_words(request.bad_words or ()),
                grammar=grammar,
                num_logprobs=request.num_logprobs,
                tells_trees=request.options.explain,
                cache_salt=request.cache_salt or "",
            ),
            request.stop_strings,
            tree.strategy,
            self._choose(tree.strategy, request.options.drafters, drafters),
            Ask(tree.num_nodes, tree.depth, tree.top_k, params if tree.coupled else None),
            request.options.explain,
            request.prompt_cache_key or begins,
            tells_ids=request.return_token_ids or False,
            tools=tools,
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


def _choices(job: Generation, count: int) -> list[Generation]:
    """The same with noise of their own each."""

    def with_noise(choice: int) -> Generation:
        params = replace(job.state.sampling, choice=choice)
        ask = job.ask if job.ask.sampling is None else replace(job.ask, sampling=params)
        return replace(job, state=replace(job.state, sampling=params), ask=ask)

    return [job, *map(with_noise, range(1, count))]


def _seed(request: ChatRequest | CompletionRequest) -> int:
    return secrets.randbits(64) if request.seed is None else request.seed & _SEED_MASK


def _sampling(request: ChatRequest | CompletionRequest, seed: int) -> SamplingParams:
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
        seed=seed,
    )
