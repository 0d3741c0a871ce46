"""Three processes, one a stage, that share nothing but messages; the test's process carries them."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from deployments.errors import HandOffError, HandOffIncompleteError
from deployments.messages import (
    UNFOLLOWED,
    ComponentAnswer,
    ComponentCall,
    DecodeInputs,
    Envelope,
    GenerationRequest,
    StageName,
)
from deployments.model import DType
from tests.support.forked import forked_context

STAGES: tuple[StageName, ...] = ("encoder", "denoiser", "vae")


class StageProcess:
    """A process that holds one stage of the pipeline it was last told to load."""

    def __init__(self, stage: StageName) -> None:
        self.stage = stage
        context = forked_context()
        self._connection, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(stage, child), daemon=True)
        self._process.start()

    def load(self, folder: Path, dtype: DType = "auto") -> dict[str, int]:
        """Returns the bytes of weights in the process, by component."""
        return self.ask("load", folder, dtype)

    def ask(self, method: str, *arguments: Any, answer: Callable[[StageName, ComponentCall], Any] | None = None) -> Any:
        """Calls the method in the process; meanwhile `answer` makes the component calls that it asks for."""
        self._connection.send((method, arguments))
        while True:
            kind, value = self._connection.recv()
            if kind == "component_call":
                assert answer is not None
                self._connection.send(answer(*value))
            elif kind == "error":
                error, text = value
                error.add_note(text)
                raise error
            else:
                return value

    def stop(self) -> None:
        self._connection.send(("stop", ()))
        self._process.join(30)


class StageProcesses:
    """The three stages of one pipeline."""

    def __init__(self) -> None:
        self.processes = {stage: StageProcess(stage) for stage in STAGES}

    def load(self, folder: Path, dtype: DType = "auto") -> dict[StageName, dict[str, int]]:
        return {stage: process.load(folder, dtype) for stage, process in self.processes.items()}

    def generate(self, request: GenerationRequest, envelope: Envelope = UNFOLLOWED) -> list[Any]:
        """The leaves of the output, made by the three processes; again on a longer way where the application would."""
        conditioning = self.processes["encoder"].ask("encode", request)
        denoiser = self.processes["denoiser"]
        inputs: DecodeInputs = denoiser.ask("denoise", request, conditioning, envelope, answer=self._answer)
        try:
            output: list[Any] = self.processes["vae"].ask("decode", request, inputs)
        except HandOffError as error:
            if envelope.remote_calls:
                raise
            complete = isinstance(error, HandOffIncompleteError) and not envelope.complete_hand_off
            return self.generate(request, Envelope(complete_hand_off=complete, remote_calls=not complete))
        return output

    def stop(self) -> None:
        for process in self.processes.values():
            process.stop()

    def _answer(self, stage: StageName, call: ComponentCall) -> ComponentAnswer:
        answer: ComponentAnswer = self.processes[stage].ask("call_component", call)
        return answer


def _serve(stage: StageName, connection: Connection) -> None:
    import torch

    from tests.support.stage_worker import StageWorker

    torch.set_num_threads(1)

    def ask_stage(other: StageName, call: ComponentCall) -> ComponentAnswer:
        connection.send(("component_call", (other, call)))
        answer: ComponentAnswer = connection.recv()
        return answer

    worker = StageWorker(stage, ask_stage)
    while True:
        method, arguments = connection.recv()
        if method == "stop":
            return
        try:
            connection.send(("result", getattr(worker, method)(*arguments)))
        except Exception as error:  # noqa: BLE001  (the test's process raises it)
            connection.send(("error", (error, traceback.format_exc())))
