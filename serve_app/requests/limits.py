"""What requests may ask for at most."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class RequestLimits(BaseModel):
    """Bounds of a request's values; the checks of serve_app.requests.translate name the one that was passed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_images: int = Field(10, ge=1, description="pictures, videos or sounds per request: the bound of `n`")
    max_pixels: int = Field(4_194_304, ge=1, description="width x height")
    max_side: int = Field(8_192, ge=1, le=16_383, description="width, height; a WebP file ends at 16 383")
    max_frames: int = Field(257, ge=1, description="frames of a video")
    max_audio_seconds: float = Field(600, gt=0, description="seconds of a sound")
    max_steps: int = Field(200, ge=1, description="num_inference_steps, and the length of a list of timesteps")
    max_prompt_chars: int = Field(20_000, ge=1, description="characters of each text")
    max_prompt_tokens: int = Field(4_096, ge=1, description="max_sequence_length")
    max_input_images: int = Field(16, ge=1, description="pictures sent along in one field")
    max_input_bytes: int = Field(50_000_000, ge=1, description="bytes of such a picture, as a file")
    max_body_bytes: int = Field(
        128_000_000,
        ge=1_000,
        le=1_000_000_000,
        description="bytes of a whole body; base64 makes pictures a third larger",
    )
    max_loras: int = Field(8, ge=0, description="LoRAs of one request; 0: none")
    max_lora_scale: float = Field(10, gt=0, le=1_000, description="of a LoRA's scale, either side of 0")
    max_added_loras: int = Field(1_000, ge=0, description="LoRAs that POST /v1/loras has added and not deleted")
    max_sound_s: float = Field(600.0, gt=0, le=3_600, description="seconds of the sounds sent along in one field")
    max_input_pixels: int = Field(16_777_216, ge=1, le=50_000_000, description="width x height of such a picture")
