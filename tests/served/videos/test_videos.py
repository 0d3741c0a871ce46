"""A served model that makes videos."""

import base64
import io
from pathlib import Path

import av
import httpx
import numpy as np
import numpy.typing as npt
import pytest

from tests.support.served_application import ServedApplication
from tests.support.unsplit import unsplit_video

pytestmark = pytest.mark.timeout(600)

PROMPT = "a small cat"
BT709_LUMA = (0.2126, 0.7152, 0.0722)  # of R, G, B: ITU-R BT.709


def test_a_video_model_makes_a_video_that_plays(wan: ServedApplication, checkpoints_root: Path) -> None:
    body = {"prompt": PROMPT, "seed": 31, "size": "48x32", "num_frames": 9, "response_format": "b64_json"}
    answer = httpx.post(f"{wan.url}/wan/v1/videos/generations", json=body, timeout=120).json()
    [item] = answer["data"]
    frames, rate = decoded(base64.b64decode(item["b64_json"]))
    assert frames.shape == (9, 32, 48)
    assert rate == answer["fps"] == 16
    assert (answer["num_frames"], answer["size"]) == (9, "48x32")

    def truth(seed: int) -> npt.NDArray[np.float64]:
        made = unsplit_video(checkpoints_root / "wan22", seed, prompt=PROMPT, width=48, height=32, num_frames=9)
        return np.stack([np.asarray(frame) for frame in made]) @ BT709_LUMA

    # H.264 loses a little of this noise, whichever video it is held against: the right one must be the nearest.
    right = truth(31)
    others_of_its_kind = {"another seed": truth(32), "backwards": right[::-1], "mirrored": right[:, :, ::-1]}
    lost = np.abs(frames - right).mean()
    assert lost < 8, "of 255"
    for name, other in others_of_its_kind.items():
        assert lost < np.abs(frames - other).mean(), name


def test_a_url_below_the_public_one_leads_to_the_video(wan: ServedApplication) -> None:
    body = {"prompt": PROMPT, "seed": 31, "size": "48x32", "num_frames": 5}
    [item] = httpx.post(f"{wan.url}/wan/v1/videos/generations", json=body, timeout=120).json()["data"]
    file = httpx.get(item["url"])
    assert file.headers["content-type"] == "video/mp4"
    assert len(decoded(file.content)[0]) == 5


def test_a_picture_is_refused_by_a_model_that_makes_videos(wan: ServedApplication) -> None:
    answer = wan.generate("/wan", prompt=PROMPT)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")


def decoded(data: bytes) -> tuple[npt.NDArray[np.float64], float]:
    """The luma [F, H, W] of the frames in 0..255, and how many frames a second has."""
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
        rate = container.streams.video[0].average_rate
    assert rate is not None
    return (np.stack(frames).astype(np.float64) - 16) * 255 / 219, float(rate)  # black is 16, white 235
