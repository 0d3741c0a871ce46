"""Signs what was made with a C2PA manifest (https://c2pa.org): who made it, when, and that a model did.

With the key of a certificate that the viewer's programs trust, they show it; with any other they say that the
signer is unknown. c2pa-python is an optional library: `pip install 'triptych[c2pa]'`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from PIL import Image

from deployments.adapters.use import named
from deployments.messages import GenerationRequest, Media, MediaFile, OutputFormat
from serve_app.making.follower import Follower, Make
from serve_app.making.layers.layer import Layer, LayerContext

MADE_BY_A_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
SETTINGS = {"builder": {"thumbnail": {"enabled": False}}}  # a thumbnail can be larger than the picture
SETTING = "c2pa_certificate, c2pa_private_key"


class ProvenanceError(RuntimeError):
    """Nothing can be signed with the files that were given; the sentence names the argument."""


@dataclass(frozen=True)
class ManifestSigner:
    """Signs files in threads; `chain` and `private_key` are PEM, `algorithm` is C2PA's name of the signature's."""

    chain: bytes
    private_key: bytes = field(repr=False)
    algorithm: str
    library: Any = field(repr=False)  # the module c2pa

    async def signed(self, media: Media, request: GenerationRequest) -> Media:
        """The same files, each with a manifest. The pixels are the same; the bytes differ from one time to the next.

        Files of tensors have no place for one.
        """
        if request.output.kind == "tensors":
            return media
        files = [await asyncio.to_thread(self.sign, file, request, media.num_steps) for file in media.files]
        return dataclasses.replace(media, files=tuple(files))

    def sign(self, file: MediaFile, request: GenerationRequest, num_steps: int | None = None) -> MediaFile:
        c2pa = self.library
        created = {
            "action": "c2pa.created",
            "digitalSourceType": MADE_BY_A_MODEL,
            "softwareAgent": {"name": request.model},
            "parameters": _parameters(file, request, num_steps),
        }
        manifest = {
            "claim_generator_info": [{"name": "Triptych"}],
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}],
        }
        signed = io.BytesIO()
        info = c2pa.C2paSignerInfo(self.algorithm, self.chain, self.private_key, None)
        with (
            c2pa.Context.from_dict(SETTINGS) as context,
            c2pa.Signer.from_info(info) as signer,
            c2pa.Builder(json.dumps(manifest), context=context) as builder,
        ):
            builder.sign(signer, file.mime_type, io.BytesIO(file.data), signed)
        return dataclasses.replace(file, data=signed.getvalue())


def _parameters(file: MediaFile, request: GenerationRequest, num_steps: int | None) -> dict[str, str]:
    """What was made, and of what; the values of a C2PA action are texts."""
    made: dict[str, Any] = {"seed": request.seed, "request_id": request.request_id}
    made |= {"loras": json.dumps(loras)} if (loras := named(request.features)) else {}
    made |= {"size": f"{file.width}x{file.height}" if file.width else None, "steps": num_steps}
    if file.fps:
        made |= {"num_frames": file.num_frames, "fps": file.fps}
    made |= {"seconds": file.seconds, "sample_rate": file.sample_rate, "channels": file.channels}
    return {name: str(value) for name, value in made.items() if value is not None}


def sign_what_is_made(make: Make, context: LayerContext) -> Make:
    """Raises ProvenanceError unless a trial picture can be signed."""
    signer = make_signer(context.c2pa_certificate, context.c2pa_private_key)
    if signer is None:
        return make

    async def make_and_sign(request: GenerationRequest, follower: Follower) -> Media:
        return await signer.signed(await make(request, follower), request)

    return make_and_sign


SIGNING = Layer("signing", sign_what_is_made)


def make_signer(certificate: Path | None, private_key: Path | None) -> ManifestSigner | None:
    """None where no certificate is given. Raises ProvenanceError unless a trial picture can be signed."""
    if certificate is None or private_key is None:
        return None
    try:
        library = importlib.import_module("c2pa")
    except ModuleNotFoundError as error:
        raise ProvenanceError(f"{SETTING}: c2pa-python is not installed: pip install 'triptych[c2pa]'") from error
    chain, key = _read(certificate, "c2pa_certificate"), _read(private_key, "c2pa_private_key")
    signer = ManifestSigner(chain, key, _algorithm(key), library)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    try:
        signer.sign(MediaFile(file.getvalue()), GenerationRequest("", "trial", {}, 0, OutputFormat("image", "png")))
    except library.C2paError as error:
        raise ProvenanceError(f"{SETTING}: a trial picture could not be signed: {error}") from error
    return signer


def _read(file: Path, name: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ProvenanceError(f"{name}: {str(file)!r} cannot be read ({error.strerror})") from error


def _algorithm(private_key: bytes) -> str:
    try:
        key = load_pem_private_key(private_key, None)
    except (ValueError, TypeError) as error:  # TypeError: it has a password
        raise ProvenanceError("c2pa_private_key must be a PEM file without a password") from error
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in CURVES:
        return CURVES[key.curve.name]
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(key, rsa.RSAPrivateKey):
        return "ps256"
    raise ProvenanceError("c2pa_private_key must be of P-256, P-384, P-521, Ed25519 or RSA")
