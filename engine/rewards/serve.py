"""Serves a reward over HTTP:  python -m latent_critic.engine.rewards.serve --reward pickscore --port 8000"""

import argparse
import functools
import ipaddress
import json
import os
import signal
import socket
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from PIL import Image

from .. import launch
from ..errors import UserError
from .local import build_here
from .protocol import Reward
from .wire import TOKEN_VARIABLE, Limits

if TYPE_CHECKING:
    import uvicorn

GRACE = 30  # seconds that requests have to end after SIGTERM


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m latent_critic.engine.rewards.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--reward", required=True, metavar="NAME", help="a built-in reward, or module:function")
    parser.add_argument("--params", default="{}", metavar="JSON", help="keyword arguments of the reward")
    parser.add_argument("--device", default="cpu", help="of the reward's model: cpu (default), cuda or cuda:1")
    parser.add_argument("--batch-size", type=_positive(int), help="pictures of one call (default: all of a request)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine)")
    parser.add_argument("--port", type=int, default=8000, help="0 is any that is free (default: %(default)s)")
    parser.add_argument(
        "--token-env",
        metavar="NAME",
        help="variable of the environment with the token that clients must send; needed to listen beyond this machine "
        f"(default: {TOKEN_VARIABLE}, if it is set)",
    )
    limits = parser.add_argument_group("limits")
    for flag, kind, default, what in (
        ("--max-body-mb", float, 64, "MB of a request"),
        ("--max-images", int, 256, "pictures of a request"),
        ("--max-megapixels", float, 64, "million pixels of a request's pictures together"),
        ("--max-queue", int, 64, "requests at a time; further ones are told to come again"),
        ("--patience", float, 30, "seconds in which a client must send its request"),
    ):
        limits.add_argument(
            flag, type=_positive(kind), default=default, metavar="N", help=f"{what} (default: %(default)s)"
        )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    launch.quiet()
    with launch.user_errors():
        server, listener = prepare(args)
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn ends by them, and then hands them on to these
        signal.signal(number, lambda *_: None)
    server.run(sockets=[listener])
    os._exit(0)  # a reward that hangs is not waited for


def prepare(args: argparse.Namespace) -> tuple["uvicorn.Server", socket.socket]:
    """The server and the socket that it will listen at. UserError for whatever cannot be served."""
    params, token = _params(args.params), _token(args.token_env)
    limits = Limits(int(args.max_body_mb * 1e6), args.max_images, int(args.max_megapixels * 1e6))
    listener = bind(args.host, args.port, token)
    try:
        reward = replace(build_here(args.reward, params, args.device), batch_size=args.batch_size)
        return make_server(reward, limits, args.max_queue, args.patience, token), listener
    except UserError:
        listener.close()
        raise


def make_server(reward: Reward, limits: Limits, queue: int, patience: float, token: str | None) -> "uvicorn.Server":
    """What they mean: `service.Service`. UserError where a package is missing."""
    try:
        import uvicorn

        from .service import PatientProtocol, Service
    except ImportError as error:
        raise UserError(f"a reward server needs packages ({error}): pip install 'latent-critic[rewards]'") from None

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket]) -> None:
            await super().startup(sockets)
            print(f"reward {reward.name!r} is served at {_url(sockets[0])}", flush=True)

    # Pictures are measured before they are decoded, by a limit of our own.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    config = uvicorn.Config(
        Service(reward, limits, queue, patience, token).app,
        http=functools.partial(PatientProtocol, patience=patience),
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE,
    )
    return Server(config)


def _params(text: str) -> dict[str, Any]:
    try:
        params = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--params {text!r}: not JSON: {error}") from None
    if not isinstance(params, dict):
        raise UserError(f'--params {text!r}: expected an object, as in {{"threads": 2}}')
    return params


def _token(variable: str | None) -> str | None:
    token = os.environ.get(variable or TOKEN_VARIABLE)
    if variable and not token:
        raise UserError(f"--token-env {variable}: that variable of the environment is not set")
    return token


def bind(host: str, port: int, token: str | None) -> socket.socket:
    """Not yet listening: who connects before the model is there is refused, and comes again."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port {port}: must be from 0 to {2**16 - 1}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"--host {host}: no such address ({error.strerror})") from None
    if not token and not ipaddress.ip_address(address[0]).is_loopback:
        raise UserError(
            f"--host {host} lets other machines in: set a token, in {TOKEN_VARIABLE} or what --token-env names, or "
            "listen at 127.0.0.1 and let them come by an SSH tunnel"
        )
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that was killed is started again at once
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UserError(f"--host {host} --port {port}: cannot listen there ({error.strerror})") from None
    return listener


def _url(listener: socket.socket) -> str:
    host, port, *_ = listener.getsockname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _positive(kind: type) -> Any:
    def number(text: str) -> int | float:
        found = kind(text)
        if not found > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return found

    number.__name__ = kind.__name__  # in argparse's message about what is no number at all
    return number


if __name__ == "__main__":
    main()
