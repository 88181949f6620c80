"""The HTTP endpoints: a request is read, generated on leased replicas, and answered whole or as a stream.

FastAPI reads the argument types at run time, so annotations are not postponed here. Knows readers, generators
and writers; nothing of Serve or of how replicas are found.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from deployments import openai
from deployments.config import RouterArgs
from deployments.descriptions import TargetDescription
from deployments.directory import Directory
from deployments.edge import Api, plain_path, read_body, refusal
from deployments.errors import RequestError
from deployments.generation import Generator
from deployments.merging import merged
from deployments.metrics import Observer
from deployments.openai import Kind, Piece, Writer
from deployments.pages import pages
from deployments.record import RequestRecord
from deployments.requests import Drafters, Generation, RequestReader
from deployments.schema import ChatRequest, CompletionRequest, parse_chat, parse_completion, unknown_model
from deployments.tools import CallReader
from deployments.verifiers import RequestVerifier
from taps.peers import PeerBusy, PeerGone
from taps.sampling import InvalidLogits
from taps.verdict import InvalidGrammar, PromptTooLong

logger = logging.getLogger("ray.serve")
AnyRequest = TypeVar("AnyRequest", ChatRequest, CompletionRequest)
# Proxies must pass events on as they come.
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def _close(pieces: AsyncGenerator[Piece, None]) -> None:
    """Free what a request held: its sessions, and the drafters they lease."""
    await pieces.aclose()


class Endpoints:
    """What the router answers."""

    def __init__(
        self,
        args: RouterArgs,
        target: TargetDescription,
        reader: RequestReader,
        generator: Generator,
        directory: Directory,
        observer: Observer,
    ) -> None:
        self._args = args
        self._numerics = target.numerics
        self._model_card = openai.model_card(args.model_name, int(time.time()), target.max_tokens)
        self._reader = reader
        self._generator = generator
        self._directory = directory
        self._observer = observer
        # A long prompt takes a while to read. One thread: a tokenizer is not made for several.
        self._reading = ThreadPoolExecutor(1, "reading")
        self._closing: set[asyncio.Task[None]] = set()  # sessions whose answers are complete

    def api(self) -> Api:
        api = Api("TAPS Cluster", self._args.cors_origins)
        api.get_route("/health", self.health)
        api.get_route("/status", self.status)
        for path, page in pages().items():
            api.get_route(path, page)
        api.get_route("/v1/models", self.models)
        api.get_route("/v1/models/{name:path}", self.model)
        api.post("/v1/chat/completions")(self.chat)
        api.post("/v1/completions")(self.completions)
        return api

    async def health(self) -> Response:
        """200 when router and verifier are ready."""
        up = self._directory.verifier_is_up
        status = {
            "status": "ok" if up else "no verifier is up",
            "drafters": self._drafters(),
            "numerics": self._numerics,
        }
        return JSONResponse(status, 200 if up else 503)

    async def status(self) -> Response:
        """What there is and how it fares, for people and pages; of this router, where there are more."""
        up = self._directory.verifier_is_up
        about = {"status": "ok" if up else "no verifier is up", "model": self._args.model_name}
        told = {**about, "numerics": self._numerics, "drafters": self._drafters()}
        return JSONResponse({**told, **self._directory.told(), "router": self._observer.recent.told()})

    def _drafters(self) -> list[str]:
        """Names of those that are up, and of the one in this process."""
        ngram = self._args.ngram
        return list(dict.fromkeys([*self._directory.specialists, *([ngram.name] if ngram else [])]))

    async def models(self) -> Response:
        return JSONResponse(openai.model_list([self._model_card]))

    async def model(self, name: str) -> Response:
        if plain_path(f"/{name}") != plain_path(f"/{self._args.model_name}"):
            return refusal(unknown_model(name, self._args.model_name))
        return JSONResponse(self._model_card)

    async def chat(self, http: Request) -> Response:
        return await self._serve(http, parse_chat, self._reader.read_chat, "chat")

    async def completions(self, http: Request) -> Response:
        return await self._serve(http, parse_completion, self._reader.read_completion, "completion")

    async def _serve(
        self,
        http: Request,
        parse: Callable[[bytes, str], AnyRequest],
        read: Callable[[AnyRequest, Drafters], list[Generation]],
        kind: Kind,
    ) -> Response:
        """One request of either endpoint."""
        deadline = asyncio.get_running_loop().time() + self._args.request_deadline_s
        try:
            request, jobs = await self._understand(http, parse, read, deadline)
        except RequestError as error:
            self._observer.observe_refusal(error.message)
            return refusal(error)
        writer = Writer(kind, request.model, request.include_usage)
        try:
            return await self._answer(jobs, deadline, request.stream or False, writer)
        except RequestError as error:
            return refusal(error)

    async def _understand(
        self,
        http: Request,
        parse: Callable[[bytes, str], AnyRequest],
        read: Callable[[AnyRequest, Drafters], list[Generation]],
        deadline: float,
    ) -> tuple[AnyRequest, list[Generation]]:
        """The request, and what to generate for it. The event loop is free meanwhile: streams go on."""
        drafters = Drafters(self._drafters(), self._directory.away)

        def from_body(body: bytes) -> tuple[AnyRequest, list[Generation]]:
            request = parse(body, self._args.model_name)
            return request, read(request, drafters)

        try:
            async with asyncio.timeout_at(deadline):
                body = await read_body(http, self._args.max_body_bytes)
                return await asyncio.get_running_loop().run_in_executor(self._reading, from_body, body)
        except TimeoutError as error:
            raise self._too_late() from error

    def _too_late(self) -> RequestError:
        reason = f"the answer was not finished within {self._args.request_deadline_s:g} s"
        return RequestError(reason, status=503, code="timeout")

    async def _answer(
        self, jobs: Sequence[Generation], deadline: float, stream: bool, writer: Writer
    ) -> Response:
        """Whole answers, or their stream once the first token is there: errors before it have a status."""
        record = RequestRecord(writer.id, jobs, self._reader.token_texts.text_of)
        pieces = self._pieces(jobs, deadline, record)
        if stream:
            events = self._events(await anext(pieces), pieces, len(jobs), record, writer)
            return StreamingResponse(events, headers=_STREAM_HEADERS, media_type="text/event-stream")
        answered, left = [], len(jobs)
        while left:
            answered.append(await anext(pieces))
            left -= answered[-1].finish_reason is not None
        closing = asyncio.create_task(_close(pieces))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        return JSONResponse(writer.whole(answered, record))

    async def _events(
        self,
        piece: Piece,
        pieces: AsyncGenerator[Piece, None],
        left: int,
        record: RequestRecord,
        writer: Writer,
    ) -> AsyncIterator[bytes]:
        """Server-sent events. A client that goes away closes this generator, which frees the sessions.

        Args: piece: the first one; pieces: all others; left: answers that are not complete.
        """
        async with aclosing(pieces):
            try:
                while True:
                    for chunk in writer.chunks(piece):
                        yield chunk
                    left -= piece.finish_reason is not None
                    if not left:
                        break
                    piece = await anext(pieces)
            except RequestError as error:
                yield openai.error_event(error)
                return
            if writer.include_usage:
                yield writer.usage_chunk(record)
            yield openai.DONE

    async def _pieces(
        self, jobs: Sequence[Generation], deadline: float, record: RequestRecord
    ) -> AsyncGenerator[Piece, None]:
        """All answers piece by piece; failures as request errors, and one record whatever happens."""
        outcome = "cancelled"
        self._observer.observe_begin(record)
        try:
            async with (
                self._generator.verifier(jobs, lambda: self._observer.leasing(record)) as verifier,
                aclosing(merged(self._each(jobs, verifier, record))) as pieces,
            ):
                left = len(jobs)
                while left:
                    async with asyncio.timeout_at(deadline):
                        piece = await anext(pieces)
                    left -= piece.finish_reason is not None
                    outcome = outcome if left else piece.finish_reason or outcome
                    yield piece
        except PeerBusy as error:
            outcome = "overloaded"
            up = self._directory.verifier_is_up
            reason = "the server is at capacity; try again" if up else "no verifier is up; try again soon"
            raise RequestError(reason, status=503, code="overloaded") from error
        except PromptTooLong as error:
            outcome = "refused"
            raise RequestError(str(error), code="context_length_exceeded") from error
        except InvalidGrammar as error:
            outcome = "refused"
            raise RequestError(f"the form asked for cannot be kept: {error}") from error
        except TimeoutError as error:
            outcome = "failed"
            raise self._too_late() from error
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

    def _each(
        self, jobs: Sequence[Generation], verifier: RequestVerifier, record: RequestRecord
    ) -> list[AsyncGenerator[Piece, None]]:
        """Each answer piece by piece. A prompt's others begin once its first one has: they share its pages."""
        answers, begun = [], asyncio.Event()
        for index, job in enumerate(jobs):
            is_first = not job.state.sampling.choice
            begun = asyncio.Event() if is_first else begun
            answers.append(self._one(index, job, verifier, record, begun))
        return answers

    async def _one(
        self,
        index: int,
        job: Generation,
        verifier: RequestVerifier,
        record: RequestRecord,
        begun: asyncio.Event,
    ) -> AsyncGenerator[Piece, None]:
        """One answer. Args: begun: whether its prompt is in the verifier's cache."""
        if job.state.sampling.choice:
            await begun.wait()
        delivery = self._reader.delivery(job)
        calls = None if job.tools is None else CallReader(job.tools.form)
        text, prompt = job.echo, job.state.tokens if job.tells_ids else None
        async with aclosing(self._generator.steps(job, self._directory.specialists, verifier)) as steps:
            async for step in steps:
                begun.set()
                delivered = delivery.push(step.verdict.tokens)
                record.take(step, delivered.num_tokens, index)
                self._observer.observe_step(step, record)
                tokens = step.verdict.tokens[: delivered.num_tokens]
                told = self._reader.token_texts.tell(tokens, step.verdict.logprobs)
                ids = tokens if job.tells_ids else None
                piece = Piece(
                    text + delivered.text, delivered.finish_reason, index, told, ids, prompt,
                    step=record.steps[-1] if record.steps and not step.is_prefill else None,
                )  # fmt: skip
                yield piece if calls is None else _with_calls(piece, calls)
                if delivered.finish_reason is not None:
                    return
                text, prompt = "", None


def _with_calls(piece: Piece, calls: CallReader) -> Piece:
    """The same, its text read for calls of tools."""
    said = calls.push(piece.text, piece.finish_reason is not None)
    if piece.finish_reason == "stop" and calls.num_calls:
        piece = piece._replace(finish_reason="tool_calls")
    return piece._replace(text=said.content, calls=said.calls)
