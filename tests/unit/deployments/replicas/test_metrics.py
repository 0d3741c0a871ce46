"""What a denoiser measures goes to Ray Serve's metrics; a measurement without a row stops nobody."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest

from deployments.denoising.measurements import CheckpointMade, Resumed
from deployments.engine.statistics import BatchRun, Cancelled
from deployments.features.cache_dit.measurements import CachedSteps
from deployments.replicas.metrics import EXPORTS, DenoiserMetrics


@dataclass(frozen=True)
class Planted:
    """Of a feature that has no row."""


def test_every_measurement_of_ours_has_a_row() -> None:
    assert set(EXPORTS) == {BatchRun, Cancelled, CachedSteps, CheckpointMade, Resumed}


def test_a_measurement_without_a_row_is_left_out_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    metrics = DenoiserMetrics()
    with caplog.at_level(logging.WARNING):
        metrics(Planted())
        metrics(Planted())
    assert caplog.text.count("Planted has no row") == 1
