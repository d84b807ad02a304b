# SPDX-License-Identifier: Apache-2.0
"""A TCP connection whose SYN carries the option of tunnels (docs/tunnel.md, 1), IPv4.

The kernel cannot be asked for the option, so the three-way handshake is done by hand on a raw
socket, and an ordinary socket then goes on from there (TCP_REPAIR; needs CAP_NET_ADMIN).
"""

import os, socket, struct, subprocess, time

MARK = bytes([0xFE, 4]) + b"mS"
# include/uapi/linux/tcp.h
TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, TCP_REPAIR_OPTIONS, TCP_REPAIR_WINDOW = 19, 20, 21, 22, 29
RECEIVED, SENT = 1, 2
MSS, WINDOW = 1200, 65535
SYN, ACK = 0x02, 0x10


def checksum(data):
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def segment(ends, seq, ack, flags, options=b""):
    (own, sport), (peer, dport) = ends
    offset = (20 + len(options)) // 4 << 4
    tcp = struct.pack(">HHIIBBHHH", sport, dport, seq, ack, offset, flags, WINDOW, 0, 0) + options
    pseudo = socket.inet_aton(own) + socket.inet_aton(peer) + struct.pack(">BBH", 0, 6, len(tcp))
    return tcp[:16] + struct.pack(">H", checksum(pseudo + tcp)) + tcp[18:]


def nft(rules):
    subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)


def answer(raw, ends, seq):
    """The sequence number of the SYN-ACK to `ends`' SYN."""
    (_, sport), (peer, dport) = ends
    until = time.monotonic() + 10
    while time.monotonic() < until:
        packet, (source, _) = raw.recvfrom(65535)
        tcp = packet[(packet[0] & 15) * 4 :]
        of, to, theirs, ack, _, flags = struct.unpack(">HHIIBB", tcp[:14])
        if (source, of, to, flags, ack) == (peer, dport, sport, SYN | ACK, (seq + 1) & 0xFFFFFFFF):
            return theirs
    raise TimeoutError("no SYN-ACK")


def connect(own, peer, port, mark=MARK):
    """A socket that is connected to `port` of `peer`, by a SYN with `mark`."""
    stream = socket.socket()
    stream.bind((own, 0))
    ends = (stream.getsockname(), (peer, port))
    seq = int.from_bytes(os.urandom(4), "big")
    # The kernel knows nothing of the SYN, and would reset what answers it.
    nft(f"table ip by_hand {{ chain out {{ type filter hook output priority 0;"
        f" tcp sport {ends[0][1]} tcp flags & rst == rst drop\n }}\n }}")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
            raw.settimeout(10)
            options = bytes([2, 4]) + struct.pack(">H", MSS) + mark
            raw.sendto(segment(ends, seq, 0, SYN, options), (peer, 0))
            theirs = answer(raw, ends, seq)
            seq = (seq + 1) & 0xFFFFFFFF
            theirs = (theirs + 1) & 0xFFFFFFFF
            stream.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
            for queue, next in ((SENT, seq), (RECEIVED, theirs)):
                stream.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
                stream.setsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ, struct.pack("=I", next))
            stream.connect((peer, port))
            # The peer's segment size, and windows of both as they are: none was offered to be scaled.
            agreed = struct.pack("=IIII", 2, MSS, 3, 0)
            stream.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_OPTIONS, agreed)
            window = struct.pack("=IIIII", theirs, WINDOW, WINDOW, WINDOW, theirs)
            stream.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_WINDOW, window)
            # The third of the handshake, and from here on the kernel's.
            raw.sendto(segment(ends, seq, theirs, ACK), (peer, 0))
            stream.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 0)
    finally:
        nft("delete table ip by_hand")
    return stream
