"""A node proxy that is not ours: HBONE by Debian's python3-h2 and Python's ssl, as Istio's ztunnel speaks it.

It runs inside a pod, in place of the proxy that another node would have there. Every line on stdin is a command, a JSON object
whose "do" names one of the methods of Peer; every command is answered by one line.
"""

import asyncio
import hashlib
import json
import random
import ssl
import struct
import subprocess
import sys

import h2.config
import h2.connection
import h2.events
import h2.exceptions
from h2.settings import SettingCodes, Settings
from hyperframe.frame import GoAwayFrame

PATIENCE = 15
# What ztunnel sets (src/proxy/h2), and the least that RFC 9113 knows.
WINDOWS = {"ztunnel": (4 << 20, 16 << 20, 1 << 20), "least": (65535, 65535, 16384)}


class Http2(h2.connection.H2Connection):
    """The library takes GOAWAY for the end of all streams; here it is noted, and they go on."""

    def _receive_goaway_frame(self, frame):
        self.goaways.append({"last": frame.last_stream_id, "code": frame.error_code})
        return [], []


class Stream:
    def __init__(self, number, headers=()):
        self.number, self.headers, self.answer = number, list(headers), None
        self.received, self.total, self.ended, self.reset, self.done = bytearray(), 0, False, None, False

    def over(self):
        return self.ended or self.reset is not None


class Tunnel:
    """One HTTP/2 connection, of either side."""

    def __init__(self, reader, writer, client, windows="ztunnel", limit=200):
        self.reader, self.writer, self.serve, self.leaving = reader, writer, None, None
        stream, connection, frame = WINDOWS[windows]
        # The library's own validation wants a :path of every request; CONNECT has none.
        unchecked = {"validate_inbound_headers": False, "validate_outbound_headers": False}
        self.http2 = Http2(h2.config.H2Configuration(client_side=client, header_encoding="utf-8", **unchecked))
        self.http2.goaways = []
        settings = {SettingCodes.INITIAL_WINDOW_SIZE: stream, SettingCodes.MAX_FRAME_SIZE: frame}
        settings |= {SettingCodes.ENABLE_PUSH: 0} if client else {SettingCodes.MAX_CONCURRENT_STREAMS: limit}
        self.http2.local_settings = Settings(client=client, initial_values=settings)
        self.http2.max_inbound_frame_size = frame
        self.http2.initiate_connection()
        if connection > 65535:
            self.http2.increment_flow_control_window(connection - 65535)
        self.streams, self.failure, self.changed, self.tasks = {}, None, asyncio.Condition(), set()
        self.flush()
        self.running = asyncio.create_task(self.run())

    def about(self):
        tls = self.writer.get_extra_info("ssl_object")
        names = [name for kind, name in tls.getpeercert()["subjectAltName"] if kind == "URI"]
        return {"peer": names, "alpn": tls.selected_alpn_protocol(), "version": tls.version(), "cipher": tls.cipher()[0]}

    def flush(self):
        if not self.writer.is_closing():
            self.writer.write(self.http2.data_to_send())

    async def run(self):
        try:
            while data := await self.reader.read(1 << 16):
                for event in self.http2.receive_data(data):
                    self.take(event)
                self.flush()
                await self.notify()
            self.failure = "end"
        except (OSError, h2.exceptions.H2Error) as error:
            self.failure = repr(error)
            print(f"a tunnel failed: {error!r}", file=sys.stderr, flush=True)
        self.writer.close()
        await self.notify()

    async def notify(self):
        async with self.changed:
            self.changed.notify_all()

    async def until(self, true):
        async with self.changed:
            await asyncio.wait_for(self.changed.wait_for(lambda: true() or self.failure), PATIENCE)
        if not true():
            raise ConnectionError(f"the tunnel: {self.failure}")

    def take(self, event):
        if isinstance(event, h2.events.RequestReceived) and event.stream_id <= (self.leaving or event.stream_id):
            stream = self.streams[event.stream_id] = Stream(event.stream_id, event.headers)
            task = asyncio.create_task(self.serve(self, stream))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        stream = self.streams.get(getattr(event, "stream_id", None))
        if isinstance(event, h2.events.ResponseReceived):
            stream.answer = event.headers
        elif isinstance(event, h2.events.DataReceived):
            stream.received += event.data
            stream.total += len(event.data)
            if padding := event.flow_controlled_length - len(event.data):
                self.http2.acknowledge_received_data(padding, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            stream.ended = True
        elif isinstance(event, h2.events.StreamReset):
            stream.reset = int(event.error_code)

    def ask(self, headers, end=False):
        stream = Stream(self.http2.get_next_available_stream_id())
        self.streams[stream.number] = stream
        self.http2.send_headers(stream.number, headers, end_stream=end)
        self.flush()
        return stream

    async def say(self, stream, data):
        data = memoryview(data)
        while data:
            room = lambda: self.http2.local_flow_control_window(stream.number)
            await self.until(lambda: stream.reset is not None or room() > 0)
            if stream.reset is not None:
                raise ConnectionError(f"reset by {stream.reset}")
            size = min(len(data), room(), self.http2.max_outbound_frame_size)
            self.http2.send_data(stream.number, bytes(data[:size]))
            self.flush()
            await self.writer.drain()
            data = data[size:]

    def end(self, stream):
        self.http2.end_stream(stream.number)
        self.flush()

    def cut(self, stream, code):
        try:
            self.http2.reset_stream(stream.number, code)
        except h2.exceptions.H2Error:
            return  # Over already.
        self.flush()

    async def hear(self, stream, enough):
        """What has come once it is enough, or all there is; only then may the other end send as much again."""
        await self.until(lambda: stream.over() or enough(stream.received))
        data, stream.received = bytes(stream.received), bytearray()
        if data:
            self.http2.acknowledge_received_data(len(data), stream.number)
            self.flush()
        return data

    def goaway(self, last):
        self.leaving = last
        if not self.writer.is_closing():
            self.writer.write(GoAwayFrame(0, last_stream_id=last).serialize())


def field(number, data):
    """A field of protobuf that has a length."""
    data = data.encode() if isinstance(data, str) else data
    length, size = len(data), b""
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + data


def fields(data):
    """The fields of a message that has no others."""
    while data:
        length, shift, at = 0, 0, 1
        while True:
            length, shift, at = length | (data[at] & 127) << shift, shift + 7, at + 1
            if not data[at - 1] & 128:
                break
        yield data[0] >> 3, data[at : at + length]
        data = data[at + length :]


class Peer:
    def __init__(self):
        self.tunnels, self.served, self.listening, self.answer = [], [], [], 200
        self.certificate = self.roots = None

    # What a node does with a control plane.

    async def call(self, control, token, node, method, message, end):
        tls = ssl.create_default_context(cafile=self.roots)
        tls.set_alpn_protocols(["h2"])
        tls.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
        host, port = control.split(":")
        streams = await asyncio.open_connection(host, int(port), ssl=tls, server_hostname="mesh-control")
        tunnel = Tunnel(*streams, client=True)
        headers = [(":method", "POST"), (":scheme", "https"), (":authority", "mesh-control"), (":path", method)]
        headers += [("te", "trailers"), ("content-type", "application/grpc"), ("mesh-node", node)]
        stream = tunnel.ask(headers + [("authorization", f"Bearer {token}")])
        await tunnel.say(stream, struct.pack(">BI", 0, len(message)) + message)
        if end:
            tunnel.end(stream)
        whole = lambda data: len(data) > 4 and len(data) >= 5 + struct.unpack(">I", data[1:5])[0]
        data = await tunnel.hear(stream, whole)
        if not whole(data):
            raise ConnectionError(f"{method}: {stream.answer}")
        self.tunnels.append(tunnel)
        return data[5 : 5 + struct.unpack(">I", data[1:5])[0]]

    async def join(self, control, token, node, roots):
        """Opens the stream by which a node joins, and leaves it open."""
        self.roots = roots
        request = field(1, field(1, node)) + field(2, "type.googleapis.com/istio.workload.Address")
        service = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
        await self.call(control, token, node, service, request, end=False)

    async def certify(self, control, token, node, roots, identity, file):
        """Has a workload's certificate made, and uses it from now on."""
        self.roots, self.certificate = roots, file
        command = "openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj / -keyout".split()
        made = subprocess.run([*command, file], check=True, capture_output=True)
        impersonated = field(1, "ImpersonatedIdentity") + field(2, field(3, identity))
        request = field(1, made.stdout) + field(4, field(1, impersonated))
        service = "/istio.v1.auth.IstioCertificateService/CreateCertificate"
        answer = await self.call(control, token, node, service, request, end=True)
        chain = [pem for number, pem in fields(answer) if number == 1]
        with open(file, "ab") as both:
            both.write(b"".join(chain[:-1]))
        listening, self.listening = self.listening, []
        for server, how in listening:
            # A new context knows no session of the old certificate.
            server.close()
            await self.listen(*how)

    def tls(self, purpose, certificate):
        tls = ssl.SSLContext(purpose)
        tls.check_hostname = False
        tls.minimum_version = ssl.TLSVersion.TLSv1_3
        tls.verify_mode = ssl.CERT_REQUIRED
        tls.load_verify_locations(self.roots)
        tls.set_alpn_protocols(["h2"])
        if certificate:
            tls.load_cert_chain(self.certificate)
        return tls

    # The side that asks.

    async def tunnel(self, to, windows="ztunnel", certificate=True):
        host, port = to.rsplit(":", 1)
        tls = self.tls(ssl.PROTOCOL_TLS_CLIENT, certificate)
        streams = await asyncio.open_connection(host.strip("[]"), int(port), ssl=tls)
        tunnel = Tunnel(*streams, client=True, windows=windows)
        self.tunnels.append(tunnel)
        # A certificate that is not taken shows only now.
        await tunnel.until(lambda: tunnel.http2.remote_settings.initial_window_size != 65535)
        return {"tunnel": len(self.tunnels) - 1, **tunnel.about()}

    async def open(self, tunnel, headers, end=False):
        tunnel = self.tunnels[tunnel]
        stream = tunnel.ask([tuple(pair) for pair in headers], end)
        await tunnel.until(lambda: stream.answer or stream.over())
        return {"stream": stream.number, "headers": dict(stream.answer or ()), "reset": stream.reset}

    async def say(self, tunnel, stream, text="", end=False):
        tunnel, stream = self.tunnels[tunnel], self.tunnels[tunnel].streams[stream]
        await tunnel.say(stream, text.encode())
        if end:
            tunnel.end(stream)

    async def hear(self, tunnel, stream, line=False):
        """A line, or all there is."""
        tunnel, stream = self.tunnels[tunnel], self.tunnels[tunnel].streams[stream]
        data = await tunnel.hear(stream, lambda data: line and b"\n" in data)
        return {"text": data.decode(), "ended": stream.ended, "reset": stream.reset}

    async def exchange(self, tunnel, stream, size):
        """So many bytes to one who says them all again."""
        tunnel, stream = self.tunnels[tunnel], self.tunnels[tunnel].streams[stream]
        data, back = random.Random(size).randbytes(size), bytearray()

        async def listen():
            while len(back) < size:
                back.extend(await tunnel.hear(stream, len))

        await asyncio.gather(tunnel.say(stream, data), listen())
        return {"exact": hashlib.sha256(back).digest() == hashlib.sha256(data).digest()}

    async def reset(self, tunnel, stream, code):
        self.tunnels[tunnel].cut(self.tunnels[tunnel].streams[stream], code)

    async def state(self, tunnel, goaways=0, over=False):
        """Once it has heard so many GOAWAY, or is over."""
        tunnel = self.tunnels[tunnel]
        await tunnel.until(lambda: len(tunnel.http2.goaways) >= goaways and (tunnel.failure or not over))
        return {"goaways": tunnel.http2.goaways, "over": tunnel.failure}

    # The side that is asked.

    async def listen(self, at, windows="ztunnel", limit=200):
        async def take(reader, writer):
            tunnel = Tunnel(reader, writer, client=False, windows=windows, limit=limit)
            tunnel.serve, tunnel.who = self.serve, tunnel.about()
            self.served.append(tunnel)
            await tunnel.running

        tls = self.tls(ssl.PROTOCOL_TLS_SERVER, certificate=True)
        host, port = at.rsplit(":", 1)
        server = await asyncio.start_server(take, host.strip("[]"), int(port), ssl=tls, backlog=128)
        self.listening.append((server, (at, windows, limit)))

    async def serve(self, tunnel, stream):
        if self.answer == "refused" and len(tunnel.streams) > 1:
            return tunnel.cut(stream, 7)
        if self.answer not in (200, "refused"):
            tunnel.http2.send_headers(stream.number, [(":status", str(self.answer))], end_stream=True)
            return tunnel.flush()
        host, port = dict(stream.headers)[":authority"].rsplit(":", 1)
        try:
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        except OSError:
            tunnel.http2.send_headers(stream.number, [(":status", "503")], end_stream=True)
            return tunnel.flush()
        tunnel.http2.send_headers(stream.number, [(":status", "200"), ("baggage", "k8s.cluster.name=elsewhere")])
        tunnel.flush()

        async def up():
            while data := await reader.read(1 << 16):
                await tunnel.say(stream, data)
            tunnel.end(stream)

        async def down():
            while data := await tunnel.hear(stream, len):
                writer.write(data)
                await writer.drain()
            if stream.reset is not None:
                raise ConnectionError(f"reset by {stream.reset}")
            writer.write_eof()

        try:
            await asyncio.gather(up(), down())
        except (OSError, h2.exceptions.H2Error, asyncio.TimeoutError):
            tunnel.cut(stream, 10)
            writer.transport.abort()
        writer.close()
        stream.done = True

    async def answers(self, status):
        """From now on; "refused": 200, and REFUSED_STREAM to all but the first stream of a tunnel."""
        self.answer = status

    async def seen(self):
        """Every tunnel that has come, with its streams."""
        stream = lambda s: {"headers": s.headers, "bytes": s.total, "ended": s.ended, "reset": s.reset, "done": s.done}
        of = lambda t: {**t.who, "over": t.failure, "streams": [stream(s) for s in t.streams.values()]}
        return {"tunnels": [of(tunnel) for tunnel in self.served]}

    async def goaway(self, all=False):
        """On every tunnel in use that has not heard it: open streams go on. What crosses it is served (all), or not."""
        for tunnel in self.served:
            if tunnel.streams and not tunnel.leaving:
                tunnel.goaway((1 << 31) - 1 if all else max(tunnel.streams))

    async def cut(self, code):
        """Resets every stream that is open."""
        for tunnel in self.served:
            for stream in tunnel.streams.values():
                if not stream.done and stream.reset is None:
                    tunnel.cut(stream, code)


async def main():
    peer, stdin = Peer(), asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    while line := await stdin.readline():
        command = json.loads(line)
        try:
            answer = await getattr(peer, command.pop("do"))(**command) or {}
        except Exception as error:  # Whatever it is, the test is to know.
            answer = {"error": repr(error)}
        print(json.dumps(answer), flush=True)


asyncio.run(main())
