"""The reward service: one small process per node between the ranks and the reward processes.

ROUTER socket, messages of two kinds of frames: a msgpack header ``[kind, …]``, then payloads that are passed on
unread (the text of a model is unpacked only inside a reward process).

=====================  ==========================================================================================
``score``, tickets     one payload per ticket: msgpack ``[names, item]``. Answered, in any order and several at a
                       time, by ``scores``, tickets, with one `Result` each. A ticket in hand is not taken twice.
``ping``, number       ``pong``, the number, tickets in hand. What a client sent earlier, has no answer to and
                       does not see here is lost (the service was restarted), and it sends it again.
``stats``              ``stats``, a map (see `RewardPool.stats`).
=====================  ==========================================================================================
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import signal
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path

import zmq

import megatron_vlmr1
from megatron_vlmr1.rewards import keys as keys_of
from megatron_vlmr1.rewards import wire
from megatron_vlmr1.rewards.pool import PoolSettings, RewardPool
from megatron_vlmr1.rewards.wire import Result
from megatron_vlmr1.runtime.children import die_with_parent

_TICK_MS = 250
_MAX_FRAMES = 1025
_MAX_READ = 64  # messages at a time, or a client that never pauses would keep answers from all others
_HANDSHAKE_MS = 5_000  # after which a stranger's connection, which takes a descriptor, is closed
_MAX_WAITING = 100_000  # beyond this the service stops reading, and senders wait

logger = logging.getLogger(__name__)


class Server:
    """Passes items from a socket to a pool and results back, until it is told to stop or its parent is gone."""

    def __init__(
        self, bind: str, settings: PoolSettings, parent_pid: int | None = None, keys: Path | None = None
    ) -> None:
        """Listen, and start the reward processes.

        Args:
            bind: ipc://PATH, or tcp://ADDRESS:PORT with keys.
            settings: of the reward processes.
            parent_pid: end with this process.
            keys: folder of CURVE keys: only their owners are answered.

        Raises:
            ValueError: it can't listen at `bind`, or a key is missing.
        """
        self._parent_pid = parent_pid
        self._stopping = False
        self._held: dict[bytes, set[int]] = defaultdict(set)  # tickets in hand by client
        path = Path(bind.removeprefix("ipc://"))
        if bind.startswith("ipc://") and path.exists() and not path.is_socket():
            raise ValueError(f"--bind {bind}: there is a file of that name")  # which zmq would remove
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # a full queue would drop answers; clients bound what they ask for
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_ITEM_BYTES + 1024)
        if keys is None and not bind.startswith("ipc://"):
            raise ValueError(f"--bind {bind}: needs --keys, or anybody on the network could use it")
        self._authenticator = keys_of.for_server(self._socket, keys) if keys is not None else None
        try:
            self._socket.bind(bind)
        except zmq.ZMQError as error:
            raise ValueError(f"--bind {bind}: {error}") from error
        self._pool = RewardPool(settings)

    def run(self) -> None:
        """Serve until `stop`."""
        poller = zmq.Poller()
        poller.register(self._pool.fileno(), zmq.POLLIN)
        poller.register(self._socket, zmq.POLLIN)
        while not self._stopping and (self._parent_pid is None or os.getppid() == self._parent_pid):
            poller.poll(_TICK_MS)
            self._read()
            self._answer(self._pool.drain())
        self._pool.close()
        if self._authenticator is not None:
            self._authenticator.stop()
        self._socket.close()
        self._context.term()

    def stop(self) -> None:
        """Make `run` return; safe in a signal handler."""
        self._stopping = True

    def _read(self) -> None:
        for _ in range(_MAX_READ):
            if sum(map(len, self._held.values())) >= _MAX_WAITING:
                return
            try:
                client, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._handle(client, frames)
            except ValueError as error:
                logger.warning("message refused: %s", error)

    def _handle(self, client: bytes, frames: list[bytes]) -> None:
        header = wire.unpack(frames[0]) if frames else None
        match header:
            case ["ping", int(number)]:
                self._send(client, ["pong", number, list(self._held.get(client, ()))])
            case ["stats"]:
                self._send(client, ["stats", {"service_pid": os.getpid()} | self._pool.stats()])
            case ["score", list(tickets)] if len(tickets) == len(frames) - 1 < _MAX_FRAMES:
                if not all(type(ticket) is int for ticket in tickets):
                    raise ValueError("tickets are integers")
                for ticket, data in zip(tickets, frames[1:], strict=True):
                    if ticket not in self._held[client]:
                        self._held[client].add(ticket)
                        self._pool.submit((client, ticket), data)
            case _:
                raise ValueError("unknown header")

    def _answer(self, results: list[tuple[Hashable, Result]]) -> None:
        finished: dict[bytes, list[tuple[int, Result]]] = defaultdict(list)
        for key, result in results:
            assert isinstance(key, tuple)
            client, ticket = key
            finished[client].append((ticket, result))
        for client, answers in finished.items():
            self._held[client].difference_update(ticket for ticket, _ in answers)
            if not self._held[client]:
                del self._held[client]
            tickets = [ticket for ticket, _ in answers]
            self._send(client, ["scores", tickets], *(result.to_wire() for _, result in answers))

    def _send(self, client: bytes, header: list[object], *payloads: bytes) -> None:
        self._socket.send_multipart([client, wire.pack(header), *payloads])


def command(bind: str, settings: PoolSettings, keys: Path | None = None) -> list[str]:
    """Return the command line of a service with these settings; run it with `environment`."""
    return [
        *(sys.executable, "-P", "-m", "megatron_vlmr1.rewards.server", "--bind", bind),
        *("--workers", str(settings.workers), "--deadline-s", str(settings.deadline_s)),
        *("--memory-bytes", str(settings.memory_bytes)),
        *(part for path in settings.files for part in ("--functions", path)),
        *(("--keys", str(keys)) if keys is not None else ()),
    ]


def environment() -> dict[str, str]:
    """Return an environment in which a child finds this very package, also from a checkout that is not installed."""
    variables = dict(os.environ)
    root = str(Path(megatron_vlmr1.__file__).parent.parent)
    if root != sysconfig.get_path("purelib"):
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [variables.get("PYTHONPATH"), root]))
    return variables


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service in the foreground; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m megatron_vlmr1.rewards.server", description=__doc__)
    parser.add_argument("--bind", required=True, metavar="ADDRESS")
    parser.add_argument("--keys", type=Path, metavar="FOLDER")
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--deadline-s", type=float, required=True)
    parser.add_argument("--memory-bytes", type=int, required=True)
    parser.add_argument("--functions", action="append", default=[], metavar="FILE.py")
    parser.add_argument("--parent", type=int, help="process id of the parent; end with it")
    args = parser.parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if args.parent is not None:
        die_with_parent(args.parent)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # each connection takes one, also a stranger's
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # SLURM's warning, for the ranks; inherited by workers
    try:
        settings = PoolSettings(args.workers, args.deadline_s, args.memory_bytes, tuple(args.functions))
        server = Server(args.bind, settings, args.parent, args.keys)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    logger.info("serving on %s with %d workers, process %d", args.bind, args.workers, os.getpid())
    server.run()
    logger.info("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
