"""`python -m tests.load.ceiling`: the most that a receiver could reach here, to be the `--peer` of a comparison.

The same uvicorn as `serve` runs it, the same signature check, the same parser, an answer of the same shape; no
Redis, no Postgres, no log line. What a receiver loses against it is what its guarantee costs.
"""

import argparse
import socket
import time

import orjson
import uvicorn
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from firstclaim.event import parse_event
from firstclaim.server.runner import server_config
from firstclaim.settings import Settings
from firstclaim.web.signature import verify
from firstclaim.web.webhook import WEBHOOK_PATH


def application(settings: Settings) -> Starlette:
    """Verifies, parses, answers."""
    known = [secret.get_secret_value() for secret in settings.stripe_webhook_secrets]

    async def receive(request: Request) -> Response:
        body = await request.body()
        headers = request.headers.getlist("stripe-signature")
        verify(body, headers, known, tolerance_seconds=settings.signature_tolerance_seconds, now=time.time())
        content = {"event_id": parse_event(body).id, "processed": True, "action": "verified", "reason": None}
        return Response(orjson.dumps(content), media_type="application/json")

    return Starlette(routes=[Route(WEBHOOK_PATH, receive, methods=["POST"])])


def main() -> None:
    """Serve until interrupted; says where."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.ceiling", description=__doc__)
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--secret", default="whsec_test")
    asked = parser.parse_args()
    settings = Settings(stripe_webhook_secrets=(SecretStr(asked.secret),))
    with socket.create_server(("127.0.0.1", asked.port), backlog=2048) as listener:
        print(f"POST http://127.0.0.1:{listener.getsockname()[1]}{WEBHOOK_PATH}", flush=True)
        uvicorn.Server(server_config(lambda: application(settings), settings)).run(sockets=[listener])


if __name__ == "__main__":
    main()
