"""The shop's application: pages of its own, and Stripe's endpoint below /payments."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

import firstclaim

webhooks = firstclaim.asgi()


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Run firstclaim's lifespan: FastAPI does not run that of a mounted application."""
    async with webhooks.lifespan():
        yield


app = FastAPI(lifespan=lifespan)
app.mount("/payments", webhooks)


@app.get("/")
def home() -> dict[str, str]:
    """The shop's own page."""
    return {"shop": "open"}
