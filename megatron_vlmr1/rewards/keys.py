"""CURVE keys for reward services on other nodes: who may ask, and whom to trust.

A folder holds ``server.key_secret`` (the service's), ``server.key`` and ``client.key_secret`` (a trainer's), and in
``clients/`` the public keys of all who may ask. A service needs the first and the last, a trainer the other two.
"""

from __future__ import annotations

import struct
from pathlib import Path

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

_CLIENTS = "clients"
_KEY_BYTES = 32


def create(folder: Path) -> None:
    """Make a folder with new keys; secret ones are readable by their owner only.

    Raises:
        ValueError: it exists, or zmq was built without CURVE.
    """
    if folder.exists():
        raise ValueError(f"{folder}: exists already; name a new folder")
    if not zmq.has("curve"):
        raise ValueError("this build of pyzmq has no CURVE; install one with libsodium")
    (folder / _CLIENTS).mkdir(parents=True, mode=0o700)
    folder.chmod(0o700)
    for name in ("server", "client"):
        _, secret = zmq.auth.create_certificates(folder, name)
        Path(secret).chmod(0o600)
    (folder / "client.key").rename(folder / _CLIENTS / "client.key")


def for_server(socket: zmq.Socket[bytes], folder: Path) -> ThreadAuthenticator:
    """Let a socket, before it is bound, answer only those whose keys are in the folder.

    Returns:
        What has to be stopped at the end.

    Raises:
        ValueError: a key is missing or damaged.
    """
    socket.curve_publickey, socket.curve_secretkey = _pair(folder / "server.key_secret")
    socket.curve_server = True
    clients = folder / _CLIENTS
    paths = sorted(clients.glob("*.key"))
    if not paths:
        raise ValueError(f"{clients}: holds no key of anybody who may ask; `vlmr1 rewards keys` makes them")
    for path in paths:
        _load(path)  # zmq would log one that is damaged, and then refuse everybody
    authenticator = ThreadAuthenticator(socket.context)
    authenticator.start()
    authenticator.configure_curve(domain="*", location=clients)
    return authenticator


def for_client(socket: zmq.Socket[bytes], folder: Path) -> None:
    """Let a socket, before it connects, show its key and talk only to the service of the folder.

    Raises:
        ValueError: a key is missing.
    """
    socket.curve_publickey, socket.curve_secretkey = _pair(folder / "client.key_secret")
    socket.curve_serverkey = _load(folder / "server.key")[0]


def _pair(path: Path) -> tuple[bytes, bytes]:
    public, secret = _load(path)
    if secret is None:
        raise ValueError(f"{path}: holds no secret key; `vlmr1 rewards keys` makes them")
    return public, secret


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
        sizes = {len(z85.decode(key)) for key in (public, secret) if key is not None}
    except (OSError, ValueError, LookupError, struct.error) as error:
        raise ValueError(f"{path}: not a key ({error}); `vlmr1 rewards keys` makes them") from error
    if sizes != {_KEY_BYTES}:
        raise ValueError(f"{path}: not a key of {_KEY_BYTES} bytes; `vlmr1 rewards keys` makes them")
    return public, secret
