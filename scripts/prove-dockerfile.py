#!/usr/bin/env python3
"""Builds a Dockerfile without Docker, in chroots, and asks what it makes for one answer.

    sudo scripts/prove-dockerfile.py Dockerfile --work /var/tmp/proof \\
        --base rust:1.95-slim-bookworm=/roots/rust --base debian:bookworm-slim=/roots/debian

For machines that reach no registry. Runs every instruction as the file has it, on copies of the
given base folders, and then what the last stage starts: as its user, in a network of its own,
until its health check passes; one chat completion is asked for, and the stop signal ends it.
CONTRIBUTING.md says how to make base folders. Differences from Docker: cache mounts are plain
folders of the stage, there are no layers, and processes see the host's kernel and memory.

    --replace OLD=NEW   in RUN commands, for what cannot be done here; each is printed
    --args A...         after the entry point's own (last option)
"""

import argparse
import fnmatch
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

CONTEXT = pathlib.Path(__file__).resolve().parent.parent
HEALTH_TRIES, HEALTH_INTERVAL_S, STOP_LIMIT_S = 60, 1, 60
QUESTION = {"model": "", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 16, "temperature": 0}


def instructions(text):
    """Pairs of an instruction and its text, with continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [line.split(None, 1) for line in joined.splitlines() if line.strip()]


def is_ignored(path, patterns):
    """Whether .dockerignore leaves a path out: the last pattern that matches it or a parent."""
    ignored = False
    for pattern in patterns:
        wanted = pattern.lstrip("!").rstrip("/")
        parents = ["/".join(path.split("/")[: i + 1]) for i in range(path.count("/") + 1)]
        if any(fnmatch.fnmatchcase(parent, wanted) and (wanted != "*" or "/" not in parent) for parent in parents):
            ignored = not pattern.startswith("!")
    return ignored


def copy_context(destination):
    patterns = [line for line in (CONTEXT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    tracked = subprocess.run(["git", "ls-files"], cwd=CONTEXT, check=True, capture_output=True, text=True)
    for name in tracked.stdout.splitlines():
        if not is_ignored(name, patterns):
            to = destination / name
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CONTEXT / name, to)


class Stage:
    def __init__(self, root, base):
        shutil.rmtree(root, ignore_errors=True)
        subprocess.run(["cp", "-a", "--reflink=auto", base, root], check=True)
        self.root, self.base = root, base
        self.env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        env = pathlib.Path(str(base) + ".env")  # what the image sets, a variable per line
        if env.exists():
            self.env.update(line.split("=", 1) for line in env.read_text().splitlines())
        self.folder, self.user, self.shell = "/", "0:0", ["/bin/sh", "-c"]
        self.entry_point, self.health, self.stop = [], [], "SIGTERM"

    def inside(self, path):
        path = path if path.startswith("/") else os.path.join(self.folder, path)
        return self.root / path.lstrip("/")

    def command(self, words, network=False):
        """The words that run `words` in this stage as Docker would."""
        env = [f"{name}={value}" for name, value in self.env.items()]
        inner = ["chroot", f"--userspec={self.user}", str(self.root), "/usr/bin/env", "-i", "-C", self.folder, *env, *words]
        mounts = f"mount --bind /dev {self.root}/dev && mount -t proc proc {self.root}/proc && exec {shlex.join(inner)}"
        if network:
            mounts = f"ip link set lo up && {mounts}"
        return ["unshare", "--mount", *(["--net"] if network else []), "sh", "-c", mounts]

    def run(self, text, replaced):
        text = re.sub(r"--mount=\S+\s+", "", text)
        for old, new in replaced:
            if old in text:
                print(f"   REPLACED: {old!r} by {new!r}", flush=True)
                text = text.replace(old, new)
        subprocess.run(self.command([*self.shell, text]), check=True)

    def copy(self, words, stages):
        source = stages[words.pop(0).split("=")[1]].root if words[0].startswith("--from=") else None
        *names, to = words
        if names == ["."]:
            copy_context(self.inside(to))
            return
        for name in names:
            target = self.inside(to)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name.lstrip("/") if source else CONTEXT / name, target)


def build(dockerfile, bases, work, replaced):
    """The last stage. Instructions that only describe an image are passed over."""
    arguments, stages, stage = {}, {}, None
    for name, text in instructions(dockerfile.read_text()):
        begin = time.monotonic()
        print(f"== {name} {text}", flush=True)
        if name == "ARG":
            arguments.update([text.split("=", 1)])
        elif name == "FROM":
            image, *label = re.split(r"\s+AS\s+", re.sub(r"\$\{(\w+)\}", lambda found: arguments[found[1]], text))
            stage = Stage(work / f"stage{len(stages)}", pathlib.Path(bases[image]))
            stages[label[0] if label else len(stages)] = stage
        elif name == "SHELL":
            stage.shell = json.loads(text)
        elif name == "ENV":
            stage.env.update(pair.split("=", 1) for pair in shlex.split(text))
        elif name == "WORKDIR":
            stage.folder = text
            stage.inside(text).mkdir(parents=True, exist_ok=True)
        elif name == "USER":
            stage.user = text
        elif name == "RUN":
            stage.run(text, replaced)
            print(f"   {time.monotonic() - begin:.0f} s", flush=True)
        elif name == "COPY":
            stage.copy(text.split(), stages)
        elif name == "ENTRYPOINT":
            stage.entry_point = json.loads(text)
        elif name == "HEALTHCHECK":
            stage.health = json.loads(text[text.index("CMD") + 3 :])
        elif name == "STOPSIGNAL":
            stage.stop = text
        elif name not in ("LABEL", "VOLUME", "EXPOSE"):
            sys.exit(f"{dockerfile}: {name} is not known here")
    return stage


def megabytes(folder):
    return int(subprocess.run(["du", "-sxk", folder], check=True, capture_output=True, text=True).stdout.split()[0]) / 1024


def prove(stage, args):
    server = subprocess.Popen(stage.command([*stage.entry_point, *args], network=True))
    try:
        in_network = ["nsenter", "--net", f"--target={server.pid}"]
        for tries in range(1, HEALTH_TRIES + 1):
            time.sleep(HEALTH_INTERVAL_S)
            assert server.poll() is None, f"the server ended with {server.returncode}"
            health = stage.command(stage.health)
            if subprocess.run([*in_network, *health], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode == 0:
                break
        else:
            sys.exit("the health check never passed")
        print(f"== health check passed, try {tries}")
        status = pathlib.Path(f"/proc/{server.pid}/status").read_text()
        print("== user of the server:", re.search(r"Uid:\s+(\d+)", status)[1])
        url = "http://127.0.0.1:8000/v1"
        curl = [*in_network, "curl", "--silent", "--show-error", "--fail", "-H", "Content-Type: application/json"]
        models = json.loads(subprocess.run([*curl, f"{url}/models"], check=True, capture_output=True).stdout)
        question = json.dumps({**QUESTION, "model": models["data"][0]["id"]})
        answer = subprocess.run([*curl, "-d", question, f"{url}/chat/completions"], check=True, capture_output=True)
        print("== answer:", json.loads(answer.stdout)["choices"][0]["message"]["content"])
    finally:
        server.send_signal(signal.Signals[stage.stop])
        code = server.wait(timeout=STOP_LIMIT_S)
    print(f"== ended by {stage.stop} with {code}")
    assert code == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dockerfile", type=pathlib.Path)
    parser.add_argument("--base", action="append", required=True, metavar="IMAGE=FOLDER")
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--replace", action="append", default=[], metavar="OLD=NEW")
    parser.add_argument("--args", nargs=argparse.REMAINDER, default=[])
    options = parser.parse_args()
    bases = dict(base.split("=", 1) for base in options.base)
    options.work.mkdir(parents=True, exist_ok=True)
    replaced = [pair.split("=", 1) for pair in options.replace]
    stage = build(options.dockerfile, bases, options.work.resolve(), replaced)
    added = megabytes(stage.root) - megabytes(stage.base)
    print(f"== image: {megabytes(stage.root):.0f} MiB, of which {added:.0f} MiB are not its base's")
    prove(stage, options.args)


if __name__ == "__main__":
    main()
