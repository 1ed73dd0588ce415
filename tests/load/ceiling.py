"""`python -m tests.load.ceiling`: an endpoint that only verifies and parses, to be the `--peer` of a comparison.

Starlette on the uvicorn of `serve`, an answer of the same shape; no Redis, no Postgres, no log line. By default with
the signature check and the parser of the service: what a receiver loses against it is what its guarantee costs. With
`--stripe`, as an application would write it: on uvicorn's own HTTP, with the signature check of stripe-python and
`json.loads` (and not with its `construct_event`, which also makes objects of the whole event, and takes far longer).
"""

import argparse
import json
import socket
import time

import orjson
import stripe
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


def application(settings: Settings, *, with_stripe: bool = False) -> Starlette:
    """Verifies, parses, answers."""
    known = [secret.get_secret_value() for secret in settings.stripe_webhook_secrets]

    def verified_id(request: Request, body: bytes) -> str:
        if with_stripe:
            header, tolerance = request.headers["stripe-signature"], settings.signature_tolerance_seconds
            stripe.WebhookSignature.verify_header(body.decode(), header, known[0], tolerance)
            return str(json.loads(body)["id"])
        headers = request.headers.getlist("stripe-signature")
        verify(body, headers, known, tolerance_seconds=settings.signature_tolerance_seconds, now=time.time())
        return parse_event(body).id

    async def receive(request: Request) -> Response:
        event_id = verified_id(request, await request.body())
        content = {"event_id": event_id, "processed": True, "action": "verified", "reason": None}
        return Response(orjson.dumps(content), media_type="application/json")

    return Starlette(routes=[Route(WEBHOOK_PATH, receive, methods=["POST"])])


def main() -> None:
    """Serve until interrupted; says where."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.ceiling", description=__doc__)
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--secret", default="whsec_test")
    parser.add_argument("--stripe", action="store_true", help="with the check of stripe-python, on uvicorn's own HTTP")
    asked = parser.parse_args()
    settings = Settings(stripe_webhook_secrets=(SecretStr(asked.secret),))
    with socket.create_server(("127.0.0.1", asked.port), backlog=2048) as listener:
        print(f"POST http://127.0.0.1:{listener.getsockname()[1]}{WEBHOOK_PATH}", flush=True)
        config = server_config(lambda: application(settings, with_stripe=asked.stripe), settings)
        if asked.stripe:
            config.http = "httptools"
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
