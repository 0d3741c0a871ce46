"""C2PA manifests, read back by the library's own reader, with a certificate chain made for the test."""

from __future__ import annotations

import asyncio
import base64
import datetime
import io
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image, ImageChops

from deployments.messages import GenerationRequest, Media, MediaFile
from serve_app.app import AppArgs
from serve_app.making.layers.signing import MADE_BY_A_MODEL, ProvenanceError, make_signer
from tests.support.in_process import make_at_once, picture, serving, until
from tests.support.stored_files import generation
from tests.support.videos import make_video, video_file

c2pa: Any = pytest.importorskip("c2pa")

PEM = serialization.Encoding.PEM
USES = dict.fromkeys(
    (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    ),
    False,
)  # fmt: skip
FILES = {
    "image/png": picture(),
    "image/jpeg": picture(format="jpeg"),
    "image/webp": picture(format="webp"),
    "image/gif": picture(format="gif"),
    "video/mp4": video_file(),
}


class Chain:
    """A root, a certificate of it for signing, and the files that the application's arguments name."""

    def __init__(self, folder: Path, key: Any) -> None:
        root_key = ec.generate_private_key(ec.SECP256R1())
        root = _certificate("root", root_key, "key_cert_sign", is_root=True).sign(root_key, hashes.SHA256())
        own = _certificate("signer", key, "digital_signature")
        own = own.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
        own = own.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False
        )
        self.root = root.public_bytes(PEM).decode()
        self.certificate, self.private_key = folder / "certificate.pem", folder / "key.pem"
        self.certificate.write_bytes(own.sign(root_key, hashes.SHA256()).public_bytes(PEM) + root.public_bytes(PEM))
        form, secret = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        self.private_key.write_bytes(key.private_bytes(PEM, form, secret))

    def settings(self) -> dict[str, Path]:
        return {"c2pa_certificate": self.certificate, "c2pa_private_key": self.private_key}

    def read(self, data: bytes, mime_type: str) -> tuple[str, dict[str, Any]]:
        """Whether the reader trusts the file, and its manifest."""
        trust = {"trust": {"trust_anchors": self.root}, "verify": {"verify_trust": True}}
        with c2pa.Reader(mime_type, io.BytesIO(data), context=c2pa.Context.from_dict(trust)) as reader:
            return reader.get_validation_state(), reader.get_active_manifest()


def _certificate(name: str, key: Any, use: str, is_root: bool = False) -> x509.CertificateBuilder:
    now, organization = datetime.datetime.now(datetime.UTC), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Example")
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([organization, x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([organization, x509.NameAttribute(NameOID.COMMON_NAME, "root")]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.BasicConstraints(is_root, None), critical=True)
        .add_extension(x509.KeyUsage(**{**USES, use: True}), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path, ec.generate_private_key(ec.SECP256R1()))


@pytest.mark.parametrize("mime_type", FILES)
def test_each_format_carries_a_manifest_that_says_a_model_made_it(chain: Chain, mime_type: str) -> None:
    signer = make_signer(chain.certificate, chain.private_key)
    assert signer is not None
    signed = signer.sign(MediaFile(FILES[mime_type], mime_type), generation("req_1")).data
    state, manifest = chain.read(signed, mime_type)
    [action] = next(each for each in manifest["assertions"] if each["label"] == "c2pa.actions.v2")["data"]["actions"]
    assert state == "Trusted"
    assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", MADE_BY_A_MODEL)
    assert (action["softwareAgent"]["name"], action["parameters"]["request_id"]) == ("m", "req_1")
    assert len(signed) - len(FILES[mime_type]) < 20_000, "no thumbnail"


def test_a_picture_that_was_changed_afterwards_is_not_trusted(chain: Chain) -> None:
    signer = make_signer(chain.certificate, chain.private_key)
    assert signer is not None
    signed = signer.sign(MediaFile(FILES["image/jpeg"], "image/jpeg"), generation("r")).data
    changed = signed[:-30] + bytes([signed[-30] ^ 1]) + signed[-29:]
    assert chain.read(changed, "image/jpeg")[0] == "Invalid"


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP521R1()),
        ed25519.Ed25519PrivateKey.generate(), rsa.generate_private_key(65_537, 2048),
    ],
    ids=["p384", "p521", "ed25519", "rsa"],
)  # fmt: skip
def test_the_signature_is_of_the_kind_of_the_key(tmp_path: Path, key: Any) -> None:
    chain = Chain(tmp_path, key)
    signer = make_signer(chain.certificate, chain.private_key)
    assert signer is not None
    signed = signer.sign(MediaFile(FILES["image/png"]), generation("r")).data
    assert chain.read(signed, "image/png")[0] == "Trusted"


async def test_answers_and_stored_files_are_signed_and_show_the_same_picture(tmp_path: Path, chain: Chain) -> None:
    with serving(tmp_path / "outputs") as server:
        server.configure(**chain.settings())
        at_once = await server.post("/v1/images/generations", json={"prompt": "x", "seed": 5})
        stored = await server.post("/v1/images/generations", json={"prompt": "x", "seed": 5, "response_format": "url"})
        data, _ = await server.service.storage.load(
            stored.json()["data"][0]["url"].removeprefix("http://test/v1/files/")
        )
    for file in (base64.b64decode(at_once.json()["data"][0]["b64_json"]), data):
        state, manifest = chain.read(file, "image/png")
        assert state == "Trusted"
        assert '"seed": "5"' in json.dumps(manifest)
        with Image.open(io.BytesIO(file)) as signed, Image.open(io.BytesIO(picture())) as plain:
            assert not ImageChops.difference(signed, plain).getbbox()


async def test_equal_requests_at_the_same_time_get_the_same_signed_bytes(tmp_path: Path, chain: Chain) -> None:
    async def make_when_both_have_asked(request: GenerationRequest) -> Media:
        await until(lambda: server.model.admission.num_pending == 2)
        return await make_at_once(request)

    with serving(tmp_path / "outputs") as server:
        server.configure(**chain.settings())
        server.make = make_when_both_have_asked
        body = {"prompt": "x", "seed": 5}
        both = await asyncio.gather(*(server.post("/v1/images/generations", json=body) for _ in range(2)))
    assert len(server.requests) == 1
    assert len({answer.json()["data"][0]["b64_json"] for answer in both}) == 1


async def test_a_video_is_signed_too(tmp_path: Path, chain: Chain) -> None:
    signer = make_signer(chain.certificate, chain.private_key)
    assert signer is not None
    signed = await signer.signed(await make_video(generation("r", "video")), generation("r", "video"))
    assert [chain.read(file.data, file.mime_type)[0] for file in signed.files] == ["Trusted"]


def test_files_that_cannot_sign_are_named_when_the_replica_starts(chain: Chain, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    key = ec.generate_private_key(ec.SECP256R1())
    form = serialization.PrivateFormat.PKCS8
    for content, says in (
        (key.private_bytes(PEM, form, serialization.NoEncryption()), "a trial picture could not be signed"),
        (key.private_bytes(PEM, form, serialization.BestAvailableEncryption(b"x")), "without a password"),
        (b"hello", "c2pa_private_key must be a PEM file"),
    ):
        other.write_bytes(content)
        with pytest.raises(ProvenanceError, match=says):
            make_signer(chain.certificate, other)
    with pytest.raises(ProvenanceError, match=r"c2pa_certificate: .*none.pem' cannot be read"):
        make_signer(tmp_path / "none.pem", chain.private_key)


def test_a_certificate_without_its_key_is_refused() -> None:
    with pytest.raises(ValueError, match="both, or neither"):
        AppArgs(model="m", c2pa_certificate=Path("certificate.pem"))
