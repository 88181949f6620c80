"""The router deployment: the HTTP edge in front of leased verifiers and drafters.

FastAPI reads the argument types at run time, so annotations are not postponed here.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from deployments import openai
from deployments.config import RouterArgs, TargetArgs, locate
from deployments.descriptions import TargetDescription
from deployments.directory import Directory
from deployments.errors import RequestError
from deployments.generation import Generator
from deployments.metrics import Observer
from deployments.openai import Kind, Writer
from deployments.record import RequestRecord
from deployments.requests import Generation, RequestReader
from deployments.schema import ChatRequest, CompletionRequest, parse_chat, parse_completion
from taps.decoding.delivery import Delivered
from taps.models.embedded import target_path
from taps.peers import PeerBusy, PeerGone
from taps.sampling import InvalidLogits
from taps.verdict import PromptTooLong

logger = logging.getLogger("ray.serve")
api = FastAPI(title="TAPS Cluster")
AnyRequest = TypeVar("AnyRequest", ChatRequest, CompletionRequest)


def _refusal(error: RequestError) -> Response:
    return JSONResponse(error.body(), error.status)


async def _close(pieces: AsyncGenerator[Delivered, None]) -> None:
    """Free what an answer held: its sessions, and the drafters they lease."""
    await pieces.aclose()


@api.exception_handler(HTTPException)
async def no_such_route(_: Request, error: HTTPException) -> Response:
    """Unknown paths and methods, in the form clients expect."""
    return _refusal(RequestError(f"{error.detail}; see /docs for what there is", status=error.status_code))


@api.exception_handler(Exception)
async def internal_error(_: Request, error: Exception) -> Response:
    """Our own bugs, in the form clients expect; Serve logs the traceback."""
    return _refusal(RequestError(f"internal error: {type(error).__name__}", status=500))


@serve.deployment(max_ongoing_requests=256, ray_actor_options={"num_cpus": 0.2})
@serve.ingress(api)
class Router:
    """Reads requests, generates on leased replicas and writes the answers."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, verifier: DeploymentHandle[Any], target: TargetArgs, args: RouterArgs
    ) -> None:
        self._args = args
        self._verifier = verifier
        async with asyncio.timeout(args.start_deadline_s):
            self._target: TargetDescription = await verifier.describe.remote()
        self._model_card = openai.model_card(args.model_name, int(time.time()), self._target.max_tokens)
        self._reader = RequestReader(target_path(locate(target.path)), self._target, args)
        self._generator = Generator(verifier, args)
        self._observer = Observer()
        core = serve.get_replica_context().app_name
        self._directory = Directory(self._target, core, args.discovery_interval_s, args.drafters or ())
        self._directory.start()
        self._closing: set[asyncio.Task[None]] = set()  # sessions whose answers are complete

    @api.get("/health")
    async def health(self) -> Response:
        """200 when router and verifier are ready."""
        drafters = list(self._directory.specialists)
        if not self._directory.verifier_is_up:
            return JSONResponse({"status": "no verifier is up", "drafters": drafters}, 503)
        return JSONResponse({"status": "ok", "drafters": drafters})

    @api.get("/v1/models")
    async def models(self) -> Response:
        return JSONResponse(openai.model_list([self._model_card]))

    @api.get("/v1/models/{name:path}")
    async def model(self, name: str) -> Response:
        if name != self._args.model_name:
            return _refusal(RequestError(f"the model {name!r} does not exist", "model", 404, "model_not_found"))
        return JSONResponse(self._model_card)

    @api.post("/v1/chat/completions")
    async def chat(self, http: Request) -> Response:
        return await self._serve(http, parse_chat, self._reader.read_chat, "chat")

    @api.post("/v1/completions")
    async def completions(self, http: Request) -> Response:
        return await self._serve(http, parse_completion, self._reader.read_completion, "completion")

    async def _serve(
        self,
        http: Request,
        parse: Callable[[bytes], AnyRequest],
        read: Callable[[AnyRequest, Collection[str]], Generation],
        kind: Kind,
    ) -> Response:
        """One request of either endpoint."""
        try:
            request = parse(await http.body())
            job = read(request, self._directory.specialists)
        except RequestError as error:
            self._observer.observe_refusal(error.message)
            return _refusal(error)
        try:
            return await self._answer(
                job, request.stream or False, Writer(kind, request.model, request.include_usage)
            )
        except RequestError as error:
            return _refusal(error)

    async def _answer(self, job: Generation, stream: bool, writer: Writer) -> Response:
        """The whole answer, or its stream once the first token is there: errors before it have a status."""
        record = RequestRecord(writer.id, job)
        pieces = self._pieces(job, record)
        if stream:
            events = self._events(await anext(pieces), pieces, record, writer)
            return StreamingResponse(events, media_type="text/event-stream")
        answer = [await anext(pieces)]
        while answer[-1].finish_reason is None:
            answer.append(await anext(pieces))
        closing = asyncio.create_task(_close(pieces))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        text = "".join(piece.text for piece in answer)
        return JSONResponse(writer.whole(text, answer[-1].finish_reason, record))

    async def _events(
        self,
        piece: Delivered,
        pieces: AsyncGenerator[Delivered, None],
        record: RequestRecord,
        writer: Writer,
    ) -> AsyncIterator[str]:
        """Server-sent events. A client that goes away closes this generator, which frees the session.

        Args: piece: the first one; pieces: all others.
        """
        async with aclosing(pieces):
            try:
                yield writer.chunk(piece.text, piece.finish_reason, first=True)
                while piece.finish_reason is None:
                    piece = await anext(pieces)
                    if piece.text or piece.finish_reason:
                        yield writer.chunk(piece.text, piece.finish_reason)
            except RequestError as error:
                yield openai.error_event(error)
                return
            if writer.include_usage:
                yield writer.usage_chunk(record)
            yield openai.DONE

    async def _pieces(self, job: Generation, record: RequestRecord) -> AsyncGenerator[Delivered, None]:
        """The answer piece by piece; failures as request errors, and one record whatever happens."""
        outcome = "cancelled"
        delivery = self._reader.delivery(job)
        deadline = asyncio.get_running_loop().time() + self._args.request_deadline_s
        try:
            async with aclosing(self._generator.steps(job, self._directory.specialists)) as steps:
                while True:
                    async with asyncio.timeout_at(deadline):
                        step = await anext(steps)
                    delivered = delivery.push(step.verdict.tokens)
                    record.take(step, delivered.num_tokens)
                    self._observer.observe_step(step, record)
                    outcome = delivered.finish_reason or outcome
                    yield delivered
                    if delivered.finish_reason is not None:
                        return
        except PeerBusy as error:
            outcome = "overloaded"
            up = self._directory.verifier_is_up
            reason = "the server is at capacity; try again" if up else "no verifier is up; try again soon"
            raise RequestError(reason, status=503, code="overloaded") from error
        except PromptTooLong as error:
            outcome = "refused"
            raise RequestError(str(error), code="context_length_exceeded") from error
        except TimeoutError as error:
            outcome = "failed"
            reason = f"the answer was not finished within {self._args.request_deadline_s:g} s"
            raise RequestError(reason, status=503, code="timeout") from error
        except PeerGone as error:
            outcome = "failed"
            raise RequestError(f"the target could not answer: {error}", status=503) from error
        except InvalidLogits as error:  # as it would on any other verifier
            outcome = "failed"
            raise RequestError(f"the target cannot answer this: {error}", status=500) from error
        except Exception as error:  # our own bugs, too, end a started stream with an error event
            outcome = "failed"
            logger.exception("request %s failed", record.id)
            raise RequestError(f"internal error: {type(error).__name__}", status=500) from error
        finally:
            self._observer.observe_end(record, outcome)
