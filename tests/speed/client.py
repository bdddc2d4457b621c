"""Hands the command to the server, whose socket lies beside this file, and ends as it did."""

import json
import os
import signal
import socket
import sys

called = os.path.abspath(sys.argv[0])
if os.path.basename(called) == "python" and sys.argv[1:2] not in (["-c"], ["-m"]):  # which alone are served
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
connection.connect(os.path.join(os.path.dirname(called), "socket"))
command = {"called": called, "arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}
body = json.dumps(command).encode()
socket.send_fds(connection, [len(body).to_bytes(4, "little")], [0, 1, 2])
connection.sendall(body)
answer = connection.recv(2)
if not answer:
    sys.exit("the server of tests/speed has ended")
status = int.from_bytes(answer, "little", signed=True)
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
