"""The reward server's application: who may ask, how much at once, and one thread that scores."""

import asyncio
import hmac
import logging
import math
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import UserError
from . import wire
from .checks import judge
from .protocol import Reward, RewardError
from .wire import Limits, Refused

log = logging.getLogger(__name__)


class Service:
    """One reward behind HTTP, as `wire` describes it.

    A model is called by one thread, since few of them may be called by two. At most `queue` requests are held at a time
    (more are told to come again), and the pictures of two of them are decoded: one is scored, one waits for its turn.
    """

    def __init__(self, reward: Reward, limits: Limits, queue: int, patience: float, token: str | None):
        """patience: seconds in which a client must send its request. token: what clients must know, if anything."""
        self._reward, self._limits, self._free, self._patience = reward, limits, queue, patience
        self._token = token and f"Bearer {token}".encode()
        self._scoring = ThreadPoolExecutor(1, "scoring")
        self._decoded = asyncio.Semaphore(2)
        self.app = Starlette(
            routes=[
                Route("/health", self._health, methods=["GET"]),
                Route("/check", self._check, methods=["POST"]),
                Route("/score", self._score, methods=["POST"]),
            ],
            exception_handlers={Refused: _refuse, HTTPException: _refuse_http, ClientDisconnect: _forget},
        )

    async def _health(self, request: Request) -> Response:
        low, high = (bound if math.isfinite(bound) else None for bound in self._reward.value_range)
        return JSONResponse({"reward": self._reward.name, "value_range": [low, high]})

    async def _check(self, request: Request) -> Response:
        async with self._admitted(request) as body:
            await self._in_turn(self._reward.check_prompts, *wire.unpack_prompts(body))
        return JSONResponse({})

    async def _score(self, request: Request) -> Response:
        async with self._admitted(request) as body, self._decoded:
            if await request.is_disconnected():
                raise ClientDisconnect  # it has given up: nobody waits for these scores
            asked = await asyncio.to_thread(wire.unpack, body, self._limits)
            scores = await self._in_turn(judge, self._reward, *asked)
        return JSONResponse(wire.answer(scores))

    @asynccontextmanager
    async def _admitted(self, request: Request) -> AsyncIterator[bytearray]:
        """The body of a request that has the token, while a place in the queue is held for it."""
        given = request.headers.get("authorization", "").encode()
        if self._token and not hmac.compare_digest(given, self._token):
            message = f"wrong or missing token; clients take it from the variable {wire.TOKEN_VARIABLE}"
            raise Refused(401, message, {"WWW-Authenticate": "Bearer"})
        # A browser asks before it sends this type to another site: no page can use a server of the user's own machine.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "the body must be of the type application/json")
        if not self._free:
            raise Refused(503, "too many requests at once", {"Retry-After": "1"})
        self._free -= 1
        try:
            yield await self._body(request)
        finally:
            self._free += 1

    async def _body(self, request: Request) -> bytearray:
        """What of a body that is too large comes after this is thrown away by uvicorn as it arrives."""
        too_large = Refused(413, f"the body has more than {self._limits.body} bytes: send fewer pictures at a time")
        if int(request.headers.get("content-length", "0")) > self._limits.body:  # h11 has checked that it is a number
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._patience):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self._limits.body:
                        raise too_large
        except TimeoutError:
            message = f"the body did not come within {self._patience:g} s"
            raise Refused(408, message, {"Connection": "close"}) from None
        return body

    async def _in_turn(self, call: Callable, *arguments: Any) -> Any:
        """What the reward's own thread returns. Its complaint about a request is 422, its failure 500."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._scoring, call, *arguments)
        except RewardError as error:
            log.error("%s", error)
            raise Refused(500, str(error)) from error
        except UserError as error:
            raise Refused(422, str(error)) from error


class PatientProtocol(H11Protocol):
    """uvicorn's, but it closes connections whose next request takes longer than `patience` seconds to begin.

    uvicorn waits for a request's head, and for the rest of a body that was refused, as long as something arrives now
    and then: so few clients could hold all connections.
    """

    def __init__(self, *arguments: Any, patience: float, **options: Any):
        super().__init__(*arguments, **options)
        self._patience, self._seen = patience, None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._look_later()

    def connection_lost(self, error: Exception | None) -> None:
        self._next_look.cancel()
        super().connection_lost(error)

    def _look_later(self) -> None:
        self._next_look = self.loop.call_later(self._patience, self._look)

    def _look(self) -> None:
        is_between = self.cycle is None or self.cycle.response_complete
        if is_between and self.cycle is self._seen:  # as it was at the last look
            self.transport.abort()
        else:
            self._seen = self.cycle
            self._look_later()


async def _refuse(request: Request, refused: Refused) -> Response:
    return JSONResponse({"error": refused.message}, refused.status, refused.headers)


async def _refuse_http(request: Request, error: HTTPException) -> Response:
    """Of a path or a method that is not served."""
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _forget(request: Request, error: ClientDisconnect) -> Response:
    """Who asked is gone, and nobody will read this."""
    return Response(status_code=400)
