"""Output classes of diffusers for what modular pipelines make: data, by the fields that they have."""

from __future__ import annotations

from diffusers import AudioPipelineOutput, ImagePipelineOutput
from diffusers.pipelines.ltx2.pipeline_output import LTX2PipelineOutput
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils import BaseOutput

# What blocks call their product -> the field of an output of diffusers' other pipelines that holds such a thing.
FIELDS = {"images": "images", "videos": "frames", "audio": "audio", "sound": "audio", "audios": "audios"}
OUTPUTS: dict[frozenset[str], type[BaseOutput]] = {
    frozenset({"images"}): ImagePipelineOutput,
    frozenset({"frames"}): WanPipelineOutput,
    frozenset({"frames", "audio"}): LTX2PipelineOutput,
    frozenset({"audios"}): AudioPipelineOutput,
}
