"""The bare framework beside the gateway: FastAPI under the same server with the same checks, and nothing behind it.

Run by `benchmarks.gateway` as a process of its own. It has two addresses: one takes all parameters that the gateway
takes, the other the body alone. Both build the same job and answer with the same document; there is no queue, and
nothing of what stands around a request: no log, no figures, no limits, no key check.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Annotated, Final

import uvicorn
from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from contract.card import ModelCard
from contract.settings import Settings
from contract.spec import JobStatus, Task
from service.jobs_view import JobView, ProgressView, UrlsView, rfc3339
from service.normalise import build_spec, check_limits, choose_model
from service.schemas import TextToImage

ALL_PARAMETERS: Final = "/v1/txt2img"
BODY_ALONE: Final = "/body-alone"
_NOT_SHOWN: Final = {
    "version", "id", "task", "inputs", "created_at", "api_key_id", "noise_level", "request_id", "strength",
}  # fmt: skip


def create_app(card: ModelCard) -> FastAPI:
    app, settings = FastAPI(), Settings()
    bearer, header = HTTPBearer(auto_error=False), APIKeyHeader(name="X-API-Key", auto_error=False)

    def answer(asked: TextToImage, request: Request, response: Response) -> JobView:
        chosen = choose_model([card], Task.TXT2IMG, asked)
        check_limits(Task.TXT2IMG, asked, chosen, settings)
        spec = build_spec(Task.TXT2IMG, asked, {}, chosen, None, time.time())
        here = f"{str(request.base_url).rstrip('/')}/v1/jobs/{spec.id}"
        response.headers["Location"] = here
        return JobView(
            id=spec.id,
            task=spec.task,
            model=spec.model,
            status=JobStatus.QUEUED,
            created_at=rfc3339(spec.created_at),
            queue_position=0,
            progress=ProgressView(step=0, steps=spec.steps),
            request=spec.model_dump(mode="json", exclude=_NOT_SHOWN),
            warnings=[],
            images=[],
            urls=UrlsView(self=here, events=f"{here}/events", cancel=f"{here}/cancel"),
        )

    @app.post(ALL_PARAMETERS, status_code=202)
    async def all_parameters(
        asked: TextToImage,
        request: Request,
        response: Response,
        by_bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
        by_header: Annotated[str | None, Depends(header)],
        idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
        prefer: Annotated[Sequence[str], Header()] = (),
        cancel_on_disconnect: bool = False,
    ) -> JobView:
        del by_bearer, by_header, idempotency_key, prefer, cancel_on_disconnect
        return answer(asked, request, response)

    @app.post(BODY_ALONE, status_code=202)
    async def body_alone(asked: TextToImage, request: Request, response: Response) -> JobView:
        return answer(asked, request, response)

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--card", required=True, help="the model's card as JSON")
    options = parser.parse_args()
    app = create_app(ModelCard.model_validate_json(options.card))
    uvicorn.run(app, port=options.port, loop="uvloop", http="httptools", access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
