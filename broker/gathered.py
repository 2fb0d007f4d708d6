"""One script, called by many at once: calls of the same moment share one round trip."""

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import NoScriptError
from redis.typing import EncodableT

_MOST: Final = 128  # calls of one round trip: bounds what a lost answer repeats

Call = tuple[Sequence[EncodableT], Sequence[EncodableT], "asyncio.Future[Any]"]


class GatheredScript:
    """Behaves like redis-py's registered script. What is called in one turn of the event loop goes out in one pipeline,
    at the end of that turn: nobody waits for company, and each call stays a step of its own in Redis.

    A pipeline whose answer got lost is sent again as a whole, so the script must bear being run twice.
    """

    def __init__(self, connection: Redis, script: str) -> None:
        self._redis = connection
        self._script = connection.register_script(script)
        self._calls: list[Call] = []
        self._sending: set[asyncio.Task[None]] = set()

    async def __call__(self, keys: Sequence[EncodableT], args: Sequence[EncodableT]) -> Any:
        """Raises what redis raises, for this call alone where the script itself failed."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls.append((keys, args, answer))
        if len(self._calls) == 1:
            sending = asyncio.create_task(self._send(), name="darkroom-gathered")
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)
        return await answer

    async def _send(self) -> None:
        while self._calls:
            calls, self._calls = self._calls[:_MOST], self._calls[_MOST:]
            try:
                answers = await self._answers(calls)
            except BaseException as error:
                for _, _, answer in calls:
                    if not answer.done():  # else its caller has left
                        answer.set_exception(error)
                if not isinstance(error, Exception):
                    raise
            else:
                for (_, _, waiting), result in zip(calls, answers, strict=True):
                    if waiting.done():
                        continue
                    if isinstance(result, Exception):
                        waiting.set_exception(result)
                    else:
                        waiting.set_result(result)

    async def _answers(self, calls: Sequence[Call]) -> list[Any]:
        answers = await self._execute(calls)
        unknown = [index for index, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if unknown:  # a Redis that was started anew
            await self._redis.script_load(self._script.script)
            for index, answer in zip(unknown, await self._execute([calls[index] for index in unknown]), strict=True):
                answers[index] = answer
        return answers

    async def _execute(self, calls: Sequence[Call]) -> list[Any]:
        pipeline = self._redis.pipeline(transaction=False)
        for keys, args, _ in calls:
            pipeline.evalsha(self._script.sha, len(keys), *keys, *args)
        return await pipeline.execute(raise_on_error=False)
