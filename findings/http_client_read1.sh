#!/usr/bin/env bash
# Python: http.client's HTTPResponse.read1 closes the connection once the announced length has been read, since 3.11.8,
# 3.12.2 and 3.13; before, it stayed open until the next read. Who sets a timeout on the socket before each read (the
# only way to give a whole answer a deadline) then gets "Bad file descriptor" after a complete, valid reply.
#
#     findings/http_client_read1.sh [PYTHON...]     # default: python3.10 to python3.13 and python3, those that run
#
# Seen: 3.10.13, 3.11.7 and 3.12.1 leave the socket open; 3.13.0 closes it. Fails where a version does otherwise.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/ask.py" <<'PYTHON'
import http.client
import http.server
import sys
import threading

BODY = b'{"reward": [1, 2, 3]}'


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, *args):
        pass


server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
thread = threading.Thread(target=server.handle_request)
thread.start()
connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
connection.request("GET", "/", headers={"Connection": "close"})
socket = connection.sock
response = connection.getresponse()
data = b""
while len(data) < len(BODY):
    data += response.read1(len(BODY) - len(data))
thread.join()
server.server_close()
assert data == BODY
version = sys.version_info[:3]
closes = version >= (3, 13) or (3, 12, 2) <= version < (3, 13) or (3, 11, 8) <= version < (3, 12)
closed = socket.fileno() == -1
print(f"Python {'.'.join(map(str, version))}: after the announced length the socket is {'closed' if closed else 'open'}")
if closed:
    try:
        socket.settimeout(5)
    except OSError as error:
        print(f"  settimeout: {type(error).__name__}: {error}")
sys.exit(closed != closes)
PYTHON
run=0
for python in "${@:-python3.10 python3.11 python3.12 python3.13 python3}"; do
    for name in $python; do
        "$name" -c "" 2>/dev/null || continue
        "$name" "$work/ask.py" || { echo "$name does otherwise than stated" >&2; exit 1; }
        run=$((run + 1))
    done
done
[ "$run" -gt 0 ] || { echo "no Python was found" >&2; exit 1; }
