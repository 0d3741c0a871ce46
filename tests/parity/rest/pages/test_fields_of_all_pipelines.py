"""Every argument of every pipeline of diffusers is a field, or the reason why it is none is on a short list."""

import diffusers
import pytest
from diffusers import DiffusionPipeline

from deployments.stage_pipeline.description import call_parameters
from deployments.stage_pipeline.inputs.fields import ArgumentField, argument_fields
from deployments.stage_pipeline.inputs.kinds import MADE_BY_CODE, WHY_CODE, WHYS
from serve_app.requests.given.schemas import json_schema

pytestmark = pytest.mark.filterwarnings("default")

# Sent as files by every pipeline that has them.
FILES = (
    "control_image", "ip_adapter_image", "negative_ip_adapter_image", "conditions", "conditioning_frames", "images",
    "input_images", "reference_images", "pose_video", "face_video", "control_video", "controls", "src_audio",
    "reference_audio", "initial_audio_waveforms", "example_image", "hint", "last_image", "mask_image", "mask_video",
)  # fmt: skip


def pipelines() -> list[type]:
    found = [getattr(diffusers, name) for name in dir(diffusers) if "Pipeline" in name]
    classes = [each for each in found if isinstance(each, type) and issubclass(each, DiffusionPipeline)]
    return [each for each in classes if "__call__" in {name for base in each.__mro__[:-1] for name in vars(base)}]


def test_every_argument_is_carried_or_its_refusal_has_a_reason() -> None:
    fields: dict[tuple[str, str], ArgumentField] = {}
    for pipeline in pipelines():
        parameters, _ = call_parameters(pipeline)
        told = argument_fields(pipeline)
        assert set(told) >= set(parameters)
        fields |= {(pipeline.__name__, name): told[name] for name in parameters}
    assert len(fields) > 5000
    refused = {key: field.notes.why_not for key, field in fields.items() if field.notes.why_not}
    assert set(refused.values()) <= set(WHYS)
    carried = {key: field for key, field in fields.items() if key not in refused}
    assert [key for key, field in carried.items() if field.type.kind != "none" and not json_schema(field.type)] == []
    assert [key for key in refused if key[1] in FILES] == []
    tensors = {name for (_, name), why in refused.items() if why == WHY_CODE and not MADE_BY_CODE.search(name)}
    assert tensors <= {
        "c2w", "coords_nm", "is_in_context_conditioning", "sem_guidance", "token_type", "noise", "encoding", "kps_cond",
        "id_cond", "controlnet_pooled_projections", "atom37_mask", "mask",
    }  # fmt: skip
