"""What the shape of answers costs: tokens per second with one over without, at 1, 8 and 16 streams.

Run as: serve-shapes.py BASE_URL, against `secondwind demo --serve --workers 1 --threads 2 --max-sequences 16`.
"""

import json
import statistics
import sys
import threading
import time
import urllib.request

TEXTS = {f"p{number}": {"type": "string", "minLength": 20, "maxLength": 40} for number in range(6)}
SCHEMA = {"type": "object", "properties": TEXTS, "required": list(TEXTS), "additionalProperties": False}


def tokens(url, ask):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(ask).encode(), headers)
    return json.load(urllib.request.urlopen(request, timeout=300))["usage"]["completion_tokens"]


def tokens_per_second(url, streams, more):
    counts = [0] * streams

    def stream(index):
        for turn in range(3):
            ask = {"prompt": f"card {index} {turn} has", "max_tokens": 160, "temperature": 1, "seed": index * 7 + turn}
            counts[index] += tokens(url, ask | more)

    threads = [threading.Thread(target=stream, args=(index,)) for index in range(streams)]
    began = time.time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.time() - began)


for streams in (1, 8, 16):
    # Of each: any text of enough characters, and JSON under a schema; beside answers without a shape.
    kinds = [{"ignore_eos": True}, {"structured_outputs": {"regex": r"(.|\n){160,}"}}, {"structured_outputs": {"json": SCHEMA}}]
    rounds = [[tokens_per_second(sys.argv[1], streams, more) for more in kinds] for _ in range(4)]
    free, regex, schema = map(statistics.median, zip(*rounds))
    print(f"{streams} streams: {free:.0f} tokens/s; regex {regex / free:.2f}, schema {schema / free:.2f} of it")
