#!/usr/bin/env python3
"""The program at a terminal, which a pseudo-terminal stands in for, and in pipes.

usage: terminal.py PROGRAM
"""

import fcntl
import os
import pathlib
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time

program = os.path.abspath(sys.argv[1])
root = pathlib.Path(__file__).resolve().parents[2]
PATIENCE = 120  # seconds, of a busy machine
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\s")


class Terminal:
    """A program that believes to be at a terminal."""

    running = set()

    def __init__(self, *arguments, **environment):
        self.text = ""
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.environ.pop("NO_COLOR", None)
            os.environ.update(TERM="xterm-256color", **environment)
            os.execv(program, [program, *map(str, arguments)])
        self.running.add(self.pid)
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))

    def read(self):
        """Some more of what it writes; whether there was any."""
        try:
            piece = os.read(self.terminal, 4096)
        except OSError:  # it has ended
            return False
        self.text += piece.decode(errors="replace")
        return bool(piece)

    def wait_until(self, come, what):
        """Reads until it has come."""
        end = time.monotonic() + PATIENCE
        while not come():
            assert time.monotonic() < end, f"no {what} in {self.text[-500:]!r}"
            if select.select([self.terminal], [], [], 1)[0]:
                assert self.read(), f"it ended before {what}: {self.text[-500:]!r}"

    def wait_for_answer(self):
        """Reads until some of a text has come, whatever it is."""
        self.wait_until(lambda: len(CONTROL.sub("", self.text)) > 20, "answer")

    def wait_for(self, words):
        """Reads until these words come, and returns what came before them."""
        self.wait_until(lambda: words in self.text, repr(words))
        before, self.text = self.text.split(words, 1)
        return before

    def type(self, keys):
        os.write(self.terminal, keys.encode())

    def end(self):
        """What else it writes, and its exit code."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and (not select.select([self.terminal], [], [], 1)[0] or self.read()):
            pass
        assert time.monotonic() < end, f"it does not end: {self.text[-500:]!r}"
        os.close(self.terminal)
        return self.text, self.reap()

    def reap(self):
        status = os.waitpid(self.pid, 0)[1]
        self.running.discard(self.pid)
        return os.waitstatus_to_exitcode(status)

    @classmethod
    def kill_all(cls):
        """Ends those that a failure has left."""
        for pid in cls.running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        cls.running.clear()


def chat(model):
    talk = Terminal("chat", model, "--max-tokens", "5")
    talk.wait_for("Say something.")
    talk.wait_for("you> ")
    talk.type("Hello\r")
    talk.wait_for("5 written")
    talk.wait_for("you> ")
    talk.type("\x03")  # Ctrl-C
    talk.wait_for("Ctrl-C ends an answer")
    talk.wait_for("you> ")
    talk.type("\x1b[A")  # what was said before
    talk.wait_for("Hello")
    talk.type("\r")
    talk.wait_for("5 written")
    talk.wait_for("you> ")
    talk.type("/clear\r")
    talk.wait_for("(forgotten)")
    talk.wait_for("you> ")
    talk.type("\x04")  # Ctrl-D
    assert talk.end()[1] == 0
    print("chat: asks, answers, remembers lines, ends")

    talk = Terminal("chat", model, "--max-tokens", "1000000")
    talk.wait_for("you> ")
    talk.type("Tell me everything\r")
    talk.wait_for("everything")
    talk.wait_for("\n")
    talk.wait_for_answer()
    talk.type("\x03")
    talk.wait_for("ended early")
    talk.wait_for("you> ")
    talk.type("/quit\r")
    assert talk.end()[1] == 0
    print("chat: Ctrl-C ends an answer, not the chat")


def interrupts(model):
    text = Terminal("complete", model, "Once", "--max-tokens", "1000000")
    text.wait_for("Once")
    text.wait_for_answer()
    text.type("\x03")
    text, code = text.end()
    assert code == 130 and "hymba: interrupted: the text ends here" in text, (code, text[-500:])
    print("complete: Ctrl-C ends it with exit code 130")


def bars_and_colours(model):
    words = root / "tests/data/byte_lm/text.txt"
    command = ["perplexity", root / "tests/data/byte_lm", words]
    bar = Terminal(*command)
    text, code = bar.end()
    assert code == 0 and text.count("\r") > 3 and "\x1b[" in text, (code, text[-500:])
    bar, code = Terminal(*command, NO_COLOR="1").end()
    assert code == 0 and not COLOUR.search(bar), bar
    quiet = subprocess.run([program, *command], capture_output=True, text=True, timeout=PATIENCE)
    assert quiet.returncode == 0 and "\x1b" not in quiet.stdout + quiet.stderr and "\r" not in quiet.stderr, quiet
    print("bars: at a terminal only, and without colours where NO_COLOR says so")

    for wrong in [[], ["--no-such-option"]]:
        assert COLOUR.search(Terminal("bench", *wrong).end()[0])
        assert not COLOUR.search(Terminal("bench", *wrong, NO_COLOR="1").end()[0])
        plain = subprocess.run([program, "bench", *wrong], capture_output=True, text=True)
        assert plain.returncode == 2 and "\x1b" not in plain.stderr and plain.stdout == "", plain
    print("errors: coloured at a terminal, not with NO_COLOR, nor in a pipe")


def pipes(model):
    for command in [
        ["complete", model, "Once", "--max-tokens", "100000"],
        ["chat", model, "--max-tokens", "100000"],
        ["info", model, "--json"],
        ["man"],
        ["completions", "zsh"],
    ]:
        process = subprocess.Popen(
            [program, *map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        process.stdout.close()
        _, errors = process.communicate("Hello\n" if command[0] == "chat" else "", timeout=PATIENCE)
        assert process.returncode == 0 and errors == "", (command, process.returncode, errors)
    print("pipes: nobody reading is no error")


def man_and_completions():
    run = lambda *command, **more: subprocess.run(command, capture_output=True, text=True, check=True, **more)
    page = run(program, "man").stdout
    trivial = ".TH TRIVIAL 1\n.SH NAME\ntrivial \\- a page\n"

    def show(renderer, page):
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        shown = subprocess.run(renderer, input=page, capture_output=True, encoding="utf-8", env=environment)
        shown.stdout = re.sub(".\b", "", shown.stdout)  # some print bold letters twice
        return shown

    for renderer in [["groff", "-Kutf8", "-man", "-ww", "-Tutf8"], ["man", "--warnings", "-l", "-"], ["mandoc", "-W", "error"]]:
        if not shutil.which(renderer[0]):
            continue
        # some are stubs, or have other options
        able = show(renderer, trivial)
        if able.returncode != 0 or "NAME" not in able.stdout or able.stderr:
            continue
        shown = show(renderer, page)
        assert shown.returncode == 0 and shown.stderr == "", shown.stderr
        assert "NAME" in shown.stdout and "lookahead" in shown.stdout, shown.stdout
        print(f"man: read by {renderer[0]}")
        break
    else:
        print("man: nothing here to read it with")
    folder = tempfile.mkdtemp()
    for shell in ["bash", "zsh", "fish"]:
        script = pathlib.Path(folder) / shell
        script.write_text(run(program, "completions", shell).stdout)
        if not shutil.which(shell):
            continue
        run(shell, "-n", script)
        if shell == "bash":
            line = 'COMP_WORDS=(hymba ser); COMP_CWORD=1; _hymba hymba ser hymba; echo "${COMPREPLY[*]}"'
            assert run("bash", "--norc", "-c", f"source {script}; {line}").stdout.strip() == "serve"
            line = 'COMP_WORDS=(hymba quantize --to ""); COMP_CWORD=3; _hymba hymba "" --to; echo "${COMPREPLY[*]}"'
            assert "bf16" in run("bash", "--norc", "-c", f"source {script}; {line}").stdout
        print(f"completions: read by {shell}")
    shutil.rmtree(folder)


def server(model):
    """Ctrl-C in front of a server."""
    server = Terminal("serve", model, "--port", "0")
    server.wait_for("listening on http://127.0.0.1:")
    server.type("\x03")
    text, code = server.end()
    assert code == 0, (code, text[-500:])
    print("serve: Ctrl-C ends it")


signal.signal(signal.SIGPIPE, signal.SIG_DFL)
with tempfile.TemporaryDirectory() as place:
    model = pathlib.Path(place) / "model"
    sizes = ["--hidden", "100", "--layers", "2", "--intermediate", "64"]
    subprocess.run([program, "bench", "--random", *sizes, "--save", model], check=True)
    for file in (root / "tests/data/hymba-1.5b-base").glob("tokenizer*.json"):
        shutil.copy(file, model)
    try:
        chat(model)
        interrupts(model)
        bars_and_colours(model)
        pipes(model)
        man_and_completions()
        server(model)
    finally:
        Terminal.kill_all()
