"""A stand-in for vLLM's command line, for tests of what runs it: python fake_vllm.py FOLDER serve|bench ...

Every call is a line of FOLDER/calls. `serve` answers at /health and /metrics until it is stopped, with a child process
that sleeps; `bench` writes the JSON of its command, with figures made from its options. FOLDER/mood changes that: "die"
lets the server end at the first run, "hang" lets runs never end, "fail" lets requests fail.
"""

import http.server
import json
import os
import subprocess
import sys
import time
from pathlib import Path

METRICS = """\
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0"} 0.5
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="128",num_gpu_blocks="41"} 1.0
"""


def main() -> None:
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    mood = (folder / "mood").read_text() if (folder / "mood").exists() else ""
    with (folder / "calls").open("a") as calls:
        print(json.dumps(arguments), file=calls)
    if arguments[0] == "serve":
        serve(folder, arguments, mood)
    else:
        bench(folder, arguments, mood)


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def serve(folder: Path, arguments: list[str], mood: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with (folder / "pids").open("a") as pids:
        print(os.getpid(), child.pid, file=pids)
    print("ValueError: out of luck", flush=True)
    if mood == "never":
        sys.exit(3)
    server = http.server.HTTPServer(("127.0.0.1", int(option(arguments, "--port"))), Answers)
    server.timeout = 0.1
    while not (mood == "die" and (folder / "dead").exists()):
        server.handle_request()
    sys.exit(7)


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(METRICS.encode() if self.path == "/metrics" else b"")

    def log_message(self, *arguments: object) -> None:
        pass


def bench(folder: Path, arguments: list[str], mood: str) -> None:
    if mood in ("die", "hang"):
        (folder / "dead").touch()
        time.sleep(600)
    command, length = arguments[1], int(option(arguments, "--input-len"))
    if command == "serve":
        requests = int(option(arguments, "--num-prompts"))
        measured = {
            "completed": requests - (mood == "fail"),
            "errors": ["", "Traceback ...\nKeyError: 'usage'"] if mood == "fail" else ["", ""],
            "median_ttft_ms": length * 2.0,
            "median_tpot_ms": 30.0,
            "total_token_throughput": 500.0,
            "total_input_tokens": length * requests,
            "total_output_tokens": int(option(arguments, "--output-len")) * requests,
        }
        file = Path(option(arguments, "--result-dir"), option(arguments, "--result-filename"))
    else:
        measured = {"tokens_per_second": 700.0, "latencies": [3.0, 1.0, 2.0]}
        file = Path(option(arguments, "--output-json"))
    time.sleep(0.1)
    file.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
