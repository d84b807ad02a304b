# SPDX-License-Identifier: Apache-2.0
"""Peers of `mesh/1` that break its rules, and what an agent makes of each.

    hostile.py try   JSON    one attempt; prints what came of it and after how many seconds
    hostile.py hold  JSON    keeps a stream open: says something on it at each SIGUSR1, or waits until
                             it is reset, and asks again
    hostile.py serve PORT    an application: says of each connection what it has got, and sends it back

An attempt has `peer` (the pod's address), `port` (its application's), `certs` (a directory) and `how`,
the name of a function below.
"""

import json, signal, socket, ssl, struct, sys, time

import mesh1
from mesh1 import DATA, FIN, FIN_ACK, OPENED, REFUSED, RESET, frame, open_frame

# What must not reach an application.
BYTES = b"bytes of an enemy"
# Longer than any deadline of the protocol.
PATIENCE = 15


class Attempt:
    def __init__(self, given):
        self.given = given
        self.peer, self.port = given["peer"], given["port"]
        self.context = self.made(given.get("certs"))
        # What came of it before its end.
        self.before = ""

    def made(self, certs):
        """TLS as it should be, but for what the attempt says."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if self.given.get("version") == "1.2":
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        else:
            context.minimum_version = ssl.TLSVersion.TLSv1_3
        if self.given.get("alpn", True):
            context.set_alpn_protocols(["mesh/1"])
        if certs:
            self.show(context, certs)
        return context

    @staticmethod
    def show(context, certs):
        context.load_cert_chain(f"{certs}/tls.crt", f"{certs}/tls.key")

    def connected(self, peer=None):
        to = (peer or self.peer, mesh1.TUNNEL_PORT)
        plain = socket.create_connection(to, timeout=PATIENCE)
        self.own = plain.getsockname()[0]
        # Sees the connection's end, whatever TLS makes of it.
        self.plain = plain.dup()
        self.plain.settimeout(PATIENCE)
        return plain

    def tunnel(self, session=None, peer=None):
        tls = self.context.wrap_socket(self.connected(peer), session=session)
        return mesh1.Tunnel(tls)

    def opening(self):
        """OPEN as it should be, but for what the attempt says."""
        to = self.given.get("to", [self.peer, self.port])
        source = self.given.get("source", self.own)
        return open_frame(1, to, (source, 40001))

    def over(self):
        """Waits for the end of the TCP connection."""
        try:
            while self.plain.recv(65536):
                pass
        except ConnectionError:
            pass
        return "ended"


def asked(attempt, tunnel):
    """Data follows OPEN at once, before it is known whether there is a handshake at all."""
    tunnel.send(attempt.opening(), frame(DATA, 1, BYTES))
    kind, _, payload = tunnel.frame()
    if kind == REFUSED:
        return "refused {} {}".format(*struct.unpack(">HH", payload[:4]))
    return mesh1.NAMES.get(kind, str(kind))


def ask(attempt):
    return asked(attempt, attempt.tunnel())


def talked(attempt, tunnel, text):
    """A stream from its beginning to its end: what the application sent back."""
    tunnel.send(attempt.opening(), frame(DATA, 1, text), frame(FIN, 1))
    tunnel.expect(OPENED, 1)
    back, ends = b"", set()
    while ends != {FIN, FIN_ACK}:
        kind, _, payload = tunnel.frame()
        back += payload if kind == DATA else b""
        ends |= {kind} - {DATA}
    tunnel.send(frame(FIN_ACK, 1))
    # With its end the tickets would be forgotten.
    attempt.session = tunnel.tls.session
    tunnel.tls.unwrap()
    return back.decode()


def talk(attempt):
    return talked(attempt, attempt.tunnel(), attempt.given["text"].encode())


def say(attempt):
    """Something else than TLS, or nothing."""
    plain = attempt.connected()
    plain.sendall(bytes.fromhex(attempt.given["bytes"]))
    return attempt.over()


def hello(attempt, session=None):
    """The first flight of a client."""
    given, taken = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        attempt.context.wrap_bio(given, taken, session=session).do_handshake()
    except ssl.SSLWantReadError:
        return taken.read()


def leave(attempt):
    """Begins a handshake and says nothing more."""
    # Kept: it would be closed with the last that holds it.
    plain = attempt.connected()
    plain.sendall(hello(attempt))
    return attempt.over()


def lie(attempt):
    """A frame whose length is not what it says, or may be, before a stream is open or in one."""
    kind, length, within = attempt.given["lie"]
    tunnel = attempt.tunnel()
    if within:
        tunnel.send(attempt.opening())
        tunnel.expect(OPENED, 1)
    tunnel.send(bytes([kind]) + length.to_bytes(3, "big") + struct.pack(">I", 1) + BYTES)
    try:
        while True:
            kind, _, payload = tunnel.frame()
            if kind != RESET:
                return mesh1.NAMES.get(kind, str(kind))
            attempt.before = "reset {}, ".format(*struct.unpack(">H", payload[:2]))
    except (EOFError, ConnectionError):
        return attempt.over()


def ticket(attempt):
    """A session that was proven with one certificate is offered with another in hand."""
    first = attempt.tunnel()
    before = asked(attempt, first)
    attempt.show(attempt.context, attempt.given["then"])
    again = attempt.tunnel(first.tls.session)
    return f"{before}, resumed {again.tls.session_reused}, {asked(attempt, again)}"


def stolen(attempt):
    """A ticket without the secret that belongs to it."""
    talked(attempt, attempt.tunnel(), b"stolen")
    flight = bytearray(hello(attempt, attempt.session))
    # The last thing in it is the proof of the secret.
    flight[-1] ^= 1
    plain = attempt.connected()
    plain.sendall(flight)
    return attempt.over()


def elsewhere(attempt):
    """A ticket of one pod is offered to another, with a certificate that proves nothing."""
    talked(attempt, attempt.tunnel(), b"elsewhere")
    attempt.show(attempt.context, attempt.given["then"])
    # What the ticket is worth where it came from.
    again = attempt.tunnel(attempt.session)
    attempt.before = f"resumed {again.tls.session_reused}, "
    again.tls.unwrap()
    return asked(attempt, attempt.tunnel(attempt.session, attempt.given["other"]))


def one(given):
    attempt = Attempt(given)
    begun = time.monotonic()
    try:
        came = globals()[given["how"]](attempt)
    except TimeoutError:
        came = "hangs"
    except (EOFError, ssl.SSLError, ConnectionError):
        try:
            came = attempt.over()
        except TimeoutError:
            came = "hangs"
    print(attempt.before + came)
    print(f"{time.monotonic() - begun:.3f}")


def hold(given):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    attempt = Attempt(given)
    tunnel = attempt.tunnel()
    tunnel.send(attempt.opening())
    tunnel.expect(OPENED, 1)
    # As long as the test has any use for it.
    tunnel.tls.settimeout(None)
    print("held", flush=True)
    if given["how"] == "until":
        reason = struct.unpack(">H", tunnel.expect(RESET, 1)[:2])[0]
        print(f"reset {reason}, {attempt.over()}", flush=True)
        again(attempt, tunnel.tls.session)
        return
    while True:
        signal.sigwait([signal.SIGUSR1])
        tunnel.send(frame(DATA, 1, b"still"))
        print(tunnel.expect(DATA, 1).decode(), flush=True)


def again(attempt, session):
    """Asks for the same with the ticket that it got."""
    try:
        print(asked(attempt, attempt.tunnel(session)))
    except (EOFError, ssl.SSLError, ConnectionError):
        print(attempt.over())


def serve(port):
    listener = socket.create_server(("::", int(port)), family=socket.AF_INET6, dualstack_ipv6=True)
    print("up", flush=True)
    while True:
        stream, _ = listener.accept()
        got = b""
        try:
            while data := stream.recv(65536):
                got += data
                stream.sendall(data)
        except ConnectionError:
            pass
        stream.close()
        print(f"got {got.decode()!r}", flush=True)


if __name__ == "__main__":
    what, given = sys.argv[1:3]
    if what == "serve":
        serve(given)
    else:
        {"try": one, "hold": hold}[what](json.loads(given))
