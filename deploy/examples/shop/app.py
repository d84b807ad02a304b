#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A small shop: HTTP in front, Redis for counting, PostgreSQL for orders. Standard library only.

Environment: LISTEN (address:port), REDIS and POSTGRES (host:port).
Requests:    /healthz, / (visits and orders), /order?item=NAME (a new order).
One line per request on standard output: client address, client port, status, request line.
Every request opens its own connections to Redis and PostgreSQL, and closes them.
"""

import json
import os
import socket
import struct
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

TIMEOUT = 5.0


def connect(variable):
    host, port = os.environ[variable].rsplit(":", 1)
    return socket.create_connection((host.strip("[]"), int(port)), timeout=TIMEOUT)


def redis(*words):
    """One command in RESP; integers and simple strings as answers."""
    request = b"*%d\r\n" % len(words)
    for word in words:
        word = word.encode()
        request += b"$%d\r\n%s\r\n" % (len(word), word)
    with connect("REDIS") as link, link.makefile("rb") as answers:
        link.sendall(request)
        line = answers.readline().decode().rstrip("\r\n")
    if line[:1] == ":":
        return int(line[1:])
    if line[:1] == "+":
        return line[1:]
    raise RuntimeError(f"redis: {line}")


def postgres(query):
    """One simple query (protocol 3.0, trust authentication); rows of strings."""
    start = b"user\0postgres\0database\0postgres\0\0"
    start = struct.pack("!ii", len(start) + 8, 196608) + start
    text = query.encode() + b"\0"
    rows, error = [], None
    with connect("POSTGRES") as link, link.makefile("rb") as answers:

        def until_ready():
            nonlocal error
            while True:
                head = answers.read(5)
                if len(head) < 5:
                    raise RuntimeError("postgres closed the connection")
                kind, length = struct.unpack("!ci", head)
                body = answers.read(length - 4)
                if kind == b"D":
                    rows.append(row(body))
                elif kind == b"E":
                    error = body.replace(b"\0", b" ").decode(errors="replace")
                    if not rows and b"FATAL" in body:
                        return
                elif kind == b"Z":
                    return

        link.sendall(start)
        until_ready()
        if error is None:
            link.sendall(b"Q" + struct.pack("!i", len(text) + 4) + text)
            until_ready()
            link.sendall(b"X\0\0\0\4")
    if error is not None:
        raise RuntimeError(f"postgres: {error}")
    return rows


def row(body):
    (count,) = struct.unpack_from("!h", body)
    at, columns = 2, []
    for _ in range(count):
        (length,) = struct.unpack_from("!i", body, at)
        at += 4
        columns.append(None if length < 0 else body[at : at + length].decode())
        at += max(length, 0)
    return columns


def front_page():
    orders = postgres("SELECT id, item FROM orders ORDER BY id DESC LIMIT 10")
    return {
        "visits": redis("INCR", "visits"),
        "orders": [{"id": int(number), "item": item} for number, item in orders],
    }


def order(item):
    if not item.isalnum():
        raise ValueError("an item is letters and digits")
    rows = postgres(f"INSERT INTO orders (item) VALUES ('{item}') RETURNING id")
    return {"order": int(rows[0][0]), "item": item, "sold": redis("INCR", f"sold-{item}")}


class Shop(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        url = urlsplit(self.path)
        try:
            if url.path == "/healthz":
                status, answer = 200, {"ok": True}
            elif url.path == "/":
                status, answer = 200, front_page()
            elif url.path == "/order":
                status, answer = 200, order(parse_qs(url.query).get("item", [""])[0])
            else:
                status, answer = 404, {"error": "no such page"}
        except ValueError as error:
            status, answer = 400, {"error": str(error)}
        except (OSError, RuntimeError) as error:
            status, answer = 503, {"error": str(error)}
        answer["client"] = "{} {}".format(*self.client_address[:2])
        body = json.dumps(answer).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code="-", size="-"):
        address = self.client_address[0].removeprefix("::ffff:")
        print(address, self.client_address[1], int(code), self.requestline, flush=True)

    def log_message(self, format, *args):
        print(format % args, file=sys.stderr, flush=True)


class Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6
    request_queue_size = 128

    def server_bind(self):
        # One socket for both families.
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


def main():
    host, port = os.environ.get("LISTEN", "[::]:8080").rsplit(":", 1)
    Server((host.strip("[]"), int(port)), Shop).serve_forever()


if __name__ == "__main__":
    main()
