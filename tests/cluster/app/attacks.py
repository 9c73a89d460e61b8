"""What a hostile pod does with the network and its own tokens: one JSON object in, one out. In the image of the tests' app.

{"do": "certify", "url", "token", "uri"}                  ask the identity service for a certificate; status, said, key and chain
{"do": "forge", "uri", "issuer"}                          a certificate by an authority of one's own; key and chain
{"do": "tls", "host", "port", "name", "alpn", "key", "chain", "send"}   TLS with that certificate ("" for none); received, or error
"""

from __future__ import annotations

import datetime
import json
import socket
import ssl
import sys
import tempfile
import urllib.error
import urllib.request
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


def pem(key: ec.EllipticCurvePrivateKey) -> str:
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return key.private_bytes(*form).decode()


def certify(asked: dict[str, Any]) -> dict[str, Any]:
    key = ec.generate_private_key(ec.SECP256R1())
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(asked["uri"])])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(names, critical=True)
    csr = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {asked['token']}"}
    request = urllib.request.Request(asked["url"], json.dumps({"csr": csr}).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=10, context=ssl._create_unverified_context()) as answer:
            said = answer.read().decode()
            return {"status": answer.status, "said": said, "key": pem(key), "chain": json.loads(said)["chain"]}
    except urllib.error.HTTPError as error:
        with error:
            return {"status": error.code, "said": error.read().decode()}


def forge(asked: dict[str, Any]) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC)
    root, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, asked["issuer"])])
    chain = ""
    for subject, public, leaf in ((x509.Name([]), key.public_key(), True), (issuer, root.public_key(), False)):
        builder = (
            x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public).serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=not leaf, path_length=None), critical=True)
        )  # fmt: skip
        if leaf:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(asked["uri"])]), critical=True)
        chain += builder.sign(root, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
    return {"key": pem(key), "chain": chain}


def tls(asked: dict[str, Any]) -> dict[str, Any]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols([asked["alpn"]])
    try:
        if asked["chain"]:
            with tempfile.NamedTemporaryFile() as file:
                file.write(asked["key"].encode() + asked["chain"].encode())
                file.flush()
                context.load_cert_chain(file.name)
        with (
            socket.create_connection((asked["host"], asked["port"]), timeout=5) as plain,
            context.wrap_socket(plain, server_hostname=asked["name"]) as made,
        ):
            made.sendall(asked["send"].encode())
            made.settimeout(5)
            received = b""
            while len(received) < 1 << 16:  # until the other side ends, or says no more
                try:
                    piece = made.recv(1 << 16)
                except TimeoutError:
                    break
                if not piece:
                    break
                received += piece
            return {"received": received.decode("utf-8", "replace")}
    except OSError as error:
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    wanted = json.load(sys.stdin)
    print(json.dumps({"certify": certify, "forge": forge, "tls": tls}[wanted["do"]](wanted)))
