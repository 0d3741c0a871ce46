import pytest
from PIL import Image

from benchmarks.stages import refuse_another_picture

PICTURE = Image.new("RGB", (8, 8), (10, 20, 30))


def test_on_a_cpu_the_served_picture_has_the_same_bits() -> None:
    refuse_another_picture(PICTURE.copy(), PICTURE, "cpu")
    with pytest.raises(RuntimeError, match="not the pipeline's"):
        refuse_another_picture(Image.new("RGB", (8, 8), (10, 20, 31)), PICTURE, "cpu")


def test_on_an_accelerator_it_may_be_rounded_differently_and_is_no_other() -> None:
    refuse_another_picture(Image.new("RGB", (8, 8), (11, 21, 31)), PICTURE, "cuda")
    with pytest.raises(RuntimeError, match="not the pipeline's"):
        refuse_another_picture(Image.new("RGB", (8, 8), (20, 20, 30)), PICTURE, "cuda")
