"""Tokens for tests of the HTTP API, and the keys they are signed with."""

from __future__ import annotations

import json
import time
from functools import cache
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

SECRET: Final = b"0123456789abcdef0123456789abcdef0123456789"
AUDIENCE: Final = "b2s"


@cache
def rsa_key(name: str = "first", bits: int = 2048) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


@cache
def ec_key(name: str = "first") -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def jwk(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, key_id: str, **more: Any) -> dict[str, Any]:
    if isinstance(key, rsa.RSAPrivateKey):
        found = jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key())
    else:
        found = jwt.algorithms.ECAlgorithm.to_jwk(key.public_key())
    return {**json.loads(found), "kid": key_id, "use": "sig", **more}


def claims(**changed: Any) -> dict[str, Any]:
    """The claims of a good token; a changed claim that is None is left out."""
    now = int(time.time())
    good = {"sub": "ann", "role": "etl_operator", "aud": AUDIENCE, "iat": now, "exp": now + 300}
    return {name: value for name, value in {**good, **changed}.items() if value is not None}


def token(
    key: Any = SECRET, algorithm: str = "HS256", headers: dict[str, Any] | None = None, **changed: Any
) -> str:
    return jwt.encode(claims(**changed), key, algorithm, headers=headers)


def bearer(**changed: Any) -> dict[str, str]:
    return {"Authorization": f"Bearer {token(**changed)}"}
