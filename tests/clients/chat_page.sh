#!/usr/bin/env bash
# The built-in chat page in a real browser: chat_page.sh BASE_URL [CHROMIUM]
# The page is opened headless with a hook that types a message and waits for the streamed answer; its text is read from the DOM.
set -euo pipefail
base=$1 chromium=${2:-$(command -v chromium || command -v chromium-browser || command -v google-chrome)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
port=$((20000 + RANDOM % 20000))
"$chromium" --headless=new --no-sandbox --disable-gpu --user-data-dir="$work" --remote-debugging-port=$port "$base/" >"$work/log" 2>&1 &
pid=$!
trap 'kill $pid 2>/dev/null || true; wait $pid 2>/dev/null || true; rm -rf "$work"' EXIT
python3 - "$port" <<'END'
import base64, json, os, socket, struct, sys, time, urllib.request
port = int(sys.argv[1])
for _ in range(100):
    try:
        pages = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
        page = next(p for p in pages if p["type"] == "page")
        break
    except Exception:
        time.sleep(0.2)
host, path = page["webSocketDebuggerUrl"][5:].split("/", 1)
s = socket.create_connection(("127.0.0.1", port))
s.sendall(f"GET /{path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
          f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
f = s.makefile("rb")
while f.readline() not in (b"\r\n", b""):
    pass
def call(method, **params):
    data, mask = json.dumps({"id": 1, "method": method, "params": params}).encode(), os.urandom(4)
    n = len(data)
    s.sendall(b"\x81" + (bytes([0x80 | n]) if n < 126 else b"\xfe" + struct.pack(">H", n)) + mask +
              bytes(b ^ mask[i % 4] for i, b in enumerate(data)))
    while True:
        _, n = f.read(2)
        n = struct.unpack(">H", f.read(2))[0] if n == 126 else struct.unpack(">Q", f.read(8))[0] if n == 127 else n
        m = json.loads(f.read(n))
        if m.get("id") == 1:
            return m["result"]["result"].get("value")
js = lambda code: call("Runtime.evaluate", expression=code, returnByValue=True)
for _ in range(100):
    if js("document.getElementById('form') !== null && document.readyState === 'complete'"):
        break
    time.sleep(0.1)
js("document.getElementById('tokens').value = 40; document.getElementById('text').value = 'Hello <b>there</b>';"
   "document.getElementById('form').requestSubmit()")
grown = set()
for _ in range(600):
    text = js("(document.querySelector('.assistant') || {}).textContent || ''")
    grown.add(len(text))
    if text and js("document.getElementById('send').textContent") == "Send":
        break
    time.sleep(0.02)
error = js("(document.querySelector('.error') || {}).textContent || ''")
assert text and not error, (text, error)
assert js("document.querySelector('.user').textContent") == "Hello <b>there</b>" and js("document.querySelectorAll('.user b').length") == 0
print(f"the answer has {len(text)} characters and was seen at {len(grown)} lengths\nall right")
END
