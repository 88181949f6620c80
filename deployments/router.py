"""The router deployment: HTTP in, a session on the verifier, drafters beside it, tokens out."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from transformers import AutoTokenizer, GenerationConfig

from deployments import openai
from deployments.channel import ChannelPool
from deployments.config import RouterArgs, TargetArgs, TreeArgs, locate
from deployments.directory import DrafterDirectory, Specialist
from deployments.observability import Observer, RequestRecord
from deployments.openai import ChatRequest, CompletionRequest, RequestError
from deployments.sessions import RemoteVerifierSession, drafter_session, verifier_session
from taps.composing import STRATEGIES
from taps.context import Context
from taps.decoding import DrafterGone, Panel, VerifierGone, decode
from taps.delivery import Delivered, Delivery
from taps.drafting.drafter import Ask
from taps.models.cache import CacheFull
from taps.models.embedded import target_path
from taps.sampling import SamplingParams

_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions
_HEALTH_TIMEOUT_S = 5.0
_REJOIN_DELAY_S = 0.5

api = FastAPI(title="TAPS Cluster")


@dataclass(frozen=True)
class Generation:
    """A validated request, in the engine's terms."""

    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    stop: tuple[str, ...]
    tree: TreeArgs
    specialists: list[Specialist]


@serve.deployment
@serve.ingress(api)
class Router:
    """Validates requests, decodes them on leased replicas and writes the answers."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, verifier: DeploymentHandle[Any], target: TargetArgs, args: RouterArgs
    ) -> None:
        self._args = args
        self._verifier = verifier
        self._target: dict[str, Any] = await verifier.describe.remote()
        path = target_path(locate(target.path))
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self._end_tokens = _end_tokens(path, self._tokenizer)
        self._pool = ChannelPool()
        self._observer = Observer()
        self._created = int(time.time())
        self._directory = DrafterDirectory(self._target, args.discovery_interval_s)
        self._directory.start()

    @api.get("/health")
    async def health(self) -> Response:
        """200 when router and verifier answer."""
        try:
            await asyncio.wait_for(self._verifier.describe.remote(), _HEALTH_TIMEOUT_S)
        except (TimeoutError, RayError, RayServeException) as error:
            return JSONResponse({"status": "verifier not ready", "reason": type(error).__name__}, 503)
        return JSONResponse({"status": "ok", "drafters": list(self._directory.specialists)})

    @api.get("/v1/models")
    async def models(self) -> Response:
        name, limit = self._args.model_name, self._target["max_tokens"]
        return JSONResponse(openai.model_list(name, self._created, limit))

    @api.post("/v1/chat/completions")
    async def chat(self, http: Request) -> Response:
        try:
            request = openai.parse_chat(await http.body())
            prompt = self._apply_template(request)
            max_tokens = request.max_completion_tokens or request.max_tokens
            job = self._generation(request, prompt, max_tokens)
            return await self._answer(job, request, openai.Writer("chat", request.model))
        except RequestError as error:
            return JSONResponse(error.body(), error.status)

    @api.post("/v1/completions")
    async def completions(self, http: Request) -> Response:
        try:
            request = openai.parse_completion(await http.body())
            job = self._generation(
                request, self._tokenize(request), request.max_tokens or _DEFAULT_COMPLETION_TOKENS
            )
            return await self._answer(job, request, openai.Writer("completion", request.model))
        except RequestError as error:
            return JSONResponse(error.body(), error.status)

    def _apply_template(self, request: ChatRequest) -> list[int]:
        messages = [message.plain() for message in request.messages]
        try:
            templated = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        except Exception as error:  # templates raise errors of their own about roles and their order
            raise RequestError(
                f"the target's chat template refuses these messages: {error}", "messages"
            ) from error
        ids: list[int] = templated["input_ids"]
        return ids

    def _tokenize(self, request: CompletionRequest) -> list[int]:
        if isinstance(request.prompt, str):
            ids: list[int] = self._tokenizer(request.prompt)["input_ids"]
            return ids
        limit = self._target["vocab_size"]
        if not all(isinstance(token, int) and 0 <= token < limit for token in request.prompt):
            raise RequestError(f"token ids must lie between 0 and {limit - 1}", "prompt")
        return [int(token) for token in request.prompt]

    def _generation(
        self, request: ChatRequest | CompletionRequest, prompt: list[int], max_tokens: int | None
    ) -> Generation:
        if request.model != self._args.model_name:
            raise RequestError(
                f"the model {request.model!r} does not exist; this server has {self._args.model_name!r}",
                "model", code="model_not_found",
            )  # fmt: skip
        limit = self._target["max_tokens"]
        room = limit - len(prompt)
        if room < 1 or (max_tokens or 1) > room:
            raise RequestError(
                f"the maximum context length is {limit} tokens; the prompt has {len(prompt)}"
                + (f" and {max_tokens} more were requested" if max_tokens else ""),
                "messages" if isinstance(request, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        tree = self._tree(request.taps)
        return Generation(
            prompt, _sampling(request), max_tokens or room, request.stop_strings, tree,
            self._choose(tree.strategy, request.taps.drafters),
        )  # fmt: skip

    def _tree(self, options: openai.TapsOptions) -> TreeArgs:
        chosen = options.model_dump(exclude={"drafters"}, exclude_none=True)
        try:
            return TreeArgs(**self._args.tree.model_dump() | chosen)
        except ValueError as error:
            raise RequestError(f"taps: {error}", "taps") from error

    def _choose(self, strategy: str, names: list[str] | None) -> list[Specialist]:
        """The specialists to ask: those named, or the configured ones that are up."""
        up = self._directory.specialists
        unknown = [name for name in names or [] if name not in up]
        if unknown:
            raise RequestError(
                f"no drafter {unknown[0]!r} is up; there are {', '.join(up) or 'none'}", "taps.drafters"
            )
        if strategy == "off":
            return []
        wanted = names if names is not None else self._args.drafters or list(up)
        chosen = [up[name] for name in dict.fromkeys(wanted) if name in up]
        return chosen[:1] if strategy == "single" else chosen

    async def _answer(
        self, job: Generation, request: ChatRequest | CompletionRequest, writer: openai.Writer
    ) -> Response:
        """The whole answer, or its stream once the first token is there: errors before it have a status."""
        names = [specialist.name for specialist in job.specialists]
        record = RequestRecord(writer.id, len(job.prompt), job.tree.strategy, names)
        pieces = self._observed(job, record)
        if not request.stream:
            async with aclosing(pieces):
                answer = [piece async for piece in pieces]
            text = "".join(piece.text for piece in answer)
            return JSONResponse(writer.whole(text, answer[-1].finish_reason, *_summary(record)))
        first = await anext(pieces)
        events = self._events(first, pieces, record, request, writer)
        return StreamingResponse(events, media_type="text/event-stream")

    async def _events(
        self, first: Delivered, pieces: AsyncGenerator[Delivered, None], record: RequestRecord,
        request: ChatRequest | CompletionRequest, writer: openai.Writer,
    ) -> AsyncIterator[str]:  # fmt: skip
        """Server-sent events. A client that goes away closes this generator, which frees the session."""
        async with aclosing(pieces):
            try:
                yield writer.chunk(first.text, first.finish_reason, first=True)
                async for piece in pieces:
                    if piece.text or piece.finish_reason:
                        yield writer.chunk(piece.text, piece.finish_reason)
            except RequestError as error:
                yield openai.error_event(error)
                return
        if request.include_usage:
            yield writer.usage_chunk(*_summary(record))
        yield openai.DONE

    async def _observed(self, job: Generation, record: RequestRecord) -> AsyncGenerator[Delivered, None]:
        """The answer's pieces; failures as request errors, and one record whatever happens."""
        outcome = "cancelled"
        try:
            async with aclosing(self._generate(job, record)) as pieces:
                async for piece in pieces:
                    outcome = piece.finish_reason or outcome
                    yield piece
        except (BackPressureError, CacheFull) as error:
            outcome = "overloaded"
            raise RequestError("the server is at capacity; try again", status=503, code="overloaded") from error
        except (VerifierGone, TimeoutError) as error:
            outcome = "failed"
            raise RequestError(f"the target could not answer: {error}", status=503) from error
        finally:
            self._observer.observe_end(record, outcome)

    async def _generate(self, job: Generation, record: RequestRecord) -> AsyncGenerator[Delivered, None]:
        """Decode one request on leased replicas; every lease ends with the generator."""
        deadline = time.monotonic() + self._args.request_deadline_s
        context = Context(job.prompt, self._args.feature_window)
        delivery = Delivery(self._tokenizer, job.max_tokens, self._end_tokens, job.stop)
        panel = Panel((), self._args.propose_deadline_s)
        compose = STRATEGIES[job.tree.strategy]
        keepers = [
            asyncio.create_task(self._keep_on(panel, specialist, index))
            for index, specialist in enumerate(job.specialists)
        ]

        def open_verifier() -> AbstractAsyncContextManager[RemoteVerifierSession]:
            return verifier_session(
                self._pool,
                self._verifier,
                job.params,
                self._args.lease_deadline_s,
                self._args.verify_deadline_s,
            )

        try:
            async with aclosing(decode(context, open_verifier, panel, compose, _ask(job))) as steps:
                async for step in steps:
                    delivered = delivery.push(step.verdict.tokens)
                    since_last_ms = record.take(step, delivered.num_tokens)
                    self._observer.observe_step(step, delivered.num_tokens, since_last_ms)
                    yield delivered
                    if delivered.finish_reason is not None:
                        return
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"not finished within {self._args.request_deadline_s:g} s")
        finally:
            for keeper in keepers:
                keeper.cancel()
            await panel.close()
            await asyncio.gather(*keepers, return_exceptions=True)

    async def _keep_on(self, panel: Panel, specialist: Specialist, index: int) -> None:
        """Lease the specialist and keep it on the panel; when it is lost, lease another replica."""
        while True:
            try:
                async with drafter_session(
                    self._pool, specialist.handle, specialist.name, index,
                    self._args.lease_deadline_s, self._args.lease_deadline_s,
                ) as session:  # fmt: skip
                    await panel.member(session)
            except (DrafterGone, RayError, RayServeException):
                await asyncio.sleep(_REJOIN_DELAY_S)


def _end_tokens(path: str, tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer: the generation config's, and the tokenizer's own."""
    try:
        configured = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        configured = None
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)


def _sampling(request: ChatRequest | CompletionRequest) -> SamplingParams:
    seed = secrets.randbits(64) if request.seed is None else request.seed & 0xFFFFFFFFFFFFFFFF
    return SamplingParams(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=max(request.top_k or 0, 0),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        seed=seed,
    )


def _ask(job: Generation) -> Ask:
    sampling = job.params if job.tree.coupled else None
    return replace(Ask(job.tree.num_nodes, job.tree.depth, job.tree.top_k), sampling=sampling)


def _summary(record: RequestRecord) -> tuple[openai.Json, openai.Json]:
    used = openai.usage(record.prompt_tokens, record.new_tokens)
    return used, openai.speculation(record.counts, record.drafters)
