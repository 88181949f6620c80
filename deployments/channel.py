"""A session between two replicas: a lease that Serve counts, and a stream that carries the steps.

The lease is a streaming Serve call that stays open for the session, so autoscaling, queue bounds and draining
work on sessions. The stream is one gRPC bidirectional call to the leased replica, one message each way per
step. Each ends with the other: whichever side goes first, all state of the session is freed.

Knows Serve handles, gRPC and bytes; nothing of what the messages mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import grpc
import grpc.aio
import ray.util
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.messages import Message, decode, encode, error_message, is_expected
from taps.peers import PeerBusy, PeerGone

logger = logging.getLogger("ray.serve")
_METHOD = "/taps.Session/Open"
_SECRET = "taps-lease"
_CONNECT_DEADLINE_S = 10.0
_CLOSE_DEADLINE_S = 5.0
_SIGN_OF_LIFE_S = 1.0  # how often a replica that owes an answer says that it is at work
_AT_WORK: Message = {"at_work": True}
# All of these are needed for a frozen peer to be noticed within seconds.
_OPTIONS = [
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_send_message_length", 256 << 20),
    ("grpc.max_receive_message_length", 256 << 20),
]

T = TypeVar("T")
Handler = Callable[[Message], Awaitable[Message]]
# Called with a session's first message; the handler it gives answers all further ones.
OpenSession = Callable[[Message], AbstractAsyncContextManager[Handler]]


def node_address() -> str:
    """The address other nodes of the cluster reach this one at."""
    return str(cast(Any, ray.util).get_node_ip_address())


@dataclass
class _Lease:
    """A promised session: until its stream ends, or nobody connects in time."""

    connected: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    stream: asyncio.Task[Any] | None = None


class SessionServer:
    """A replica's side: hands out leases and serves their streams. `start` it in the replica's `__init__`."""

    def __init__(
        self, open_session: OpenSession, check: Callable[[], None] = lambda: None, numerics: str = ""
    ) -> None:
        """Args: check: raises once the replica can do no more, and answers will not come; numerics: what every
        lease grant says of the replica.
        """
        self._open_session = open_session
        self._check = check
        self._numerics = numerics
        self._leases: dict[str, _Lease] = {}
        self._server: grpc.aio.Server | None = None
        self._endpoint = ""

    async def start(self, host: str) -> None:
        """Listen on a free port of `host`."""
        self._server = grpc.aio.server(options=_OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(self._serve_stream)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("taps.Session", {"Open": handler}),)
        )
        self._endpoint = f"{host}:{self._server.add_insecure_port(f'{host}:0')}"
        await self._server.start()

    async def stop(self) -> None:
        """Stop listening; sessions that are open are ended."""
        if self._server is not None:
            await self._server.stop(grace=None)

    @property
    def num_sessions(self) -> int:
        return len(self._leases)

    async def lease(self) -> AsyncIterator[Message]:
        """A streaming Serve method: yields endpoint and secret, then lasts as long as the session."""
        secret = secrets.token_urlsafe(24)
        lease = self._leases[secret] = _Lease()
        try:
            yield {"endpoint": self._endpoint, "secret": secret, "numerics": self._numerics}
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CONNECT_DEADLINE_S):
                    await lease.connected.wait()
                await lease.ended.wait()
        finally:
            del self._leases[secret]
            if lease.stream is not None:
                lease.stream.cancel()
                await self._until_freed(lease)

    async def _until_freed(self, lease: _Lease) -> None:
        """The session's state goes before Serve may give its place to another lease."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_DEADLINE_S):
                await lease.ended.wait()

    async def _serve_stream(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> None:
        metadata = dict(context.invocation_metadata() or ())
        lease = self._leases.get(str(metadata.get(_SECRET, "")))
        if lease is None or lease.connected.is_set():
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no such lease")
            return
        lease.stream = asyncio.current_task()
        lease.connected.set()
        writing: asyncio.Future[None] | None = None
        try:
            async with aclosing(self._replies(requests)) as replies:
                async for reply in replies:
                    writing = asyncio.ensure_future(context.write(reply))
                    await asyncio.shield(writing)
        except asyncio.CancelledError:
            # gRPC takes a status only after the write before it has ended.
            if writing is not None:
                await asyncio.wait({writing}, timeout=_CLOSE_DEADLINE_S)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the lease ended")
        finally:
            lease.ended.set()

    async def _replies(self, requests: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """An answer to every message. An error is an answer too: the session's owner decides what it means."""
        messages = aiter(requests)
        try:
            async with self._open_session(decode(await anext(messages))) as handle:
                yield encode({"opened": True})
                async for data in messages:
                    async with aclosing(self._answer(handle, data)) as parts:
                        async for part in parts:
                            yield encode(part)
        except StopAsyncIteration:
            return
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:  # the session could not be opened: the far side is told why
            yield encode(_failed(error))

    async def _answer(self, handle: Handler, data: bytes) -> AsyncGenerator[Message, None]:
        """Signs of life as long as the replica is well, then the answer or the error there was."""
        answering: asyncio.Future[Message] | None = None
        try:
            answering = asyncio.ensure_future(handle(decode(data)))
            while not (await asyncio.wait({answering}, timeout=_SIGN_OF_LIFE_S))[0]:
                self._check()
                yield _AT_WORK
            yield answering.result()
        except Exception as error:  # sent to the far side, which raises it
            yield _failed(error)
        finally:
            if answering is not None:
                answering.cancel()
                await asyncio.wait({answering})


def _failed(error: Exception) -> Message:
    """The message of an error; one that is no part of the protocol is logged where it happened."""
    if not is_expected(error):
        logger.error("a session failed", exc_info=error)
    return error_message(error)


class Stream:
    """The caller's side of an open session."""

    def __init__(self, call: grpc.aio.StreamStreamCall[bytes, bytes], numerics: str) -> None:
        self.numerics = numerics  # of the replica
        self._call = call

    async def ask(self, message: Message, timeout_s: float) -> Message:
        """Send one message and wait for its answer, as long as the peer shows that it is at work.

        Raises `PeerGone` when the peer is lost or shows no sign of life for `timeout_s` seconds, and whatever
        error the peer answers with.
        """
        await self._in_time(self._call.write(encode(message)), timeout_s)
        while True:
            data = await self._in_time(self._call.read(), timeout_s)
            if not isinstance(data, bytes):
                raise PeerGone("the peer ended the session")
            if not (answer := decode(data)).keys() >= _AT_WORK.keys():
                return answer

    async def _in_time(self, operation: Awaitable[T], timeout_s: float) -> T:
        try:
            async with asyncio.timeout(timeout_s):
                return await operation
        except TimeoutError as error:
            self._call.cancel()
            raise PeerGone(f"no sign of life for {timeout_s:g} s") from error
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise PeerGone(f"the peer is gone: {type(error).__name__}") from error

    async def close(self) -> None:
        """Say goodbye, which frees the far side's state and ends the lease."""
        if self._call.done():
            return
        try:
            async with asyncio.timeout(_CLOSE_DEADLINE_S):
                await self._call.done_writing()
                while await self._call.read() is not grpc.aio.EOF:
                    pass
        except (TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError):
            # Callers shield this, so a cancellation seen here is the call's own.
            self._call.cancel()


class ChannelPool:
    """One gRPC channel per endpoint, shared by its sessions and closed after the last of them."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._sessions: Counter[str] = Counter()

    @asynccontextmanager
    async def _channel(self, endpoint: str) -> AsyncIterator[grpc.aio.Channel]:
        if endpoint not in self._channels:
            self._channels[endpoint] = grpc.aio.insecure_channel(endpoint, options=_OPTIONS)
        self._sessions[endpoint] += 1
        try:
            yield self._channels[endpoint]
        finally:
            self._sessions[endpoint] -= 1
            if not self._sessions[endpoint]:
                del self._sessions[endpoint]
                await self._channels.pop(endpoint).close()

    @asynccontextmanager
    async def session(
        self, handle: DeploymentHandle[Any], hello: Message, timeout_s: float
    ) -> AsyncIterator[Stream]:
        """Lease a replica and open a session on it; both are freed when the block ends.

        Raises `PeerBusy` when no replica has room within `timeout_s` seconds or the deployment's queue is full,
        `PeerGone` when the replica is lost, and whatever error it opens with.
        """
        lease: Any = handle.options(stream=True).lease.remote()
        try:
            granted = await self._grant(lease, timeout_s)
            async with self._channel(granted["endpoint"]) as channel:
                metadata = ((_SECRET, granted["secret"]),)
                stream = Stream(channel.stream_stream(_METHOD)(metadata=metadata), granted.get("numerics", ""))
                try:
                    await stream.ask(hello, timeout_s)
                    yield stream
                finally:
                    await asyncio.shield(stream.close())
        finally:
            # Raises the lease's own error when it was never granted; the body has reported that already.
            with contextlib.suppress(RayError, RayServeException):
                lease.cancel()

    async def _grant(self, lease: Any, timeout_s: float) -> Message:
        try:
            # Not `wait_for`: in Python 3.11 it loses a cancellation that coincides with the result.
            async with asyncio.timeout(timeout_s):
                granted: Message = await anext(lease)
        except TimeoutError as error:
            raise PeerBusy(f"no replica was free within {timeout_s:g} s") from error
        except BackPressureError as error:
            raise PeerBusy("the queue for replicas is full") from error
        except (RayError, RayServeException, StopAsyncIteration) as error:
            raise PeerGone(f"no replica can be leased: {type(error).__name__}") from error
        return granted
