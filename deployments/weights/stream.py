"""The Run:ai streamer: the tensors of a component's files one by one, from a folder or from S3."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import boto3
import torch

from deployments.errors import CheckpointError
from deployments.weights.files import WeightFiles
from deployments.weights.s3 import s3_client
from env_config.streamer_memory import VARIABLE, streamer_limit, streamer_memory

STREAMER_VARIABLE = "SGLANG_USE_RUNAI_MODEL_STREAMER"
ADDRESSING_HINT = (
    "a server that does not take the bucket in its host name needs RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING=0"
)

HOST_BYTES = 2 * 2**30  # that the streamer reads ahead into

TensorStream = Iterator[tuple[str, torch.Tensor]]


def stream_tensors(weights: WeightFiles, keep: bool) -> TensorStream:
    """Each tensor once, valid until the next, or with `keep` for as long as it is held.

    Raises CheckpointError if the stream does not bring all.
    """
    streamer_class, credentials = import_streamer(weights.is_s3)
    received = set()
    with streamer_memory(max(HOST_BYTES, largest_piece(weights))), streamer_class() as streamer:
        try:
            locations = [file.location for file in weights.files]
            streamer.stream_files(locations, s3_credentials=credentials, owned=keep)
            for name, tensor in streamer.get_tensors():
                received.add(name)
                yield name, tensor
        except streamer_errors() as error:
            raise CheckpointError(
                f"the stream of {weights.files[0].location} failed: {error}{hint(weights)}"
            ) from error
    lost = set(weights.names) - received
    if lost:
        raise CheckpointError(f"the stream of {weights.files[0].location} lost {len(lost)} weights: {min(lost)} ...")


def largest_piece(weights: WeightFiles) -> int:
    """Bytes of the largest weight, or header: the streamer holds one of them whole."""
    offsets: Iterator[tuple[int, int]] = (
        entry["data_offsets"] for file in weights.files for entry in file.entries.values()
    )
    headers = (file.data_start for file in weights.files)
    return max(*headers, *(end - start for start, end in offsets))


def streamer_errors() -> tuple[type[Exception], ...]:
    from runai_model_streamer.file_streamer.requests_iterator import RunaiStreamerMemoryLimitException

    return ValueError, RunaiStreamerMemoryLimitException


def hint(weights: WeightFiles) -> str:
    """The streamer names no cause."""
    limit = streamer_limit()
    if limit.isdigit() and 0 < int(limit) < largest_piece(weights):
        return f"; {VARIABLE}={limit} is below the largest weight of {largest_piece(weights)} bytes"
    return f"; boto3 could read it: {ADDRESSING_HINT}" if weights.is_s3 else ""


def import_streamer(from_s3: bool) -> tuple[Any, Any]:
    """The streamer's class and the credentials it needs, those that boto3 finds."""
    for package in ("runai_model_streamer", *(["runai_model_streamer_s3"] if from_s3 else [])):
        if importlib.util.find_spec(package) is None:
            raise CheckpointError(
                f"{STREAMER_VARIABLE}=true (the default) needs a package that is not installed: "
                f"pip install 'runai-model-streamer[s3]>=0.17', or set {STREAMER_VARIABLE}=false"
            )
    from runai_model_streamer import SafetensorsStreamer

    return SafetensorsStreamer, streamer_credentials() if from_s3 else None


def streamer_credentials() -> Any:
    """What boto3 finds, as the streamer takes it; no endpoint for AWS itself."""
    from runai_model_streamer.s3_utils.s3_utils import S3Credentials

    session = boto3.session.Session()
    found = session.get_credentials().get_frozen_credentials()
    endpoint = s3_client().meta.endpoint_url
    return S3Credentials(
        access_key_id=found.access_key,
        secret_access_key=found.secret_key,
        session_token=found.token,
        region_name=session.region_name,
        endpoint=None if endpoint.endswith(".amazonaws.com") else endpoint,
    )
