"""Which tiny models every run goes through, and why; the others are for `make test TESTS=parity`."""

from itertools import product

from tests.support.tiny_models import TINY_MODELS

# For each mechanism two models of different families where two have it: the first is for every run.
OF_BOTH: dict[str, tuple[str, ...]] = {
    "calls of text encoders are recorded and replayed in the loop": ("flux", "sd3"),
    "two denoisers take turns": ("wan22", "stable_cascade"),
    "a pipeline holds another one, with a loop of its own": ("kandinsky22", "stable_cascade"),
}
OF_THE_SPLIT: dict[str, tuple[str, ...]] = {
    "a UNet denoises, and a checker stands behind the autoencoder": ("sdxl", "sd15_safety"),
    "a given picture goes through the autoencoder, with a mask too": ("flux_kontext", "sdxl_inpaint"),
    "an image encoder stands beside the text or in its place": ("wan21_i2v", "svd"),
    "a language model reads, or writes with random draws, in the encoder stage": ("qwen_layered_sample", "sana"),
    "the hand-off is incomplete and asked for again": ("helios", "framepack"),
    "sound is decoded, beside the video or alone": ("ltx2", "stable_audio"),
    "no autoencoder": ("prx_pixel",),
}
OF_THE_ENGINE: dict[str, tuple[str, ...]] = {
    "a forward takes lists of tensors": ("zimage", "bria_fibo"),
    "a forward belongs to its request and never shares a batch": ("klein_kv", "bria_fibo"),
    "a second module stands beside the denoiser": ("flux_controlnet", "sd15_controlnet"),
    "a guider keeps state": ("hunyuan_image", "hunyuanvideo15"),
    "a scheduler draws at each step, or needs the step before": ("sdxl_ancestral", "cogvideox_dpm"),
    "the loop goes over parts of the video": ("skyreels_df", "helios"),
}


def first_models(mechanisms: dict[str, tuple[str, ...]]) -> list[str]:
    return [name for name in TINY_MODELS if any(name == models[0] for models in mechanisms.values())]


SPLIT_CORE = first_models(OF_BOTH | OF_THE_SPLIT)
SPLIT_REST = [name for name in TINY_MODELS if name not in SPLIT_CORE]
ENGINE_CORE = first_models(OF_BOTH | OF_THE_ENGINE)
ENGINE_REST = [name for name in TINY_MODELS if name not in ENGINE_CORE]

# Previews do not depend on the encoders: tokens, a UNet, lists, a video of two denoisers, and no autoencoder.
PREVIEWED = ("flux", "sdxl", "zimage", "wan22", "prx_pixel")
NOT_PREVIEWED = [name for name in TINY_MODELS if name not in PREVIEWED]

CACHED = ("flux", "wan22", "qwenimage")
CACHE_SETTINGS = ("threshold", "taylorseer", "static_mask")  # of tests.support.engine_parity
CACHED_CORE = [("flux", "static_mask"), ("wan22", "taylorseer")]
CACHED_REST = [pair for pair in product(CACHED, CACHE_SETTINGS) if pair not in CACHED_CORE]
