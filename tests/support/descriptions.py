"""What a stage would say of a pipeline of diffusers."""

from deployments.messages import StageDescription
from deployments.stage_pipeline.description import call_parameters


def description_of(pipeline: type, size_multiple: int = 16) -> StageDescription:
    parameters, required = call_parameters(pipeline)
    return StageDescription(
        stages=("encoder",),
        pipeline_class=pipeline.__name__,
        parameters=parameters,
        required=required,
        media_kind="video" if "num_frames" in parameters else "image",
        size_multiple=size_multiple,
        default_width=None,
        default_height=None,
        device="cpu",
        dtype="float32",
        weight_bytes={},
        process_id=1,
    )
