"""Folders of easy pictures, and `lamina` commands in processes that start fast and can be killed.

A process is forked from a server that has imported the library and done nothing else, so it is as fresh as
one started from the shell and needs no seconds of imports.
"""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from lamina.cli import main

#: small and untrained: six blocks of width 64; colours still tell its classes apart
BACKBONE = "timm:test_vit@random"

#: stands in for the clock, so that files are repeatable
EPOCH = "1795270000"

SECONDS = 60

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["lamina.lessons", "lamina.predictions", "lamina.cli", "lamina.console"])

_CHILD = """
import os, sys
os.environ.update(environment)
flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
for number, path in ((1, out), (2, errors)):
    os.dup2(os.open(path, flags), number)
sys.stdin = open(given, errors="strict")
sys.argv = ["lamina", *words]
import torch
torch.set_num_threads(1)
exec(first)
from lamina.cli import main
main()
"""


class Forked:
    """`lamina WORDS`, begun in a process of its own, which at the end of a `with` is dead.

    Args:
        folder: where what it prints goes.
        first: Python to run in the process before the command.
        given: the file or pipe that is its standard input. out: the file or pipe that is its output.
    """

    def __init__(self, *words, folder, first="", given=os.devnull, out=None, **environment):
        self.out, self.errors = out or folder / "out.txt", folder / "errors.txt"
        values = {
            "words": list(map(str, words)),
            "first": first,
            "given": str(given),
            "out": str(self.out),
            "errors": str(self.errors),
            "environment": {"SOURCE_DATE_EPOCH": EPOCH, **environment},
        }
        self.process = _FORKS.Process(target=exec, args=(_CHILD, values), daemon=True)
        self.process.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def end(self):
        """Wait; return exit code, output and lines of errors."""
        self.process.join(SECONDS)
        assert self.process.exitcode is not None, "the process does not end"
        out = self.out.read_text() if self.out.is_file() else ""
        return self.process.exitcode, out, self.errors.read_text().splitlines()

    def kill(self):
        """Send SIGKILL; return the exit code."""
        self.process.kill()
        self.process.join(SECONDS)
        return self.process.exitcode


def called(monkeypatch, capfd, *words):
    """Run `lamina WORDS` in this process; return exit code, output and lines of errors."""
    monkeypatch.setattr(sys, "argv", ["lamina", *map(str, words)])
    capfd.readouterr()
    try:
        main()
        code = 0
    except SystemExit as error:
        code = error.code or 0
    out, errors = capfd.readouterr()
    return code, out, errors.splitlines()


def wait_for(condition):
    """Wait until something holds."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.002)


def picture(name, random, size=(20, 20)):
    """Return a noisy picture of a class, (height, width, 3), uint8; equal names mean one motif."""
    motif = np.random.default_rng(list(name.encode())).uniform(0, 255, (4, 4, 3))
    whole = motif.repeat(size[0] // 4, axis=0).repeat(size[1] // 4, axis=1)
    return (whole + random.normal(0, 20, whole.shape)).clip(0, 255).astype(np.uint8)


def pictures(folder, classes, count=6, seed=0, size=(20, 20)):
    """Write FOLDER/CLASS/*.png, `count` pictures of each class; return FOLDER."""
    random = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.fromarray(picture(name, random, size)).save(folder / name / f"{seed}-{number}.png")
    return folder


def beside(path):
    """Return the names of all that lies in the folder of a file."""
    return sorted(entry.name for entry in Path(path).parent.iterdir())


def rows(text):
    """Return the values of JSON lines."""
    return [json.loads(line) for line in text.splitlines()]
