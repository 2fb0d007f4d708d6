"""The closed set of error codes: every problem+json answer and every failed job carries one of them."""

from enum import StrEnum


class ErrorCode(StrEnum):
    """A stable, documented code with its HTTP status and a summary (the title of its problem)."""

    status: int
    summary: str

    def __new__(cls, value: str, status: int, summary: str) -> "ErrorCode":
        member = str.__new__(cls, value)
        member._value_ = value
        member.status = status
        member.summary = summary
        return member

    # The request
    INVALID_JSON = "invalid_json", 400, "The body is not valid JSON"
    INVALID_MULTIPART = "invalid_multipart", 400, "The body is not valid multipart form data"
    MALFORMED_HTTP = "malformed_http", 400, "This is not HTTP"
    UNAUTHORIZED = "unauthorized", 401, "An API key is required"
    FORBIDDEN = "forbidden", 403, "The API key may not do this"
    URL_INVALID = "url_invalid", 403, "The signature of the URL is not valid"
    URL_EXPIRED = "url_expired", 403, "The URL has expired"
    NOT_FOUND = "not_found", 404, "There is nothing at this address"
    JOB_NOT_FOUND = "job_not_found", 404, "There is no such job"
    MODEL_NOT_FOUND = "model_not_found", 404, "There is no such model"
    IMAGE_NOT_FOUND = "image_not_found", 404, "There is no such image"
    METHOD_NOT_ALLOWED = "method_not_allowed", 405, "This address does not take this method"
    REQUEST_TIMEOUT = "request_timeout", 408, "The request did not come whole in time"
    IDEMPOTENCY_CONFLICT = "idempotency_conflict", 409, "A request with this Idempotency-Key is in progress"
    JOB_NOT_ENDED = "job_not_ended", 409, "The job has not ended"
    JOB_ENDED = "job_ended", 409, "The job has already ended"
    BODY_TOO_LARGE = "body_too_large", 413, "The body is too large"
    URL_TOO_LONG = "url_too_long", 414, "The URL is too long"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type", 415, "The content type is not supported"
    RANGE_NOT_SATISFIABLE = "range_not_satisfiable", 416, "The file has no such bytes"
    VALIDATION_FAILED = "validation_failed", 422, "The request is not valid"
    IMAGE_INVALID = "image_invalid", 422, "A picture cannot be read"
    IMAGE_TOO_LARGE = "image_too_large", 422, "A picture has too many pixels"
    IDEMPOTENCY_MISMATCH = "idempotency_mismatch", 422, "The Idempotency-Key was used with another body"
    RATE_LIMITED = "rate_limited", 429, "Too many requests"
    UPLOADS_BUSY = "uploads_busy", 429, "Too many large bodies are on their way"
    QUEUE_FULL = "queue_full", 429, "The queue is full"
    HEADERS_TOO_LARGE = "headers_too_large", 431, "The headers are too large"
    INTERNAL = "internal", 500, "Something went wrong on our side"
    BROKER_UNAVAILABLE = "broker_unavailable", 503, "The queue cannot be reached"
    STORE_UNAVAILABLE = "store_unavailable", 503, "The picture store cannot be reached"
    # The job
    INPUT_MISSING = "input_missing", 500, "An input picture of the job is gone"
    EXPIRED = "expired", 504, "The job waited past its deadline"
    DEADLINE_EXCEEDED = "deadline_exceeded", 504, "The job ran past its deadline"
    OUT_OF_MEMORY = "out_of_memory", 507, "The job does not fit into the worker's memory"
    WORKER_LOST = "worker_lost", 500, "Workers died again and again while running the job"
    SPEC_UNSUPPORTED = "spec_unsupported", 500, "The worker cannot read the job"
