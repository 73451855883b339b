#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What the small kernels' own instructions allow: the same ones, none of which waits for another.

    tools/instruction_bound.py [--build build] [KERNEL ...]

Traces one call of each kernel (build/bench/bench_small_kernel) instruction by instruction on rows
that stay in L1, and prints a Markdown table. Per 32 elements: the instructions on vectors, the
cycles they take when each reads registers that none of them writes (a piece of the trace with the
registers renamed, assembled and timed; the best run), and those the kernel takes from L1 (the lower
quartile of many runs). What a call executes whatever its size does not count: of twice as many rows
the instructions and the time of some are taken away. A cycle is measured by dependent additions.

x86-64 Linux with AVX-512, objdump and g++.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile

KERNELS = (
    "short_conv",
    "rms_norm",
    "gated_norm",
    "l2_norm",
    "swiglu",
    "channel_gate",
    "cross_entropy",
)
TRACE_ME, PEEK_TEXT, CONTINUE, KILL, STEP, GET_REGISTERS = 0, 1, 7, 8, 9, 12
RIP = 16  # among the registers of PTRACE_GETREGS
BREAKPOINT = 0xCC
RUNS = 31  # many, since a neighbour on the same core can slow down some of them
PIECE = 1000  # vector instructions that are timed: what the caches of instructions hold

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long


def trace(command: list[str]) -> tuple[list[int], int]:
    """Addresses executed between the two breakpoints of a process, and the number it prints."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1)
        libc.ptrace(TRACE_ME, 0, None, None)
        os.execv(command[0], command)
    os.close(writer)
    os.waitpid(child, 0)
    libc.ptrace(CONTINUE, child, None, None)
    _, status = os.waitpid(child, 0)
    if not os.WIFSTOPPED(status):
        raise SystemExit(f"{' '.join(command)} ended before its first breakpoint")
    registers = (ctypes.c_uint64 * 27)()
    addresses = []
    while True:
        libc.ptrace(GET_REGISTERS, child, None, ctypes.byref(registers))
        address = registers[RIP]
        if libc.ptrace(PEEK_TEXT, child, address, None) & 0xFF == BREAKPOINT:
            break
        addresses.append(address)
        libc.ptrace(STEP, child, None, None)
        os.waitpid(child, 0)
    libc.ptrace(KILL, child, None, None)
    os.waitpid(child, 0)
    with os.fdopen(reader) as output:
        return addresses, int(output.read())


def disassemble(program: pathlib.Path) -> dict[int, tuple[str, str]]:
    """(mnemonic, operands) of each instruction of a program, by its address."""
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", program], capture_output=True, text=True, check=True
    ).stdout
    found = {}
    for match in re.finditer(r"^\s+([0-9a-f]+):\s+(\S+)[ \t]*(.*)$", text, re.MULTILINE):
        operands = re.sub(r"[<#].*", "", match.group(3)).strip()
        found[int(match.group(1), 16)] = (match.group(2), operands)
    return found


# Instructions as they are written for all 32 registers; stores past the caches as ordinary ones.
SAME = {
    "vmovaps": "vmovups",
    "vmovntps": "vmovups",
    "vmovdqa": "vmovdqu32",
    "vmovdqu": "vmovdqu32",
    "vmovntdq": "vmovdqu32",
    "vmovdqa64": "vmovdqu64",
    "vpand": "vpandd",
    "vpor": "vpord",
    "vpxor": "vpxord",
    "vextractf128": "vextractf32x4",
    "vextracti128": "vextracti32x4",
    "vinsertf128": "vinsertf32x4",
    "vinserti128": "vinserti32x4",
}
ACCUMULATES = ("vfm", "vfn", "vpternlog", "vpermt2", "vpermi2")


ELSEWHERE = ("", "")  # an instruction of the system's libraries


def is_vector(instruction: tuple[str, str]) -> bool:
    return instruction[0].startswith("v") and "mm" in instruction[1]


def unchained(mnemonic: str, operands: str, number: int) -> str:
    """The instruction with sources 16 to 31, which nothing writes, and a target of 0 to 7, or of
    8 to 15 where the target is a source, too."""
    accumulates = mnemonic.startswith(ACCUMULATES) or "{%k" in operands
    target = 8 + number % 8 if accumulates else number % 8
    renamed = []
    parts = re.split(r",(?![^(]*\))", operands)
    for i, operand in enumerate(parts):
        last = i == len(parts) - 1
        register = re.search(r"%([xyz])mm\d+", operand)
        suffix = "".join(re.findall(r"\{[^}]*\}", operand))
        if register:
            which = target if last else 16 + (number + i) % 16
            renamed.append(f"%{register.group(1)}mm{which}{suffix}")
        elif operand.startswith("%k"):
            renamed.append("%k2" if last else "%k1")
        elif operand.startswith("%"):
            wide = re.fullmatch(r"%r([a-z]{2}|\d+)", operand)
            renamed.append("%rax" if wide else "%eax")
        elif "(" in operand:
            renamed.append(f"{64 * (number % 8)}({'%rsi' if last else '%rdi'}){suffix}")
        else:
            renamed.append(operand)
    masked = re.sub(r"\{%k\d\}", "{%k1}", ", ".join(renamed))
    return f"{SAME.get(mnemonic, mnemonic)} {masked}"


PROGRAM = """
#include <algorithm>
#include <chrono>
#include <cstdio>
alignas(4096) static float in[1024], out[2048];
extern "C" void piece(const void*, void*);
extern "C" void additions();
template <class F> double best(const F& f) {
  double seconds = 1;
  for (int run = 0; run < 200; ++run) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < 200; ++i) f();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    seconds = std::min(seconds, took.count() / 200);
  }
  return seconds;
}
int main() {
  std::fill(in, in + 1024, 1.0f);
  const double cycle = best(additions) / 1024;
  std::printf("%g %g\\n", best([] { piece(in, out + 512); }) / cycle, cycle);
}
"""


def assembly(piece: list[tuple[str, str]]) -> str:
    # Ones everywhere: nothing overflows or leaves the normal range.
    ones = ["mov $0x3f800000, %eax", *(f"vpbroadcastd %eax, %zmm{i}" for i in range(32))]
    body = [unchained(*instruction, i) for i, instruction in enumerate(piece)]
    lines = [".text", ".globl piece, additions", "piece:", "mov $-1, %eax", "kmovd %eax, %k1"]
    lines += [*ones, *body, "vzeroupper", "ret", "additions:", "mov $128, %ecx"]
    lines += ["1:", *["add $1, %rax"] * 8, "dec %ecx", "jnz 1b", "ret"]
    return "\n".join([*lines, '.section .note.GNU-stack,"",@progbits', ""])


def time_piece(piece: list[tuple[str, str]]) -> tuple[float, float]:
    """Cycles of the piece, and the seconds of a cycle."""
    with tempfile.TemporaryDirectory() as folder:
        main, code, program = (pathlib.Path(folder, n) for n in ("main.cpp", "piece.s", "timing"))
        main.write_text(PROGRAM)
        code.write_text(assembly(piece))
        subprocess.run(["g++", "-O2", main, code, "-o", program], check=True)
        runs = [subprocess.run([program], capture_output=True, text=True, check=True) for _ in range(RUNS)]
    cycles, cycle = zip(*(map(float, run.stdout.split()) for run in runs))
    return min(cycles), min(cycle)


def row(program: pathlib.Path, code: dict[int, tuple[str, str]], kernel: list[str]) -> str:
    some, few = trace([str(program), *kernel, "--trace", "1"])
    twice, many = trace([str(program), *kernel, "--trace", "2"])
    counts = collections.Counter(twice)
    counts.subtract(some)
    per_32 = 32 / (many - few)
    vectors = per_32 * sum(n for a, n in counts.items() if is_vector(code.get(a, ELSEWHERE)))
    sequence = [code[a] for a in twice if is_vector(code.get(a, ELSEWHERE))]
    begin = len(sequence) // 4
    piece = sequence[begin : begin + min(len(sequence) // 2, PIECE)]
    cycles, cycle = time_piece(piece)
    unwaiting = cycles / len(piece) * vectors
    seconds = [
        float(subprocess.run([program, *kernel], capture_output=True, text=True, check=True).stdout)
        for _ in range(RUNS)
    ]
    from_l1 = 32 * statistics.quantiles(seconds)[0] / cycle
    return (
        f"| {' '.join(kernel)} | {vectors:.0f} | {unwaiting:.0f} | {from_l1:.0f} | {100 * unwaiting / from_l1:.0f} % |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(KERNELS)}")
    parser.add_argument("--build", default="build", type=pathlib.Path, help="the build folder")
    arguments = parser.parse_args()
    program = (arguments.build / "bench" / "bench_small_kernel").resolve()
    if not program.exists():
        parser.error(f"{program} is missing: configure with -DGDN_BENCH=ON and build it")
    if "avx512f" not in pathlib.Path("/proc/cpuinfo").read_text():
        parser.error("this machine has no AVX-512, whose registers the timed pieces use")
    for name in arguments.kernels:
        if name not in KERNELS:
            parser.error(f"unknown kernel {name}; it is one of {', '.join(KERNELS)}")
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    code = disassemble(program)
    print("| kernel | vector instructions | without waiting | from L1 | share |")
    print("|---|---|---|---|---|")
    for name in arguments.kernels or KERNELS:
        for dtype in ("fp32", "bf16"):
            for direction in ("forward", "backward"):
                print(row(program, code, [name, dtype, direction]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
