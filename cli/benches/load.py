#!/usr/bin/env python3
"""Measures `hymba serve` with several clients, with nothing but Python's own library. Without a URL it does everything itself:

    cargo build --release -p hymba-cli && python3 cli/benches/load.py

makes a model of random weights in the sizes of Hymba-1.5B in 4 bits (0.9 GB in target/, made once), serves it, and prints one table:
tokens a second of 1, 4, 8 and 16 clients at once beside the same requests one after the other, and the time to the first token of
short requests alone and while a prompt of 8,000 tokens is being read. On two cores it takes some minutes, and below 8 GB of memory.
Nothing else should run. `--small` tries it with a model that takes seconds; its figures say little, as the client is half of the work.
"""

import argparse
import http.client
import json
import pathlib
import random
import shutil
import statistics
import subprocess
import threading
import time
import urllib.parse

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("url", nargs="?", help="of a server that runs already")
arguments.add_argument("--small", action="store_true", help="a tiny model")
arguments.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16])
arguments.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
arguments.add_argument("--tokens", type=int, default=32, help="tokens of each answer")
arguments.add_argument("--long", type=int, default=8000, help="tokens of the long prompt; 0 leaves it out")
arguments.add_argument("--short", type=int, default=8, help="short requests while it is read")
arguments.add_argument("--piece", type=int, help="--piece of the server")
arguments = arguments.parse_args()

root = pathlib.Path(__file__).resolve().parents[2]
program = root / "target/release/hymba"


def serve():
    """A server with a model of random weights, and its URL."""
    folder = root / ("target/load-small" if arguments.small else "target/load-1.5b")
    if not (folder / "tokenizer.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        sizes = ["--hidden", "100", "--layers", "3", "--intermediate", "64"] if arguments.small else []
        since = time.perf_counter()
        subprocess.run([program, "bench", "--random", "--quantize", "4", *sizes, "--save", folder], check=True)
        for file in (root / "tests/data/hymba-1.5b-base").glob("tokenizer*.json"):
            shutil.copy(file, folder)
        print(f"{folder.relative_to(root)} was made in {time.perf_counter() - since:.0f} s", flush=True)
    # nothing is kept, so that every prompt is read
    options = ["--port", "0", "--cache", "0", "--piece", str(arguments.piece)] if arguments.piece else ["--port", "0", "--cache", "0"]
    server = subprocess.Popen([program, "serve", folder, *options], stdout=subprocess.PIPE, text=True)
    line = server.stdout.readline()
    assert line.startswith("listening on "), f"the server does not start: {line!r}"
    return server, line.split()[-1]


server, url = (None, arguments.url) if arguments.url else serve()
place = urllib.parse.urlparse(url)


def ask(prompt_tokens, tokens, seed):
    """Seconds to the first text, and to the end."""
    draw = random.Random(seed)
    prompt = [1] + [draw.randrange(3, 32000) for _ in range(prompt_tokens - 1)]
    # without an early end
    body = dict(prompt=prompt, max_tokens=tokens, temperature=0, stream=True, logit_bias={"2": -100})
    body["stream_options"] = {"include_usage": True}
    connection = http.client.HTTPConnection(place.hostname, place.port)
    since = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    first, usage = None, None
    for line in answer:
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - since
            if b'"usage"' in line:
                usage = json.loads(line[6:])["usage"]
    assert usage["completion_tokens"] == tokens, usage
    return first, time.perf_counter() - since


def metrics():
    """Those of the server that have no labels, and are numbers."""
    connection = http.client.HTTPConnection(place.hostname, place.port)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    return {name: float(value) for name, value in (line.split(" ") for line in lines if line[0] != "#" and "{" not in line)}


def one_after_the_other(clients):
    since = time.perf_counter()
    for i in range(clients):
        ask(arguments.prompt, arguments.tokens, i)
    return time.perf_counter() - since


def together(clients):
    """Seconds for all, rows in a step, and the times to the first token."""
    firsts, before = [], metrics()
    threads = [
        threading.Thread(target=lambda i=i: firsts.append(ask(arguments.prompt, arguments.tokens, i)[0])) for i in range(clients)
    ]
    since = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, after = time.perf_counter() - since, metrics()
    assert len(firsts) == clients, "a request has failed"
    rows, steps = (after[name] - before[name] for name in ["hymba_step_rows_total", "hymba_steps_total"])
    return seconds, rows / steps, firsts


def first_tokens():
    """Of short requests, alone and beside a long prompt."""
    alone = [ask(16, 1, 1 + i)[0] for i in range(3)]
    took, beside = [], []
    long = threading.Thread(target=lambda: took.append(ask(arguments.long, 1, 2)[0]))
    long.start()
    time.sleep(0.2)
    draw = random.Random(3)
    for i in range(arguments.short):
        # at any moment of a step
        time.sleep(draw.random())
        first = ask(16, 1, 10 + i)[0]
        if long.is_alive():
            beside.append(first)
    long.join()
    print(f"\nfirst token of a request of 16 tokens: {statistics.median(alone):.2f} s alone")
    if beside:
        print(
            f"while a prompt of {arguments.long} tokens is read: {statistics.median(beside):.2f} s in the median, "
            f"{max(beside):.2f} s at most, of {len(beside)} requests; its own after {took[0]:.1f} s"
        )
    else:
        print(f"the prompt of {arguments.long} tokens was read within {took[0]:.1f} s: too soon to measure beside it")


try:
    ask(4, 4, 0)  # everything is warm
    print(f"prompts of {arguments.prompt} tokens, answers of {arguments.tokens}; tokens/s of answers\n")
    print("clients  together  one after the other  ratio  rows per step  first token: median, worst")
    for clients in arguments.clients:
        tokens = clients * arguments.tokens
        alone = one_after_the_other(clients)
        seconds, rows, firsts = together(clients)
        print(
            f"{clients:7} {tokens / seconds:9.1f} {tokens / alone:20.1f} {alone / seconds:6.2f} {rows:14.1f}  "
            f"{statistics.median(firsts):11.2f} s, {max(firsts):.2f} s",
            flush=True,
        )
    if arguments.long:
        first_tokens()
    if server:
        status = pathlib.Path(f"/proc/{server.pid}/status")
        if status.exists():
            peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
            print(f"memory of the server: {int(peak.split()[1]) / 1e6:.2f} GB at most")
finally:
    if server:
        server.terminate()
        server.wait()
