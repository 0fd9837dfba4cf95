"""The keys that tokens are verified with: a shared secret, a public key in PEM, or a JWKS file or URL.

A key is used with one algorithm only, the one of its kind: HS256 for a secret, RS256 for RSA, ES256 for the
curve P-256. A token's header only chooses among these, so a public key is never taken for a secret.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from b2s.errors import UsageError

LEAST_SECRET_BYTES: Final = 32
LEAST_RSA_BITS: Final = 2048
_REFRESHED_EVERY: Final = 300.0
_NOT_MORE_OFTEN_THAN: Final = 10.0
"""An unknown key id has the set looked up again, but whoever sends many of them does not."""
_LONGEST_BACKOFF: Final = 60.0
_FETCH_TIMEOUT: Final = 5.0


@dataclass(frozen=True, slots=True)
class Key:
    """A key, and the one algorithm it is used with."""

    algorithm: str
    material: Any
    key_id: str | None = None


class Keys(Protocol):
    """Where keys come from."""

    async def candidates(self, algorithm: str, key_id: str | None) -> Sequence[Key]:
        """The keys that a token with this header can have been signed with; none: it is refused."""

    async def is_ready(self) -> bool:
        """Whether there is any key."""


def matching(keys: Sequence[Key], algorithm: str, key_id: str | None) -> list[Key]:
    """The keys of an algorithm; with a key id, those that have it or have none."""
    return [
        key
        for key in keys
        if key.algorithm == algorithm and (key_id is None or key.key_id is None or key.key_id == key_id)
    ]


@dataclass(frozen=True, slots=True)
class FixedKeys:
    """Keys that are there for good."""

    keys: tuple[Key, ...]

    async def candidates(self, algorithm: str, key_id: str | None) -> Sequence[Key]:
        return matching(self.keys, algorithm, key_id)

    async def is_ready(self) -> bool:
        return True


class AnyOf:
    """Keys from several places."""

    def __init__(self, parts: Sequence[Keys]) -> None:
        self._parts = parts

    async def candidates(self, algorithm: str, key_id: str | None) -> Sequence[Key]:
        return [key for part in self._parts for key in await part.candidates(algorithm, key_id)]

    async def is_ready(self) -> bool:
        return all([await part.is_ready() for part in self._parts])


class KeySet:
    """A JWKS, looked up again every five minutes, and when a token names a key it does not have.

    When it cannot be had, the keys of the last time stay, and the next attempt waits longer each time.
    """

    def __init__(
        self, fetch: Callable[[], Any], log: Any, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._fetch = fetch
        self._log = log
        self._clock = clock
        self._keys: tuple[Key, ...] = ()
        self._next = 0.0
        self._tried_at = float("-inf")
        self._backoff = 1.0
        self._lock = asyncio.Lock()

    async def candidates(self, algorithm: str, key_id: str | None) -> Sequence[Key]:
        await self._refresh(lambda: self._clock() >= self._next)
        found = matching(self._keys, algorithm, key_id)
        if not found:
            await self._refresh(lambda: self._clock() - self._tried_at >= _NOT_MORE_OFTEN_THAN)
            found = matching(self._keys, algorithm, key_id)
        return found

    async def is_ready(self) -> bool:
        await self._refresh(lambda: self._clock() >= self._next)
        return bool(self._keys)

    async def _refresh(self, is_due: Callable[[], bool]) -> None:
        if not is_due():
            return
        async with self._lock:
            if not is_due():
                return
            self._tried_at = self._clock()
            try:
                keys = keys_of_set(await asyncio.to_thread(self._fetch))
            except Exception as error:  # noqa: BLE001 - whatever it is, the keys of the last time stay
                self._next = self._clock() + self._backoff
                self._log.warning(
                    "keys_not_refreshed",
                    error=type(error).__name__,
                    keys=len(self._keys),
                    retry_in_s=self._backoff,
                )
                self._backoff = min(2 * self._backoff, _LONGEST_BACKOFF)
                return
            if not keys:
                self._log.warning("key_set_is_empty")
            self._keys = keys
            self._next = self._clock() + _REFRESHED_EVERY
            self._backoff = 1.0


def keys_of_set(document: Any) -> tuple[Key, ...]:
    """The usable keys of a JWKS. A secret has no place in one, whoever published it."""
    published = document.get("keys") if isinstance(document, dict) else None
    found = []
    for one in published if isinstance(published, list) else ():
        if not isinstance(one, dict) or one.get("use", "sig") != "sig" or one.get("kty") not in ("RSA", "EC"):
            continue
        try:
            material = jwt.PyJWK.from_dict(one).key
        except jwt.PyJWTError:
            continue
        algorithm = _algorithm_of(material)
        if algorithm is not None and one.get("alg", algorithm) == algorithm:
            found.append(Key(algorithm, material, one.get("kid")))
    return tuple(found)


def secret_key(secret: bytes, source: str) -> Key:
    """A shared secret. Raises UsageError for one that could be guessed."""
    if len(secret) < LEAST_SECRET_BYTES:
        raise UsageError(
            f"{source} has {len(secret)} bytes: HS256 needs at least {LEAST_SECRET_BYTES}",
            "make one: openssl rand -base64 48",
        )
    return Key("HS256", secret)


def pem_key(path: Path) -> Key:
    """A public key in PEM. Raises UsageError for anything else, a private key above all."""
    content = path.read_bytes()
    if b"PRIVATE KEY" in content:
        raise UsageError(
            f"{path} is a private key, and the API needs none",
            f"give it the public one: openssl pkey -in {path} -pubout",
        )
    try:
        material = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        raise UsageError(f"{path} is no public key in PEM", "-----BEGIN PUBLIC KEY----- ...") from None
    algorithm = _algorithm_of(material)
    if algorithm is None:
        raise UsageError(
            f"{path} is neither an RSA key of {LEAST_RSA_BITS} bits or more nor one of the curve P-256",
            "tokens are signed with RS256 or ES256",
        )
    return Key(algorithm, material)


def _algorithm_of(material: object) -> str | None:
    if isinstance(material, rsa.RSAPublicKey) and material.key_size >= LEAST_RSA_BITS:
        return "RS256"
    if isinstance(material, ec.EllipticCurvePublicKey) and material.curve.name == "secp256r1":
        return "ES256"
    return None


def key_set(place: str, log: Any) -> KeySet:
    """A JWKS in a file, or behind a URL. Raises UsageError for a place that cannot be one."""
    url = urllib.parse.urlsplit(place)
    if url.scheme in ("http", "https"):
        if url.scheme == "http" and url.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise UsageError(f"{place} is not safe from change on its way", "https://...")
        client = jwt.PyJWKClient(place, cache_jwk_set=False, timeout=_FETCH_TIMEOUT)
        return KeySet(client.fetch_data, log)
    path = Path(place)
    if not path.is_file():
        raise UsageError(f"there is no key set {place}", "--jwks takes a file, or an https:// URL")
    return KeySet(lambda: json.loads(path.read_text(encoding="utf-8")), log)
