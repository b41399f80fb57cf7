#!/usr/bin/env python3
"""What nvcc makes of the CUDA kernels, as a table: kernels/REPORT.md.

    scripts/kernels-report.py            compile all kernels for all targets and write the table
    scripts/kernels-report.py --check    the same, but fail when the committed table differs

Both fail when the compiler warns of anything, when a kernel spills registers without saying why,
or when it lacks an instruction that its source says it has to have. What build.rs embeds as PTX is
also assembled for a later device. No GPU is needed. nvcc is $NVCC, or that of $TOKENMILL_NVCC,
$CUDA_HOME, $CUDA_PATH, $PATH; cuobjdump lies beside it. Results are kept in
~/.cache/tokenmill/kernels by the hash of what they were made of, so that only what changed is
compiled.

A kernel file may say of its kernels (a name, * for any letters; later lines add to earlier ones):

    // Report: NAME threads=128 dynamic=49152 sass=HMMA,LDG.128
    // Report: NAME spills=64: why this is cheaper than what would avoid it
    // Report: NAME only=80,90a: why it is not launched on other targets

threads per block (without: its launch bounds, else 256) and bytes of dynamic shared memory
(without: 0) decide the occupancy, and tests/conformance checks them against launches; sass lists
instructions that must occur; spills allows as many bytes of stores and loads, for a reason; on
targets other than those of only, a block need not fit.
"""

import argparse
import concurrent.futures
import difflib
import fnmatch
import hashlib
import inspect
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
REPORT = KERNELS / "REPORT.md"
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "tokenmill" / "kernels"
FRONT_FLAGS = ["-std=c++20", "-O3", "-Werror", "all-warnings", "-I", KERNELS / "include"]
ASSEMBLER_FLAGS = ["-O3", "-Werror", "all-warnings", "-Xptxas", "-v"]
# What build.rs embeds as PTX, and a device that would compile it when it starts.
EMBEDDED_PTX, LATER = "90", "120"

# Of a multiprocessor: warps, blocks, registers, bytes of shared memory (CUDA C++ Programming
# Guide, "Technical Specifications per Compute Capability").
TARGETS = {
    "80": (64, 32, 65536, 164 << 10),
    "86": (48, 16, 65536, 100 << 10),
    "89": (48, 24, 65536, 100 << 10),
    "90a": (64, 32, 65536, 228 << 10),
}
# Names of instructions as the table shows them.
INSTRUCTIONS = {
    "HMMA": r"\bHMMA\.",
    "IMMA": r"\bIMMA\.",
    "QGMMA": r"\bQGMMA\.",
    "HGMMA": r"\bHGMMA\.",
    "LDSM": r"\bLDSM\.",
    "LDG.128": r"\bLDG\.E\.(?:\w+\.)*128",
    "STG.128": r"\bSTG\.E\.(?:\w+\.)*128",
    "LDS.128": r"\bLDS\.(?:\w+\.)*128",
    "LDGSTS.128": r"\bLDGSTS\.E\.(?:\w+\.)*128",
}
NOTE_LINE = re.compile(r"^// Report:.*\n", re.M)
NOTE = re.compile(r"^// Report: (\S+)((?: \w+=[^\s:]+)+)(?:: (\S.*))?$", re.M)
INCLUDE = re.compile(r'^\s*#\s*include "(.+)"', re.M)
DEFAULT_THREADS = 256
REGISTER_UNIT = 256  # registers of a warp are given in units
SHARED_UNIT = 128
SYSTEM_SHARED = 1 << 10  # of every block, from 8.0 on


def find_nvcc():
    given = os.environ.get("NVCC") or os.environ.get("TOKENMILL_NVCC")
    homes = [os.environ[name] + "/bin/nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for path in [given, *homes, shutil.which("nvcc")]:
        if path and pathlib.Path(path).is_file():
            return pathlib.Path(path)
    sys.exit("no nvcc: set NVCC, or pip install what .ci/run lists")


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def headers_of(source):
    """The headers of ours that a source includes, by way of others too."""
    found, rest = set(), [source]
    while rest:
        paths = {KERNELS / "include" / name for name in INCLUDE.findall(rest.pop().read_text())}
        rest += sorted(paths - found)
        found |= paths
    return found


def kept(source, target, version, make):
    """What `make` returns, from the cache if it was made of the same before."""
    how = [inspect.getsource(part) for part in (compiled, assembled_later, parse_ptxas, functions)]
    # Wherever the sources lie.
    flags = [flag for flag in FRONT_FLAGS if not isinstance(flag, pathlib.Path)]
    flags += [*ASSEMBLER_FLAGS, EMBEDDED_PTX, *INSTRUCTIONS.values()]
    key = hashlib.sha256("\n".join([version, target, *how, *flags]).encode())
    key.update(NOTE_LINE.sub("", source.read_text()).encode())
    for path in sorted(headers_of(source)):
        key.update(path.read_bytes())
    cached = CACHE / f"{source.stem}-{target}-{key.hexdigest()[:16]}.json"
    if cached.exists():
        return json.loads(cached.read_text())
    made = make()
    CACHE.mkdir(parents=True, exist_ok=True)
    unfinished = cached.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(made))
    unfinished.rename(cached)
    return made


def compiled(nvcc, source, target):
    """Facts about every kernel of a file for a target: registers, shared, spills, stack, threads, sass."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = pathlib.Path(folder) / "k.cubin", pathlib.Path(folder) / "k.ptx"
        run(nvcc, *FRONT_FLAGS, f"-arch=compute_{target}", source, "-ptx", "-o", ptx)
        facts = parse_ptxas(run(nvcc, *ASSEMBLER_FLAGS, f"-arch=sm_{target}", ptx, "-cubin", "-o", cubin))
        for name, threads in re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", ptx.read_text()):
            facts[name]["threads"] = int(threads)
        for name, sass in functions(run(nvcc.parent / "cuobjdump", "-sass", cubin)):
            facts[name]["sass"] = [label for label, pattern in INSTRUCTIONS.items() if re.search(pattern, sass)]
    return facts


def assembled_later(nvcc, source):
    """Names of the kernels of a file that a later device makes of the embedded PTX."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = pathlib.Path(folder) / "k.cubin", pathlib.Path(folder) / "k.ptx"
        run(nvcc, *FRONT_FLAGS, f"-arch=compute_{EMBEDDED_PTX}", source, "-ptx", "-o", ptx)
        # Quickly: that it can be assembled is what matters.
        words = run(nvcc, "-Werror", "all-warnings", "-Xptxas", "-v,-O0", f"-arch=sm_{LATER}", ptx, "-cubin", "-o", cubin)
        return sorted(parse_ptxas(words))


def parse_ptxas(text):
    facts = {}
    for part in text.split("Compiling entry function '")[1:]:
        name = part.split("'")[0]
        number = lambda pattern: int((re.search(pattern, part) or [0, "0"])[1])
        facts[name] = {
            "registers": number(r"Used (\d+) registers"),
            "shared": number(r"(\d+) bytes smem"),
            "stack": number(r"(\d+) bytes stack frame"),
            "spills": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            "threads": 0,
            "sass": [],
        }
    return facts


def functions(sass):
    parts = re.split(r"Function : (\w+)", sass)
    return zip(parts[1::2], parts[2::2])


def occupancy(fact, target, threads, dynamic):
    """Resident warps as a part of the most that there can be."""
    warps, blocks, registers, shared = TARGETS[target]
    of_block = -(-threads // 32)
    per_warp = -(-fact["registers"] * 32 // REGISTER_UNIT) * REGISTER_UNIT
    bytes_of_block = -(-(fact["shared"] + dynamic + SYSTEM_SHARED) // SHARED_UNIT) * SHARED_UNIT
    by_registers = registers // per_warp // of_block if per_warp else blocks
    resident = min(blocks, warps // of_block, by_registers, shared // bytes_of_block)
    return round(100 * resident * of_block / warps)


def notes_of(source):
    """Pairs of a pattern of names and what the source says of those kernels."""
    found = NOTE.findall(source.read_text())
    if len(found) != source.read_text().count("// Report:"):
        sys.exit(f"{source}: a note is not of the form '// Report: NAME key=value ...[: why]'")
    notes = [(pattern, dict(word.split("=", 1) for word in words.split()), why) for pattern, words, why in found]
    if any(note.keys() & {"spills", "only"} and not why for _, note, why in notes):
        sys.exit(f"{source}: a note allows spills or leaves out targets and does not say why")
    return notes


def note_of(notes, name):
    note = {}
    for pattern, words, _ in notes:
        if fnmatch.fnmatchcase(name, pattern):
            note.update(words)
    return note


def describe(name, by_target, note, problems):
    facts = list(by_target.values())
    threads = int(note.get("threads", 0)) or facts[0]["threads"] or DEFAULT_THREADS
    dynamic = int(note.get("dynamic", 0))
    wanted = [word for word in note.get("sass", "").split(",") if word]
    for target, fact in by_target.items():
        if fact["spills"] + fact["stack"] > int(note.get("spills", 0)):
            problems.append(f"{name}, sm_{target}: {fact['spills']} bytes spilled, {fact['stack']} bytes of stack")
        for word in wanted:
            if word not in fact["sass"]:
                problems.append(f"{name}, sm_{target}: no {word} among its instructions")
        is_launched = target in note.get("only", target).split(",")
        if is_launched and occupancy(fact, target, threads, dynamic) == 0:
            problems.append(f"{name}, sm_{target}: no block of {threads} threads fits")
    one = lambda values: str(values[0]) if len(set(values)) == 1 else " ".join(map(str, values))
    occupied = [occupancy(fact, target, threads, dynamic) for target, fact in by_target.items()]
    always = [label for label in INSTRUCTIONS if all(label in fact["sass"] for fact in facts)]
    columns = [
        f"`{name}`",
        str(threads),
        one([fact["registers"] for fact in facts]),
        one([fact["shared"] for fact in facts]) + (f" + {dynamic}" if dynamic else ""),
        one([fact["spills"] for fact in facts]),
        one(occupied),
        ", ".join(always) or "–",
    ]
    return "| " + " | ".join(columns) + " |"


def report(nvcc):
    version = re.search(r"V(\d+\.\d+\.\d+)", run(nvcc, "--version"))[1]
    sources = sorted(KERNELS.glob("*.cu"))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        make = lambda s, t: pool.submit(kept, s, t, version, lambda: compiled(nvcc, s, t))
        later = [pool.submit(kept, s, f"later-{LATER}", version, lambda s=s: assembled_later(nvcc, s)) for s in sources]
        jobs = {(s, t): make(s, t) for s in sources for t in TARGETS}
        results = {key: job.result() for key, job in jobs.items()}
        later = {s: job.result() for s, job in zip(sources, later)}
    problems = []
    lines = [
        "# What the compiler makes of the kernels",
        "",
        f"Written by `scripts/kernels-report.py` with nvcc {version}; do not edit. Where targets differ, numbers",
        f"are those of sm_{', sm_'.join(TARGETS)} in this order. Shared memory and spills are in bytes, dynamic",
        "shared memory after a plus; occupancy is the part of a multiprocessor's warps that registers, shared",
        "memory and the size of a block allow, in percent. The last column names instructions that all targets have.",
    ]
    for source in sources:
        notes = notes_of(source)
        if later[source] != sorted(results[source, next(iter(TARGETS))]):
            problems.append(f"{source.name}: sm_{LATER} has other kernels than the targets")
        lines += ["", f"## {source.name}", "", "| kernel | threads | registers | shared | spills | occupancy | instructions |", "|---|---|---|---|---|---|---|"]
        for name in sorted(results[source, next(iter(TARGETS))]):
            by_target = {target: results[source, target][name] for target in TARGETS}
            lines.append(describe(name, by_target, note_of(notes, name), problems))
    return "\n".join(lines) + "\n", problems


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    text, problems = report(find_nvcc())
    if check:
        committed = REPORT.read_text() if REPORT.exists() else ""
        changes = difflib.unified_diff(committed.splitlines(), text.splitlines(), "committed", "now", lineterm="")
        problems += ["kernels/REPORT.md is not what scripts/kernels-report.py writes:", *changes] if text != committed else []
    else:
        REPORT.write_text(text)
    if problems:
        sys.exit("\n".join(problems))
    kernels = text.count("\n| `")
    print(f"{kernels} kernels for {len(TARGETS)} targets: no spill without a reason, all instructions are there")


if __name__ == "__main__":
    main()
