"""A handle as Ray Serve's, whose deployment is an object of this process."""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from typing import Any

from ray.exceptions import RayTaskError

from deployments.one_process.pipeline import WholePipeline


class HandleHere:
    """The handle of all stages; errors come out of it as a caller of Ray gets them."""

    deployment_name = "Pipeline"

    def __init__(self, pipeline: WholePipeline, application: str) -> None:
        self.app_name = application
        self._pipeline = pipeline
        for name in ("encode", "decode", "describe", "effects", "arguments", "inspect_adapter"):
            setattr(self, name, Method(getattr(pipeline, name)))
        self.denoise = StreamingMethod(pipeline.denoise)

    def options(self, **_: Any) -> HandleHere:
        return self

    def broadcast(self, method: str, *arguments: Any) -> Broadcast:
        return Broadcast(getattr(self._pipeline, method)(*arguments))


class Method:
    """`remote` begins a call."""

    def __init__(self, function: Callable[..., Awaitable[Any]]) -> None:
        self._function = function

    def remote(self, *arguments: Any) -> asyncio.Task[Any]:
        """What it returns may be awaited more than once, and be an argument of another call."""
        task = asyncio.ensure_future(self._call(arguments))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may ask for it
        return task

    async def _call(self, arguments: tuple[Any, ...]) -> Any:
        with as_ray_tells():
            return await self._function(*[await value_of(each) for each in arguments])


class StreamingMethod:
    """`remote` begins a call that yields."""

    def __init__(self, function: Callable[..., AsyncIterator[Any]]) -> None:
        self._function = function

    def remote(self, *arguments: Any) -> Stream:
        return Stream(self._items(arguments))

    async def _items(self, arguments: tuple[Any, ...]) -> AsyncIterator[Any]:
        with as_ray_tells():
            async for item in self._function(*[await value_of(each) for each in arguments]):
                yield item


class Stream:
    """The items of a call as references."""

    def __init__(self, items: Any) -> None:
        self._items = items

    async def _to_object_ref_gen(self) -> AsyncIterator[Reference]:
        async def references() -> AsyncIterator[Reference]:
            async for item in self._items:
                yield Reference(item)

        return references()

    def cancel(self) -> None:
        """Nobody reads on. One that was waiting for an item has ended it already."""
        self._closing = asyncio.ensure_future(self._close())

    async def _close(self) -> None:
        with contextlib.suppress(RuntimeError):
            await self._items.aclose()


class Reference:
    """Awaiting it gives the value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __await__(self) -> Generator[Any, None, Any]:
        yield from asyncio.sleep(0).__await__()
        return self.value


class Broadcast:
    """What a call of every replica answers: there is one."""

    def __init__(self, call: Awaitable[Any]) -> None:
        self._call = call

    async def results_async(self, timeout_s: float | None = None) -> list[Any]:
        with as_ray_tells():
            return [await asyncio.wait_for(self._call, timeout_s)]


async def value_of(argument: Any) -> Any:
    """References and calls are awaited, as Ray does before a call begins."""
    return await argument if isinstance(argument, Reference | asyncio.Task) else argument


@contextlib.contextmanager
def as_ray_tells() -> Iterator[None]:
    """An error of the stages leaves as what Ray makes of one."""
    try:
        yield
    except (RayTaskError, TimeoutError):
        raise
    except Exception as error:
        raise RayTaskError("stage", traceback.format_exc(), error).as_instanceof_cause() from error
