"""What one gateway process holds while it runs: built by the app's lifespan, reached through the request."""

import asyncio
from typing import Self

from fastapi import Request

from broker.gateway_side import JobBroker
from broker.signing import UrlSigner
from contract.settings import Settings
from service.auth_keys import ApiKeys
from service.body import Bodies
from service.metrics import GatewayMetrics
from service.uploads import Uploads


class GatewayState:
    """One per app, inside its event loop."""

    def __init__(self, settings: Settings, broker: JobBroker, metrics: GatewayMetrics) -> None:
        self.settings = settings
        self.broker = broker
        self.metrics = metrics
        self.api_keys = ApiKeys(settings, broker.key_ring)
        self.uploads = Uploads(settings.max_side, settings.max_pixels, settings.max_picture_ratio)
        self.bodies = Bodies(settings.max_body_bytes, settings.max_held_bytes)
        self.closing = asyncio.Event()  # set when the server stops: what waits for a job then answers at once

    @classmethod
    def of(cls, request: Request) -> Self:
        state = request.app.state.gateway
        assert isinstance(state, cls)
        return state

    async def signer(self) -> UrlSigner:
        """Of pictures' URLs. May raise what Redis raises: a gateway starts even while Redis is away."""
        return await self.broker.url_signer()

    def base_url(self, request: Request) -> str:
        """What the URLs in answers begin with: the public one, else as the client reached us, proxy prefix included."""
        return (self.settings.public_url or str(request.base_url)).rstrip("/")
