"""What a stage would say of a pipeline of diffusers."""

from deployments.messages import StageDescription
from deployments.stage_pipeline.description import call_parameters
from deployments.stage_pipeline.inputs.fields import argument_fields


def description_of(pipeline: type, size_multiple: int = 16) -> StageDescription:
    parameters, _ = call_parameters(pipeline)
    fields = argument_fields(pipeline)
    return StageDescription(
        stages=("encoder",),
        pipeline_class=pipeline.__name__,
        parameters=parameters,
        required=tuple(name for name in parameters if fields[name].is_needed),
        media_kind="video" if "num_frames" in parameters else "image",
        size_multiple=size_multiple,
        default_width=None,
        default_height=None,
        device="cpu",
        dtype="float32",
        weight_bytes={},
        process_id=1,
        argument_types={name: fields[name].type for name in parameters},
        argument_notes={name: field.notes for name, field in fields.items()},
    )
