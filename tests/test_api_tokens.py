"""Which tokens the HTTP API believes, and which it does not."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from b2s.api.keys import AnyOf, FixedKeys, Key, Keys, KeySet, key_set, keys_of_set, pem_key, secret_key
from b2s.api.problems import Problem
from b2s.api.settings import TokenRules
from b2s.api.tokens import Identity, Verifier
from b2s.errors import UsageError
from tests.tokens import AUDIENCE, SECRET, claims, ec_key, jwk, pem, rsa_key, token

LOG = structlog.get_logger()


def identify(keys: Keys, authorization: str | None, **rules: Any) -> Identity:
    verifier = Verifier(keys, TokenRules(AUDIENCE, **rules))
    return asyncio.run(verifier.identify(authorization))


def secret() -> Keys:
    return FixedKeys((secret_key(SECRET, "test"),))


def public(tmp_path: Path, key: Any) -> Keys:
    path = tmp_path / "key.pem"
    path.write_bytes(pem(key))
    return FixedKeys((pem_key(path),))


def refused(status: int, code: str, keys: Keys, authorization: str | None, **rules: Any) -> Problem:
    with pytest.raises(Problem) as caught:
        identify(keys, authorization, **rules)
    assert (caught.value.status, caught.value.code) == (status, code), caught.value.message
    if status == 401:
        assert caught.value.headers["WWW-Authenticate"].startswith('Bearer realm="b2s"')
    return caught.value


def test_a_good_token_is_a_subject_and_a_role(tmp_path: Path) -> None:
    ann = Identity("ann", "etl_operator")
    assert identify(secret(), f"Bearer {token()}") == ann
    assert identify(secret(), f"bearer   {token()} ") == ann
    rs256 = token(rsa_key(), "RS256", {"kid": "whatever"})
    assert identify(public(tmp_path, rsa_key()), f"Bearer {rs256}") == ann
    assert identify(public(tmp_path, ec_key()), f"Bearer {token(ec_key(), 'ES256')}") == ann


@pytest.mark.parametrize(
    "authorization",
    ["Bearer", "Bearer ", "Basic YTpi", "Bearer a.b", "Bearer a.b.c", "Bearer ...", f"Bearer {'x' * 9000}",
     "Bearer \x00.\x00.\x00"],
)  # fmt: skip
def test_what_is_no_token_is_refused(authorization: str) -> None:
    refused(401, "auth.invalid", secret(), authorization)


def test_no_token_at_all_is_asked_for() -> None:
    assert refused(401, "auth.missing", secret(), None).headers["WWW-Authenticate"] == 'Bearer realm="b2s"'
    refused(401, "auth.missing", secret(), "")


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"exp": int(time.time()) - 60}, "auth.expired"),
        ({"exp": None}, "auth.invalid"),
        ({"exp": "soon"}, "auth.invalid"),
        ({"nbf": int(time.time()) + 600}, "auth.invalid"),
        ({"iat": int(time.time()) + 600}, "auth.invalid"),
        ({"aud": None}, "auth.invalid"),
        ({"aud": "another"}, "auth.invalid"),
        ({"aud": []}, "auth.invalid"),
        ({"sub": None}, "auth.invalid"),
        ({"sub": "  "}, "auth.invalid"),
        ({"sub": "x" * 256}, "auth.invalid"),
        ({"sub": "a\x00b"}, "auth.invalid"),
    ],
    ids=range(12),
)
def test_a_token_that_says_what_it_must_not_is_refused(changed: dict[str, Any], code: str) -> None:
    refused(401, code, secret(), f"Bearer {token(**changed)}")


def test_an_audience_may_be_one_of_several_and_clocks_may_differ_a_little() -> None:
    now = int(time.time())
    assert identify(secret(), f"Bearer {token(aud=['x', AUDIENCE])}").subject == "ann"
    assert identify(secret(), f"Bearer {token(exp=now - 20)}", leeway_s=30).subject == "ann"
    refused(401, "auth.expired", secret(), f"Bearer {token(exp=now - 20)}", leeway_s=5)
    assert identify(secret(), f"Bearer {token(nbf=now + 20, iat=now + 20)}", leeway_s=30).subject == "ann"


def test_an_issuer_that_is_asked_for_has_to_be_there() -> None:
    rules = {"issuer": "https://id.example.com"}
    refused(401, "auth.invalid", secret(), f"Bearer {token()}", **rules)
    refused(401, "auth.invalid", secret(), f"Bearer {token(iss='https://other')}", **rules)
    assert identify(secret(), f"Bearer {token(iss='https://id.example.com')}", **rules).subject == "ann"


def forged(algorithm: str, signature: Callable[[bytes], bytes], **header: Any) -> str:
    """A token made by hand, as no library would make it."""

    def part(value: object) -> bytes:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=")

    signed = part({"typ": "JWT", "alg": algorithm, **header}) + b"." + part(claims(role="etl_admin"))
    return (signed + b"." + base64.urlsafe_b64encode(signature(signed)).rstrip(b"=")).decode()


def mac_of(secret_: bytes, text: bytes) -> bytes:
    return hmac.new(secret_, text, hashlib.sha256).digest()


@pytest.mark.parametrize(
    "algorithm", ["none", "None", "NONE", "", "HS256", "HS384", "HS512", "RS512", "PS256"]
)
def test_a_public_key_is_not_taken_for_a_secret_and_no_signature_for_one(
    tmp_path: Path, algorithm: str
) -> None:
    """The token is signed with HMAC over the public key, which everybody has, or not at all."""
    for key in (rsa_key(), ec_key()):
        known = public(tmp_path, key)
        for secret_ in (pem(key), pem(key).strip(), b""):
            mac = forged(algorithm, partial(mac_of, secret_))
            refused(401, "auth.invalid", known, f"Bearer {mac}")
        refused(401, "auth.invalid", known, f"Bearer {forged(algorithm, lambda _: b'')}")


def test_a_token_does_not_bring_its_own_key(tmp_path: Path) -> None:
    mine = rsa_key("mine")
    for header in ({"jwk": jwk(mine, "x")}, {"jku": "https://evil.example.com"}, {"x5u": "https://evil"}):
        refused(401, "auth.invalid", public(tmp_path, rsa_key()), f"Bearer {token(mine, 'RS256', header)}")
    refused(401, "auth.invalid", secret(), f"Bearer {token(headers={'crit': ['x'], 'x': 1})}")
    refused(401, "auth.invalid", secret(), f"Bearer {forged('HS256', lambda _: b'', kid=['a'])}")


def test_a_changed_token_is_refused() -> None:
    head, body, signature = token().split(".")
    other = token(role="etl_admin").split(".")[1]
    refused(401, "auth.invalid", secret(), f"Bearer {head}.{other}.{signature}")
    refused(401, "auth.invalid", secret(), f"Bearer {head}.{body}.{signature[:-2]}AA")


# -- roles --


@pytest.mark.parametrize(
    ("rules", "changed", "role"),
    [
        ({}, {"role": "etl_admin"}, "etl_admin"),
        ({"roles": {"ops": "etl_operator"}}, {"role": "ops"}, "etl_operator"),
        ({"role_claim": "roles"}, {"roles": ["x", "etl_reader", "etl_admin", 7]}, "etl_admin"),
        ({"role_claim": "realm_access.roles"}, {"realm_access": {"roles": ["etl_reader"]}}, "etl_reader"),
        ({"role_claim": "https://b2s/role"}, {"https://b2s/role": "etl_reader"}, "etl_reader"),
        ({"role_claim": "scope"}, {"scope": "openid etl_reader"}, "etl_reader"),
        ({"subject_claim": "email"}, {"email": "ann@example.com"}, "etl_operator"),
    ],
    ids=str,
)
def test_the_role_is_found_where_it_is_said_to_be(
    rules: dict[str, Any], changed: dict[str, Any], role: str
) -> None:
    found = identify(secret(), f"Bearer {token(**changed)}", **rules)
    assert found == Identity(changed.get("email", "ann"), role)


@pytest.mark.parametrize(
    "changed",
    [{"role": None}, {"role": "postgres"}, {"role": "etl_owner"}, {"role": "etl_admin "}, {"role": 1},
     {"role": {"a": "etl_admin"}}, {"role": "etl_operator etl_admin"}],
    ids=str,
)  # fmt: skip
def test_only_roles_on_the_list_are_taken(changed: dict[str, Any]) -> None:
    problem = refused(403, "auth.no_role", secret(), f"Bearer {token(**changed)}")
    assert problem.hint == "it accepts: etl_admin, etl_operator, etl_reader"


# -- keys --


class Published:
    """A key set that can be changed, taken away, and asked how often it was looked up."""

    def __init__(self, *keys: dict[str, Any]) -> None:
        self.document: Any = {"keys": list(keys)}
        self.now = 1000.0
        self.lookups = 0
        self.set = KeySet(self.fetch, LOG, lambda: self.now)

    def fetch(self) -> Any:
        self.lookups += 1
        if self.document is None:
            raise OSError("away")
        return self.document

    def found(self, *wanted: tuple[str, str | None]) -> list[list[str | None]]:
        async def ask() -> list[list[str | None]]:
            return [[key.key_id for key in await self.set.candidates(*one)] for one in wanted]

        return asyncio.run(ask())


def test_a_key_set_gives_the_keys_of_an_algorithm_by_their_id() -> None:
    published = Published(jwk(rsa_key(), "r1"), jwk(rsa_key("second"), "r2"), jwk(ec_key(), "e1"))
    found = published.found(
        ("RS256", "r2"), ("RS256", None), ("ES256", "e1"), ("HS256", None), ("none", None)
    )
    assert found == [["r2"], ["r1", "r2"], ["e1"], [], []]
    assert identify(published.set, f"Bearer {token(ec_key(), 'ES256', {'kid': 'e1'})}").subject == "ann"
    refused(401, "auth.invalid", published.set, f"Bearer {token(ec_key('other'), 'ES256', {'kid': 'e1'})}")


@pytest.mark.parametrize(
    "document",
    [
        {"keys": [{"kty": "oct", "k": base64.urlsafe_b64encode(SECRET).decode(), "kid": "s"}]},
        {"keys": [jwk(rsa_key(), "enc", use="enc")]},
        {"keys": [jwk(rsa_key("small", 1024), "small")]},
        {"keys": [jwk(rsa_key(), "ps", alg="PS256"), jwk(rsa_key(), "hs", alg="HS256")]},
        {"keys": [jwk(ec.generate_private_key(ec.SECP384R1()), "p384")]},
        {"keys": [{"kty": "RSA", "n": "!", "e": "AQAB"}, {"kty": "EC"}, "text", None, 1]},
        {"keys": {}}, {"keys": None}, [], "text", None,
    ],
    ids=range(11),
)  # fmt: skip
def test_keys_that_are_of_no_use_are_left_out(document: Any) -> None:
    assert keys_of_set(document) == ()


def test_a_key_set_is_looked_up_again_after_a_while_and_for_an_unknown_key_but_not_at_every_word() -> None:
    published = Published(jwk(rsa_key(), "old"))
    assert published.found(("RS256", "old"), ("RS256", "old")) == [["old"], ["old"]]
    assert published.lookups == 1
    published.document = {"keys": [jwk(rsa_key("second"), "new")]}
    assert published.found(("RS256", "new")) == [[]]
    assert published.lookups == 1, "the set was looked up a moment ago"
    published.now += 11
    assert published.found(("RS256", "new")) == [["new"]]
    assert published.found(*[("RS256", f"guess {n}") for n in range(50)]) == [[]] * 50
    assert published.lookups == 2
    published.now += 301
    assert published.found(("RS256", "new"), ("RS256", "old")) == [["new"], []]
    assert published.lookups == 3


def test_a_key_set_that_is_away_leaves_the_keys_of_the_last_time_and_is_asked_ever_less_often() -> None:
    published = Published(jwk(rsa_key(), "r1"))
    published.document, kept = None, published.document
    assert published.found(("RS256", "r1")) == [[]]
    assert asyncio.run(published.set.is_ready()) is False
    published.document = kept
    published.now += 11
    assert published.found(("RS256", "r1")) == [["r1"]]
    published.document = None
    published.now += 301
    lookups = published.lookups
    for _ in range(600):
        published.now += 0.5
        assert published.found(("RS256", "r1")) == [["r1"]]
    assert published.lookups - lookups <= 10
    published.document = {"keys": [jwk(rsa_key("second"), "r2")]}
    published.now += 61
    assert published.found(("RS256", "r2")) == [["r2"]]


def test_a_key_set_may_be_a_file_that_changes(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [jwk(ec_key(), "e1")]}), encoding="utf-8")
    keys = AnyOf([secret(), key_set(str(path), LOG)])
    assert identify(keys, f"Bearer {token(ec_key(), 'ES256', {'kid': 'e1'})}").subject == "ann"
    assert identify(keys, f"Bearer {token()}").subject == "ann"
    assert asyncio.run(keys.is_ready()) is True


def test_keys_that_would_be_unsafe_are_refused_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    for content, message in (
        (rsa_key().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), "is a private key"),
        (pem(rsa_key("small", 1024)), "is neither an RSA key of 2048 bits"),
        (pem(ec.generate_private_key(ec.SECP384R1())), "is neither an RSA key"),
        (b"-----BEGIN PUBLIC KEY-----\nxxxx\n-----END PUBLIC KEY-----\n", "is no public key in PEM"),
        (SECRET, "is no public key in PEM"),
    ):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=message):
            pem_key(path)
    with pytest.raises(UsageError, match="has 5 bytes: HS256 needs at least 32"):
        secret_key(b"short", "FILE")
    with pytest.raises(UsageError, match="is not safe from change on its way"):
        key_set("http://id.example.com/jwks.json", LOG)
    for place in ("/nowhere/jwks.json", "file:///etc/passwd", "ftp://id.example.com/jwks"):
        with pytest.raises(UsageError, match="there is no key set"):
            key_set(place, LOG)


def test_a_key_is_only_ever_used_with_its_own_algorithm() -> None:
    """Even keys that were mixed up on their way here do not verify anything."""
    mixed_up = FixedKeys((Key("RS256", SECRET), Key("HS256", rsa_key().public_key())))
    for authorization in (token(), token(rsa_key(), "RS256")):
        refused(401, "auth.invalid", mixed_up, f"Bearer {authorization}")
