#!/usr/bin/env python3
"""Measures a running `hymba serve`, with nothing but Python's own library.

Tokens a second of 1, 4, 8 and 16 clients at once beside the same requests one after the other, and the time to the first token of a
short request while a long prompt is being read. On a quiet machine, with random weights in the sizes of Hymba-1.5B in 4 bits:

    hymba bench --random --save target/random-1.5b && cp tests/data/hymba-1.5b-base/tokenizer*.json target/random-1.5b
    hymba serve target/random-1.5b --quantize 4 --cache 0 --max-tokens 1000 &
    python3 cli/benches/load.py http://127.0.0.1:8080
"""

import argparse
import http.client
import json
import random
import threading
import time
import urllib.parse

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("url")
arguments.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16])
arguments.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
arguments.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
arguments.add_argument("--long", type=int, default=8000, help="tokens of the long prompt; 0 leaves it out")
arguments.add_argument("--short", type=int, default=5, help="short requests while it is read")
arguments = arguments.parse_args()
place = urllib.parse.urlparse(arguments.url)


def ask(prompt_tokens, tokens, seed):
    """Seconds to the first token, and to the last."""
    draw = random.Random(seed)
    prompt = [1] + [draw.randrange(3, 32000) for _ in range(prompt_tokens - 1)]
    # without an early end
    body = dict(prompt=prompt, max_tokens=tokens, temperature=0, stream=True, logprobs=0, logit_bias={"2": -100})
    connection = http.client.HTTPConnection(place.hostname, place.port)
    since = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    first, count = None, 0
    for line in answer:
        if line.startswith(b"data: {"):
            choice = json.loads(line[6:])["choices"][0]
            count += len((choice["logprobs"] or {"tokens": []})["tokens"])
            first = first or time.perf_counter() - since
    assert count == tokens, count
    return first, time.perf_counter() - since


def together(clients):
    threads = [threading.Thread(target=ask, args=(arguments.prompt, arguments.tokens, i)) for i in range(clients)]
    since = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - since


ask(4, 4, 0)  # everything is warm
print(f"prompts of {arguments.prompt} tokens, answers of {arguments.tokens}")
print("clients   together, tokens/s   one after the other   ratio")
for clients in arguments.clients:
    all_tokens = clients * arguments.tokens
    since = time.perf_counter()
    for i in range(clients):
        ask(arguments.prompt, arguments.tokens, i)
    alone = time.perf_counter() - since
    both = together(clients)
    print(f"{clients:7} {all_tokens / both:20.1f} {all_tokens / alone:21.1f} {alone / both:7.2f}", flush=True)

if arguments.long:
    first, _ = ask(16, 1, 1)
    print(f"a request of 16 tokens alone: first token after {first:.2f} s")
    long = threading.Thread(target=lambda: took.append(ask(arguments.long, 1, 2)))
    took, times = [], []
    long.start()
    time.sleep(1)
    for i in range(arguments.short):
        if long.is_alive():
            times.append(ask(16, 1, 10 + i)[0])
    during = long.is_alive()
    long.join()
    print(f"while a prompt of {arguments.long} tokens is read: " + ", ".join(f"{t:.2f}" for t in times) + " s")
    print(f"the long prompt's first token after {took[0][0]:.1f} s" + ("" if during else " (it ended before the last short one)"))
