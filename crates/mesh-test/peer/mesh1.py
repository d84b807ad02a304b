# SPDX-License-Identifier: Apache-2.0
"""Either end of `mesh/1`, written from docs/tunnel.md alone, on Python's own TLS.

    mesh1.py open   CERTS OWN PEER PORT...   opens streams to PEER's ports through PEER's agent
    mesh1.py marked CERTS OWN PEER PORT...   opens streams through tunnels on PEER's own ports
    mesh1.py accept CERTS OWN                is the agent of OWN: answers what is opened to it

CERTS holds tls.crt, tls.key and ca.crt. Prints a line for each thing that comes to pass.
"""

import ipaddress, os, socket, ssl, struct, sys

import marked

OPEN, OPENED, REFUSED, DATA, FIN, FIN_ACK, RESET = range(1, 8)
NAMES = dict(enumerate("OPEN OPENED REFUSED DATA FIN FIN_ACK RESET".split(), 1))
TUNNEL_PORT = 15008


def frame(kind, stream, payload=b""):
    return bytes([kind]) + len(payload).to_bytes(3, "big") + struct.pack(">I", stream) + payload


def endpoint(host, port):
    address = ipaddress.ip_address(host)
    if address.version == 4:
        address = ipaddress.ip_address(f"::ffff:{host}")
    return address.packed + struct.pack(">H", port)


def read_endpoint(data):
    address = ipaddress.ip_address(data[:16])
    return f"{address.ipv4_mapped or address}:{struct.unpack('>H', data[16:18])[0]}"


def open_frame(stream, to, source, service=None, later=b""):
    body = bytes([1, 1 if service else 0]) + endpoint(*to) + endpoint(*source)
    if service:
        body += endpoint(*service)
    return frame(OPEN, stream, body + later)


class Tunnel:
    def __init__(self, tls):
        self.tls, self.held = tls, b""

    def send(self, *frames):
        self.tls.sendall(b"".join(frames))

    def take(self, count):
        while len(self.held) < count:
            more = self.tls.recv(65536)
            if not more:
                raise EOFError
            self.held += more
        taken, self.held = self.held[:count], self.held[count:]
        return taken

    def frame(self):
        while True:
            head = self.take(8)
            kind, length = head[0], int.from_bytes(head[1:4], "big")
            payload = self.take(length)
            # Optional frames are skipped by who does not know them.
            if kind < 0x80:
                return kind, struct.unpack(">I", head[4:])[0], payload

    def expect(self, kind, stream):
        got, of, payload = self.frame()
        if (got, of) != (kind, stream):
            sys.exit(f"expected {NAMES[kind]}({stream}), got {NAMES.get(got, got)}({of})")
        return payload

    def text(self, stream, until):
        text = b""
        while not text.endswith(until):
            text += self.expect(DATA, stream)
        return text.decode()


def context(certs, server):
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    # Names of hosts play no part; who may be here is checked below.
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_verify_locations(os.path.join(certs, "ca.crt"))
    made.load_cert_chain(os.path.join(certs, "tls.crt"), os.path.join(certs, "tls.key"))
    made.set_alpn_protocols(["mesh/1"])
    return made


def secured(tls):
    if tls.selected_alpn_protocol() != "mesh/1":
        sys.exit(f"ALPN {tls.selected_alpn_protocol()}")
    uris = [value for kind, value in tls.getpeercert()["subjectAltName"] if kind == "URI"]
    if len(uris) != 1:
        sys.exit(f"names {uris}")
    print("peer", uris[0])
    return Tunnel(tls)


def dial(certs, own, peer):
    return through(certs, socket.create_connection((peer, TUNNEL_PORT), source_address=(own, 0)))


def through(certs, plain):
    plain.settimeout(15)
    return secured(context(certs, False).wrap_socket(plain))


def opener(certs, own, peer, port, refused):
    port, refused = int(port), int(refused)
    tunnel = dial(certs, own, peer)
    # Data follows OPEN at once, in one write and before the reply.
    tunnel.send(open_frame(1, (peer, port), (own, 40001)), frame(DATA, 1, b"ID\n"))
    tunnel.expect(OPENED, 1)
    print("identity", tunnel.text(1, b"\n").strip())
    tunnel.send(frame(FIN, 1))
    ends = sorted([tunnel.frame()[:2], tunnel.frame()[:2]])
    print("ends", ends == [(FIN, 1), (FIN_ACK, 1)])
    # The acknowledgement comes with the next OPEN, which has a service and fields of a later version.
    again = open_frame(2, (peer, port), (own, 40002), ("10.96.0.1", 80), b"later")
    for byte in frame(FIN_ACK, 1) + frame(0xA0, 0, b"optional") + again + frame(DATA, 2, b"ECHO\n"):
        tunnel.send(bytes([byte]))
    tunnel.expect(OPENED, 2)
    whole = b""
    for size in (1, 20000, 262144):
        data = os.urandom(size)
        tunnel.send(frame(DATA, 2, data))
        whole += data
    tunnel.send(frame(FIN, 2, b"payload of later versions"))
    back, ends = b"", set()
    while ends != {FIN, FIN_ACK}:
        kind, of, payload = tunnel.frame()
        if of != 2:
            sys.exit(f"stream {of}")
        back += payload if kind == DATA else b""
        ends |= {kind} - {DATA}
    print("echo", back == whole)
    tunnel.send(frame(FIN_ACK, 2), open_frame(3, (peer, refused), (own, 40003)), frame(DATA, 3, b"x"))
    reason, cause = struct.unpack(">HH", tunnel.expect(REFUSED, 3)[:4])
    print("refused", reason, cause)
    # The tunnel goes on: an address that is not ours, the pod's own tunnel port, another address.
    for stream, to, source in (
        (4, (peer, port), ("10.99.99.99", 40004)),
        (5, (peer, TUNNEL_PORT), (own, 40005)),
        (6, ("10.99.99.99", port), (own, 40006)),
    ):
        tunnel.send(open_frame(stream, to, source), frame(DATA, stream, b"late"), frame(FIN, stream))
        print("refused", *struct.unpack(">HH", tunnel.expect(REFUSED, stream)[:4]))
    # An application that is left resets its connection.
    tunnel.send(open_frame(7, (peer, port), (own, 40007)))
    tunnel.expect(OPENED, 7)
    # A number that is not the open stream's is a violation.
    tunnel.send(frame(DATA, 9, b"x"))
    reason = struct.unpack(">H", tunnel.expect(RESET, 7)[:2])[0]
    try:
        tunnel.frame()
        print("goes on")
    except EOFError:
        # close_notify, not a cut: Python tells them apart.
        print("violation", reason)


def asked(tunnel, stream, to, own):
    """What comes of asking for `to`: who answers there, or why nobody does."""
    tunnel.send(open_frame(stream, to, (own, 40000 + stream)), frame(DATA, stream, b"ID\n"))
    kind, of, payload = tunnel.frame()
    if of != stream or kind not in (OPENED, REFUSED):
        sys.exit(f"{NAMES.get(kind, kind)}({of})")
    if kind == REFUSED:
        return "refused {} {}".format(*struct.unpack(">HH", payload[:4]))
    said = tunnel.text(stream, b"\n").strip()
    tunnel.send(frame(FIN, stream))
    for _ in range(2):
        tunnel.frame()
    tunnel.send(frame(FIN_ACK, stream))
    return said


def on_ports(certs, own, peer, port, other):
    port, other = int(port), int(other)
    # The tunnel has reached one port of the application, and another is asked for, and the first again.
    tunnel = through(certs, marked.connect(own, peer, port))
    for stream, of in enumerate((port, other, port), 1):
        print(of, asked(tunnel, stream, (peer, of), own))
    # A tunnel on the tunnels' own port may be asked for either.
    tunnel = dial(certs, own, peer)
    for stream, of in enumerate((port, other), 1):
        print(of, asked(tunnel, stream, (peer, of), own))


def acceptor(certs, own):
    listener = socket.create_server((own, TUNNEL_PORT))
    print("up", flush=True)
    made = context(certs, True)
    while True:
        plain, source = listener.accept()
        try:
            # The agent looks again for whom it knows.
            serve(secured(made.wrap_socket(plain, server_side=True)), source[0])
        except (EOFError, ssl.SSLError, OSError) as why:
            print("tunnel ended", type(why).__name__)


def serve(tunnel, source):
    last, late = 0, False
    while True:
        kind, stream, body = tunnel.frame()
        if stream == last and (late or kind == FIN_ACK):
            continue
        if kind != OPEN or stream != last + 1 or body[0] < 1:
            sys.exit(f"{NAMES.get(kind, kind)}({stream}) behind stream {last}")
        last, late = stream, False
        to, client = read_endpoint(body[2:20]), read_endpoint(body[20:38])
        print("open", stream, to, client, client.rsplit(":", 1)[0] == source)
        port = int(to.rsplit(":", 1)[1])
        if port == 7001:
            # connect_failed: it refused.
            tunnel.send(frame(REFUSED, stream, struct.pack(">HHQ", int(sys.argv[4]), 1, 0)))
            # What was sent before the reply came is thrown away until the next OPEN.
            late = True
            continue
        tunnel.send(frame(0xFF, 0, b"?"), frame(OPENED, stream))
        if port == 7002:
            # The application has reset its connection.
            tunnel.expect(DATA, stream)
            tunnel.send(frame(RESET, stream, struct.pack(">HHQ", 0, 0, 0)))
            tunnel.tls.unwrap()
            return
        total = 0
        while True:
            kind, of, payload = tunnel.frame()
            if of != stream:
                sys.exit(f"stream {of} in stream {stream}")
            if kind == FIN:
                break
            if kind != DATA:
                sys.exit(f"{NAMES.get(kind, kind)} in stream {stream}")
            total += len(payload)
            # In frames of another size than they came.
            for begin in range(0, len(payload), 9973):
                tunnel.send(frame(DATA, stream, payload[begin : begin + 9973]))
        tunnel.send(frame(FIN, stream), frame(FIN_ACK, stream))
        print("served", stream, total)


if __name__ != "__main__":
    pass
elif sys.argv[1] == "open":
    opener(*sys.argv[2:])
elif sys.argv[1] == "marked":
    on_ports(*sys.argv[2:])
else:
    acceptor(*sys.argv[2:4])
