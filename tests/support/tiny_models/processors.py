"""A processor (text and pictures) for Qwen2-VL that works where torchvision is not installed.

diffusers loads it by the name of this module, from which it must also be able to take `ProcessorMixin`.
"""

from typing import Any

from transformers import ProcessorMixin, Qwen2Tokenizer, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.support.tiny_models.tokenizers import CHAT_TEMPLATE

__all__ = ["ImageOnlyQwenProcessor", "ProcessorMixin", "qwen2_processor"]


class ImageOnlyQwenProcessor(Qwen2VLProcessor):
    """Qwen2-VL's processor without its video half, which only exists where torchvision is installed."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ):
        self.image_token = "<|image_pad|>"
        self.video_token = "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def qwen2_processor(tokenizer: Qwen2Tokenizer) -> ImageOnlyQwenProcessor:
    """Text and pictures for Qwen2-VL; every picture becomes at most 56 x 56 pixels."""
    image_processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56})
    return ImageOnlyQwenProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)
