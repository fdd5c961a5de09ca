"""Stands in for the worker of an evaluation: same lines in and out, no engine; a solver answers every second prompt.

`INFLLM_TEST_SLOW`: seconds that an answer takes, so that a run can be killed in the middle.
"""

import json
import os
import sys
import time
import zlib
from dataclasses import asdict

from tests.eval.solvers import solve
from vllm_infllm.tools.eval.answers import Answer, Request
from vllm_infllm.tools.sides import load_tokenizer
from vllm_infllm.tools.worker_process import json_output


def main() -> None:
    with json_output() as write:
        tokenizer = load_tokenizer(json.loads(sys.stdin.readline())["engine"]["model"])
        for line in sys.stdin:
            request = Request(**json.loads(line))
            time.sleep(float(os.environ.get("INFLLM_TEST_SLOW", "0")))
            knows = zlib.crc32(request.id.encode()) % 2
            text = solve(tokenizer.decode(request.prompt)) if knows else "no idea"
            logprobs = [-1.0] * (len(request.prompt) - 1) if request.prompt_logprobs else None
            write(asdict(Answer(request.id, text, 0.2, 0.1, logprobs)))


if __name__ == "__main__":
    main()
