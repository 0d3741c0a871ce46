"""What common front ends send for a picture by default, as their sources say (read on 2026-11-28).

The words are ours, the fields and values theirs. `model` is what each sends unless it is configured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

IMAGES, EDITS = "/v1/images/generations", "/v1/images/edits"


@dataclass(frozen=True)
class SentByDefault:
    """One request of a front end; with a `file` it is a form that has a picture under this name."""

    front_end: str
    version: str
    path: str
    fields: dict[str, Any]
    file: str | None = None
    means_nothing: frozenset[str] = field(default_factory=frozenset)  # its fields that `warnings` names
    reads: str = "b64_json"  # of each item of the answer


SENT_BY_DEFAULT = (
    SentByDefault(
        "Open WebUI", "backend/open_webui/routers/images.py at 02530d5", IMAGES,
        {"model": "dall-e-2", "prompt": "a fox", "n": 1, "size": "512x512", "response_format": "b64_json"},
    ),
    SentByDefault(
        "Open WebUI, an edit", "backend/open_webui/routers/images.py at 02530d5", EDITS,
        {"model": "gpt-image-1", "prompt": "a fox", "n": "1", "size": "512x512"}, file="image",
    ),
    SentByDefault(
        "LibreChat, image_gen_oai", "OpenAIImageTools.js at 00b3bc3", IMAGES,
        {"model": "gpt-image-1", "prompt": "a fox", "n": 1, "background": "auto", "output_format": "png",
         "quality": "auto", "size": "auto"},
        means_nothing=frozenset({"quality"}),
    ),
    SentByDefault(
        "LibreChat, image_gen_oai as webp", "OpenAIImageTools.js at 00b3bc3", IMAGES,
        {"model": "gpt-image-1", "prompt": "a fox", "n": 1, "background": "auto", "output_format": "webp",
         "output_compression": 100, "quality": "high", "size": "1536x1024"},
        means_nothing=frozenset({"quality"}),
    ),
    SentByDefault(
        "LibreChat, image_edit_oai", "OpenAIImageTools.js at 00b3bc3", EDITS,
        {"model": "gpt-image-1", "prompt": "a fox", "quality": "auto", "size": "auto"}, file="image[]",
        means_nothing=frozenset({"quality"}),
    ),
    SentByDefault(
        "LibreChat, DALL-E", "DALLE3.js, its fields as OpenAI documents them", IMAGES,
        {"model": "dall-e-3", "prompt": "a fox", "quality": "standard", "size": "1024x1024", "style": "vivid", "n": 1},
        means_nothing=frozenset({"quality", "style"}), reads="url",
    ),
    SentByDefault(
        "LiteLLM", "litellm 1.110.2, llms/openai/openai.py", IMAGES,
        {"model": "dall-e-3", "prompt": "a fox", "n": 1, "size": "1024x1024", "quality": "hd", "style": "natural",
         "response_format": "url", "user": "team-1"},
        means_nothing=frozenset({"quality", "style"}), reads="url",
    ),
    SentByDefault(
        "LangChain", "langchain-community 0.4.2, dalle_image_generator.py", IMAGES,
        {"model": "dall-e-2", "prompt": "a fox", "n": 1, "size": "1024x1024"}, reads="url",
    ),
    SentByDefault(
        "n8n", "OpenAi node, v2/actions/image/generate.operation.ts at 0713e95", IMAGES,
        {"model": "gpt-image-1-mini", "prompt": "a fox"},
    ),
    SentByDefault(
        "n8n with its options", "OpenAi node, v2/actions/image/generate.operation.ts at 0713e95", IMAGES,
        {"model": "dall-e-3", "prompt": "a fox", "response_format": "b64_json", "quality": "hd",
         "size": "1024x1024", "style": "vivid"},
        means_nothing=frozenset({"quality", "style"}),
    ),
)  # fmt: skip
