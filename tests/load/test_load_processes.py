"""Programs that a benchmark starts, and how they end."""

import sys
import time

from elsa_load.processes import Program, stop_all

# Is ready at once; takes a second to end once asked to, and says so at every signal.
SLOW = """
import http.server, signal, sys, threading, time
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
def asked(*_):
    print("asked", flush=True)
    threading.Thread(target=lambda: (time.sleep(1), server.shutdown())).start()
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Ready)
signal.signal(signal.SIGTERM, asked)
server.serve_forever()
"""


def test_programs_end_at_the_same_time_and_each_is_asked_once(tmp_path):
    command = [sys.executable, "-c", SLOW, "{port}"]
    programs = [Program(command, tmp_path / name, startup_s=60, stop_s=30) for name in "abc"]
    for program in programs:
        program.start()
    for program in programs:
        program.wait_ready()
    programs[0].ask_to_stop()
    start = time.monotonic()
    stop_all(iter(programs))
    assert time.monotonic() - start < 2.8  # one after the other: 3 s
    assert [(tmp_path / name).read_text().count("asked") for name in "abc"] == [1, 1, 1]
    assert [program.stop() for program in programs] == [None] * 3
    with programs[0]:  # another life, which is asked anew
        pass
    assert (tmp_path / "a").read_text().count("asked") == 2
