"""The process of `here`: the application with the stages of one model in it, on a socket."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import uvicorn
from pydantic import ValidationError

from deployments.errors import TriptychError
from env_config.command_line import set_variables
from env_config.library_caches import check_cache_root, set_allocator_settings, set_library_caches
from env_config.secret import SecretError
from env_config.section import EnvConfigError, read_environ
from env_config.variables import EnvConfig
from serve_app.app import AppArgs, model_args, service_args
from serve_app.http.app import http_app
from serve_app.jobs.service import JobArgs
from serve_app.making.stages import Stages
from serve_app.service import ServiceArgs, open_service
from serve_app.storage.s3 import S3Args
from serve_app.tools.command.exits import Exit
from serve_app.tools.command.server.here import Order, socket_in
from serve_app.tools.verify import SERVED, MisuseError, served, told

if TYPE_CHECKING:
    from deployments.one_process.pipeline import WholePipeline

TARGET_DEVICE = "SGLANG_DIFFUSION_TARGET_DEVICE"
APPLICATION = "triptych"


def main() -> None:
    answer = _take_stdout()
    given = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_whoever_asked, daemon=True).start()
    try:
        args, variables = ordered(Order(**given["order"]))
        set_variables(variables)
        env = EnvConfig.from_environ()
        pipeline = loaded(args, env)
        asyncio.run(serve(args, env, pipeline, given["folder"], answer))
    except (MisuseError, ValidationError, EnvConfigError) as error:
        tell(
            answer,
            problem=told(error) if isinstance(error, MisuseError | ValidationError) else str(error),
            exit=Exit.USAGE,
        )
    except Exception as error:  # noqa: BLE001  (of a library, while it loads: whoever asked is told)
        traceback.print_exc()
        known = isinstance(error, TriptychError | SecretError | ValueError)
        tell(answer, problem=str(error) if known else f"{type(error).__name__}: {error}", exit=Exit.FAILED)
    os._exit(0)  # no thread of a library is waited for


def ordered(order: Order) -> tuple[AppArgs, dict[str, str]]:
    """What is served, and the variables of this process. Raises MisuseError, ValidationError."""
    options = argparse.Namespace(
        **{name: getattr(order, name) for name in (*SERVED, "application", "name", "precision") if name != "placement"},
        config=Path(order.config) if order.config else None,
        placement=None,
    )
    args, variables = served(options, (*SERVED, "precision"))
    if order.loras:
        added = AppArgs.model_validate({"model": args.model, "adapters": dict(order.loras)}).adapters
        args = args.model_copy(update={"adapters": {**args.adapters, **added}})
    if order.device and TARGET_DEVICE not in {**read_environ(), **variables}:
        variables[TARGET_DEVICE] = order.device
    return args, variables


def loaded(args: AppArgs, env: EnvConfig) -> WholePipeline:
    check_cache_root(env.runtime.cache_root)
    set_library_caches(env.runtime.cache_root)
    set_allocator_settings(env.runtime.target_device)
    from deployments.one_process.pipeline import WholePipeline  # torch, after the variables that its libraries read

    return WholePipeline(model_args(args).model_copy(update={"warm_up": ()}), env)


async def serve(args: AppArgs, env: EnvConfig, pipeline: WholePipeline, folder: str, answer: TextIO) -> None:
    """Until the process ends."""
    from deployments.one_process.handle import HandleHere

    handle: Any = HandleHere(pipeline, APPLICATION)
    own = service_here(args, Path(folder))
    stages = {name: Stages(handle, handle, handle) for name in own.served}
    service = await open_service(own, in_folder(env, Path(folder)), stages, APPLICATION)
    service.start()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(socket_in(folder))  # in a folder that is open to this user alone
        listener.listen()
        tell(answer, ready=True)  # who asks now waits for the server to take it
        config = uvicorn.Config(http_app(service), lifespan="off", log_level="error", ws="none")
        await uvicorn.Server(config).serve(sockets=[listener])


def service_here(args: AppArgs, folder: Path) -> ServiceArgs:
    """Those of a server for one user: what is made is the same; nobody else asks, and nothing is kept."""
    told = service_args(args)
    own: dict[str, Any] = {
        "models": {name: each.model_copy(update={"model_keys": ()}) for name, each in told.models.items()},
        "output_directory": folder / "outputs",
        "url_style": "path",
        "jobs": JobArgs(),
        "s3": S3Args(),
        "api_keys_file": None,
        "playground": False,
        **dict.fromkeys(("adapter_keys", "adapter_places", "allowed_hosts", "trusted_proxies", "cors_origins"), ()),
        "public_url": None,
    }
    return told.model_copy(update=own)


def in_folder(env: EnvConfig, folder: Path) -> EnvConfig:
    """Jobs and files are in the folder, in no bucket."""
    runtime = env.runtime.model_copy(update={"cache_root": folder})
    return env.model_copy(update={"runtime": runtime, "cloud_storage": type(env.cloud_storage)()})


def tell(answer: TextIO, **content: Any) -> None:
    answer.write(json.dumps(content) + "\n")
    answer.flush()


def _take_stdout() -> TextIO:
    """What libraries print goes to the error stream from now on."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answer


def _end_with_whoever_asked() -> None:
    while os.read(0, 1):  # nothing comes but the end
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
