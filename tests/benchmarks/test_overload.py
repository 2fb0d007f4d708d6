"""A moment of overload: the real service keeps its promises, and what breaks them would be told."""

import asyncio

from benchmarks import overload
from benchmarks.http_load import Answer

SENT_HEAD = b"http/1.1 429 too many requests\r\nretry-after: 5\r\ncontent-length: 2"


def test_every_request_is_accepted_and_ends_or_gets_a_429() -> None:
    figures = overload.measure(times=10, seconds=1.0, steps=20)
    assert figures["wrong"] == {}
    assert figures["ends"] == {"succeeded": len(figures["accepted"])}
    assert figures["accepted"]
    assert figures["refusals"] == {"queue_full": len(figures["refused"])}
    assert figures["refused"]
    assert all(min(samples) > 0 for samples in figures["memory"].values())
    text = overload.as_table(figures)
    assert f"| of these ended as | {len(figures['accepted'])} succeeded |" in text
    assert "| anything else | 0 |" in text


def test_answers_are_told_apart() -> None:
    answers = overload.Answers()
    answers.add(Answer(202, b"", b'{"id": "a"}', 9.0), 0.1)
    answers.add(Answer(429, SENT_HEAD, b'{"code": "queue_full"}', 9.0), 0.2)
    answers.add(Answer(429, b"http/1.1 429 too many requests", b"{}", 9.0), 0.3)  # without Retry-After
    answers.add(Answer(500, b"", b"oh", 9.0), 0.4)
    assert (answers.accepted, answers.jobs) == ([0.1], ["a"])
    assert (answers.refused, dict(answers.codes)) == ([0.2], {"queue_full": 1})
    assert sorted(answers.wrong) == ["429 b'{}'", "500 b'oh'"]


async def test_a_service_that_hangs_up_is_not_taken_for_one_that_refuses() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    load = overload.Load(f"http://{host}:{port}", b"GET / HTTP/1.1\r\n\r\n")
    answers = await load.at_rate(100.0, 0.05)
    server.close()
    assert sum(answers.wrong.values()) == 5
    assert answers.accepted == answers.refused == []


async def test_latency_counts_from_when_a_request_was_due() -> None:
    """A service that stops for a moment delays those that were due meanwhile, and they say so."""

    async def answer_late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await going_on.wait()
        writer.write(b"HTTP/1.1 202 Accepted\r\nContent-Length: 11\r\n\r\n" + b'{"id": "a"}')
        await writer.drain()
        writer.close()

    going_on = asyncio.Event()
    server = await asyncio.start_server(answer_late, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    load = overload.Load(f"http://{host}:{port}", b"GET / HTTP/1.1\r\n\r\n")
    sending = asyncio.create_task(load.at_rate(1000.0, 0.02))
    await asyncio.sleep(0.2)
    going_on.set()
    answers = await sending
    load.close()
    server.close()
    assert len(answers.accepted) == 20
    assert min(answers.accepted) >= 0.15
    assert load.connections == 20
