"""Replicas of two versions of a model at once, as during an update: what one has made goes on in none of the other."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from deployments.errors import CannotResumeError, OtherVersionError, StageUnavailableError
from deployments.messages import (
    Checkpoint,
    DecodeInputs,
    GenerationRequest,
    Media,
    MediaFile,
    OutputFormat,
    Packed,
    PayloadFollows,
    StageDescription,
)
from deployments.model import ModelArgs
from serve_app.making import generate as generate_module
from serve_app.making.generate import generate
from serve_app.making.served_model import ServedModel
from serve_app.making.stages import Stages
from tests.support.played_stages import Reference, Stream

REQUEST = GenerationRequest("request", "model", {}, 0, OutputFormat("image", "png"))
OTHER = RayTaskError("call", "traceback", OtherVersionError("made by another version")).as_instanceof_cause()
CHECKPOINT = Checkpoint("request", 3, "fingerprint", "digest", Packed(None))
WHOLE = [PayloadFollows("decode_inputs", 4), DecodeInputs("result", Packed(None))]
MEDIA = Media((MediaFile(b"picture"),))


class Handle:
    """A stage of one deployment: its calls answer with what was prepared, one after another."""

    app_name, deployment_name = "triptych", "Stage"

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[Any, ...]] = []

    def options(self, **_: Any) -> Handle:
        return self

    encode = denoise = decode = describe = property(lambda self: self)

    def remote(self, *arguments: Any) -> Any:
        self.calls.append(arguments)
        answer = self.answers.pop(0)
        if not isinstance(answer, list):
            return Reference(answer)

        async def each() -> Any:
            for item in answer:
                yield item

        return Stream(each())


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    async def pause(times: int) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr(generate_module, "_pause", pause)


def made(encoder: Handle, denoiser: Handle, vae: Handle) -> None:
    stages: Any = Stages(encoder, denoiser, vae)  # type: ignore[arg-type]
    assert asyncio.run(generate(stages, REQUEST)).files == MEDIA.files


def test_a_denoiser_of_another_version_gets_what_an_encoder_of_its_own_has_made() -> None:
    encoder, denoiser = Handle("earlier", "earlier", "later"), Handle([OTHER], [OTHER], WHOLE)
    made(encoder, denoiser, Handle(MEDIA))
    assert [call[2].value for call in denoiser.calls] == ["earlier", "earlier", "later"]


def test_the_checkpoint_goes_to_the_other_version_which_alone_knows_whether_it_may_go_on_from_it() -> None:
    begun = [PayloadFollows("checkpoint", 3), CHECKPOINT, OTHER]
    encoder, denoiser = Handle("earlier", "later"), Handle(begun, WHOLE)
    made(encoder, denoiser, Handle(MEDIA))
    assert [call[3] for call in denoiser.calls] == [None, CHECKPOINT]

    refused = RayTaskError("denoise", "traceback", CannotResumeError("another model")).as_instanceof_cause()
    encoder, denoiser = Handle("earlier", "later", "later"), Handle(begun, [refused], WHOLE)
    made(encoder, denoiser, Handle(MEDIA))
    assert [call[3] for call in denoiser.calls] == [None, CHECKPOINT, None]


def test_a_decoder_of_another_version_gets_nothing_of_the_earlier_one() -> None:
    encoder, denoiser = Handle("earlier", "later"), Handle(WHOLE, WHOLE)
    made(encoder, denoiser, Handle(OTHER, MEDIA))
    assert [call[2].value for call in denoiser.calls] == ["earlier", "later"]


def described(version: str) -> Any:
    told = SimpleNamespace(version=version, start_s=0.0)
    told.of = lambda model: told
    return told


def test_what_a_replica_of_an_earlier_version_says_of_the_model_is_not_kept() -> None:
    encoder: Any = Handle(*map(described, ("earlier", "later", "never asked")))
    model = ServedModel("model", Stages(encoder, encoder, encoder, version="later"))

    async def asked(times: int) -> list[StageDescription]:
        return [await model.describe() for _ in range(times)]

    assert [each.version for each in asyncio.run(asked(4))] == ["earlier", "later", "later", "later"]


def test_what_is_kept_is_asked_again_and_nothing_is_said_while_replicas_of_two_versions_are_there() -> None:
    def of_three_stages(*versions: str | Exception) -> ServedModel:
        handles: list[Any] = []
        for number, version in enumerate(versions):
            handles.append(Handle(described(version) if isinstance(version, str) else version))
            handles[-1].deployment_name = f"stage {number}"
        return ServedModel("model", Stages(*handles, version="later"))

    later = of_three_stages("later", "later", StageUnavailableError("it starts"))
    later._description = described("kept")
    assert asyncio.run(later.describe_again()).version == "later"
    for versions in (("earlier", "later", "later"), ("later", "later", "earlier")):
        with pytest.raises(OtherVersionError, match="'model' is being updated"):
            asyncio.run(of_three_stages(*versions).describe_again())
    with pytest.raises(StageUnavailableError, match="not ready"):
        asyncio.run(of_three_stages(StageUnavailableError("it starts"), "later", "later").describe_again())


ARGS = ModelArgs(path="o/flux", name="flux")
OF_MAKING = {
    "path": "o/other",
    "dtype": "float16",
    "component_dtypes": {"vae": "float32"},
    "precision": "fp8",
    "variant": "fp16",
    "config_folder": "/there",
    "pipeline_class": "FluxPipeline",
    "components": {"vae": "o/vae"},
    "vae": {"tiling": True},
}
OF_ONE_PROCESS = {
    "name": "mine",
    "default_arguments": {"height": 64},
    "quality": {"low": {"height": 64}},
    "denoising": {"checkpoint_every": 7},
    "watchdog": {"usual_timeout_s": 700},
    "compile": "regional",
    "warm_up": [{"height": 64}],
    "fence_device_memory": True,
    "offload": {"transformer": "model"},
    "adapters": {"sketch": "o/sketch"},
    "adapter_cache": {"max_disk_bytes": 7},
    "takes_new_adapters": True,
    "parallel": {"batch": 2},
}


def test_every_argument_of_a_model_is_of_what_is_made_or_of_one_process() -> None:
    assert set(OF_MAKING) | set(OF_ONE_PROCESS) | {"path"} == set(ModelArgs.model_fields)
    for name, value in (OF_MAKING | OF_ONE_PROCESS).items():
        other = ModelArgs(**{"path": "o/flux", "name": "flux", name: value})
        assert other.version != ARGS.version, name
        assert (other.making != ARGS.making) == (name in OF_MAKING), name
