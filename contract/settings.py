"""Every setting, read from the environment (prefix DARKROOM_) by whoever starts a process, and passed on from there."""

import re
from ipaddress import ip_network
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from contract.log import LogFormat
from contract.redis_url import parse_redis_url

Secrets = Annotated[tuple[SecretStr, ...], NoDecode]
Texts = Annotated[tuple[str, ...], NoDecode]
_SIGNING_KEY_CHARS = 16


class Settings(BaseSettings):
    """Durations in seconds, sizes in bytes or pixels. Lists are comma-separated in the environment."""

    model_config = SettingsConfigDict(env_prefix="DARKROOM_", frozen=True, extra="forbid", hide_input_in_errors=True)

    # Where things are
    redis_url: str = Field(
        default="redis://127.0.0.1:6379/0",
        description="Redis or Valkey that holds queues and jobs; rediss:// with TLS, "
        "redis+sentinel://HOST:26379,HOST:26379/SERVICE to follow a primary",
    )
    store_url: str = Field(
        default="file:./darkroom-store",
        description="picture store: file:PATH, memory:, s3://bucket/prefix, gs:// or az://",
    )
    store_public_endpoint: str | None = Field(
        default=None,
        description="cloud stores: endpoint in the signed URLs, where clients use another than we do; "
        "S3: https://{bucket}.host puts the bucket into the host",
    )
    store_timeout_seconds: float = Field(
        default=10.0, gt=0, description="cloud stores: a request that is silent for so long has failed"
    )
    host: str = Field(default="127.0.0.1", description="address on which the gateway listens")
    port: int = Field(default=8000, ge=0, le=65535, description="port on which the gateway listens; 0 takes a free one")
    public_url: str | None = Field(
        default=None,
        description="base of the URLs given to clients, proxy prefix included; default: the request's",
    )

    trusted_proxies: Texts = Field(
        default=(),
        description="addresses or networks of proxies whose X-Forwarded-For and X-Forwarded-Proto are believed",
    )
    cors_origins: Texts = Field(
        default=(), description="origins (https://host) whose pages may call from a browser, or *; none: no other"
    )

    # Who may call
    api_keys: Secrets = Field(
        default=(),
        description="accepted API keys beside those of `darkroom keys`, comma-separated; they submit and read",
    )
    allow_anonymous: bool | None = Field(
        default=None,
        description="serve callers without a key as long as no key was ever made; default: only on a loopback address "
        "without a proxy",
    )
    signing_keys: Secrets = Field(
        default=(),
        description="keys that sign picture URLs: the first signs, all verify; none: one is kept in Redis",
    )
    signed_url_seconds: int = Field(default=3600, ge=1, le=3600, description="life of a signed picture URL")
    log_prompts: bool = Field(default=False, description="write prompts into the log")
    log_format: LogFormat = Field(default="auto", description="json, text, or auto: text on a terminal, else json")

    # Limits on a request
    max_body_bytes: int = Field(default=20 * 2**20, ge=1024, description="largest request body")
    max_held_bytes: int = Field(
        default=256 * 2**20,
        ge=1024,
        description="request bodies that a gateway holds at once, half of it for one API key; beyond it large ones "
        "get a 429; at least twice DARKROOM_MAX_BODY_BYTES",
    )
    max_pixels: int = Field(default=2048 * 2048, ge=64, description="largest width times height of any picture")
    max_side: int = Field(default=4096, ge=8, le=16384, description="longest side of any picture")
    max_picture_ratio: float = Field(
        default=64.0, ge=1, description="longer side of a picture that is sent, over its shorter side"
    )
    max_steps: int = Field(default=150, ge=1, le=1000, description="most denoising steps of a job")
    max_pictures: int = Field(default=8, ge=1, le=64, description="most pictures of a job (n)")
    max_prompt_chars: int = Field(default=4000, ge=1, description="longest prompt and negative prompt, in characters")
    max_wait_seconds: float = Field(default=60.0, gt=0, description="longest Prefer: wait that is honoured")

    # Limits on the queues
    max_queue_depth: int = Field(default=1000, ge=1, description="jobs that may wait in one queue")
    max_waiting_per_key: int = Field(default=500, ge=1, description="unfinished jobs of one API key for one model")
    max_running_per_key: int | None = Field(
        default=None, ge=1, description="jobs of one API key in workers at once; its others wait; default: any number"
    )
    rate_per_second: float = Field(default=50.0, gt=0, description="sustained submits per second of one API key")
    rate_burst: int = Field(default=200, ge=1, description="submits of one API key at once")
    queue_deadline_seconds: float = Field(default=86400.0, gt=0, description="longest wait in a queue")
    idempotency_seconds: int = Field(default=86400, ge=1, description="how long an Idempotency-Key is remembered")

    # Workers
    lease_seconds: float = Field(default=6.0, gt=0, description="a job whose worker is silent so long goes back")
    heartbeat_seconds: float = Field(default=1.5, gt=0, description="how often a worker renews its leases")
    reap_seconds: float = Field(default=0.5, gt=0, description="how often lapsed leases are looked for")
    max_abandonments: int = Field(
        default=5, ge=1, description="a job that more workers died with, without progress, fails"
    )
    max_resume_bytes: int = Field(
        default=32 * 2**20,
        ge=0,
        description="resume states kept per job; a job whose states are larger begins again",
    )
    drain_seconds: float = Field(default=8.0, ge=0, description="how long a stopping worker finishes what it has begun")
    store_patience_seconds: float = Field(
        default=120.0, ge=0, description="how long a worker waits for a store that is away before it fails the job"
    )
    resume_seconds: float = Field(
        default=3.0, gt=0, description="how often the state of half-done pictures is saved, to go on from after a crash"
    )
    batching: Literal["exact", "fast"] = Field(
        default="exact", description="exact: a seed gives the same picture in any company; fast: what is fastest"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="numbers that models compute with; auto: as calibrated for model and device"
    )
    worker_slots: int = Field(default=8, ge=1, le=256, description="pictures that share one forward pass at most")
    worker_threads: int | None = Field(
        default=None, ge=1, description="CPU threads, rounded down to a power of two; default: the cores it may use"
    )
    worker_metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="port of /metrics and /healthz for a supervisor's workers; 0 takes a free one; default: none",
    )

    # What is kept, counted from the job's end
    retention_seconds: int = Field(default=7 * 86400, ge=1, description="life of an ended job, its result and pictures")
    inputs_retention_seconds: int = Field(default=3600, ge=0, description="life of an ended job's input pictures")
    store_quota_bytes: int | None = Field(
        default=None, ge=1, description="local store: beyond this the oldest ended jobs go before their time"
    )
    events_retention_seconds: int = Field(default=3600, ge=1, description="life of an ended job's events")
    janitor_seconds: float = Field(default=30.0, gt=0, description="how often expired things are looked for")

    @field_validator("redis_url")
    @classmethod
    def _is_redis_url(cls, url: str) -> str:
        parse_redis_url(url)  # raises ValueError, whose text says what is expected
        return url

    @field_validator("max_held_bytes")
    @classmethod
    def _holds_a_body(cls, held: int, info: ValidationInfo) -> int:
        least = 2 * info.data.get("max_body_bytes", 0)
        if held < least:
            raise ValueError(
                f"is {held:,}; expected at least {least:,}, twice DARKROOM_MAX_BODY_BYTES: one API key holds half "
                "of it at most, and its largest body would always get a 429"
            )
        return held

    @field_validator("signing_keys")
    @classmethod
    def _are_long(cls, secrets: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if any(len(secret.get_secret_value()) < _SIGNING_KEY_CHARS for secret in secrets):
            raise ValueError(f"a key is too short; expected at least {_SIGNING_KEY_CHARS} characters drawn at random")
        return secrets

    @field_validator("public_url")
    @classmethod
    def _is_base(cls, url: str | None) -> str | None:
        if url is not None and not re.fullmatch(r"https?://[^/?#@\s]+(/[^?#\s]*)?", url):
            raise ValueError(f"{url!r} is no base of URLs; expected https://host or https://host/prefix")
        return url

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/?#@\s]+", origin):
                raise ValueError(f"{origin!r} is no origin; expected https://host or https://host:port, or *")
        return origins

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for network in networks:
            ip_network(network)  # raises ValueError, whose text says what is wrong
        return networks

    @field_validator("api_keys", "cors_origins", "signing_keys", "trusted_proxies", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value
