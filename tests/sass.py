"""Reads the machine code of GPU kernels, and finds faults in it that no result would show."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True)
class MachineCode:
    """What the assembler made of a kernel."""

    registers: int
    stack: int
    local: int
    instructions: list[str]  # opcodes with their suffixes
    in_loops: list[str]  # those of them inside a loop
    in_flight: list[int]  # of each global load in a loop within a loop: how many instructions on is its first reader

    def matching(self, pattern: str) -> list[str]:
        return [op for op in self.instructions if re.fullmatch(pattern, op)]


def find_tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: of Triton's wheel, which carries them, or on PATH."""
    triton = importlib.util.find_spec("triton")
    carried = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name if triton else None
    return str(carried) if carried and carried.is_file() else shutil.which(name)


def read(cubin: Path) -> dict[str, MachineCode]:
    """The kernels of a cubin file, by their (mangled) names."""
    usage = re.findall(r"Function (\w+):\s*REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", _run("cuobjdump", "-res-usage", cubin))
    parts = re.split(r"^\.text\.(\w+):$", _run("nvdisasm", "-c", cubin), flags=re.MULTILINE)
    listings = dict(zip(parts[1::2], parts[2::2], strict=True))
    return {
        name: MachineCode(int(registers), int(stack), int(local), *_instructions(listings[name]))
        for name, registers, stack, local in usage
    }


def _run(name: str, *arguments: object) -> str:
    return subprocess.run([find_tool(name), *arguments], check=True, capture_output=True, text=True).stdout


def _instructions(listing: str) -> tuple[list[str], list[str], list[int]]:
    """Opcodes, those between a label and a branch back to it, and how long loads are in flight."""
    opcodes: list[str] = []
    texts: list[str] = []
    labels: dict[str, int] = {}
    loops: dict[str, int] = {}  # the last branch back to a label
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x?_?\d+):", line.strip()):
            labels[label[1]] = len(opcodes)
        elif opcode := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            opcodes.append(opcode[1])
            texts.append(line.split("*/", 1)[1].strip())
            if (target := _branch(texts[-1])) in labels:
                loops[target] = len(opcodes)
    depth = [0] * len(opcodes)
    for label, end in loops.items():
        for i in range(labels[label], end):
            depth[i] += 1
    loads = [i for i, op in enumerate(opcodes) if re.match(r"LDG\b", op) and depth[i] > 1]
    return opcodes, [op for i, op in enumerate(opcodes) if depth[i]], [_flight(texts, labels, i) for i in loads]


@lru_cache(1 << 15)
def _branch(text: str) -> str | None:
    target = re.search(r"\bBRA\b.*`\((\.L_x?_?\d+)\)", text)
    return target[1] if target else None


@lru_cache(1 << 15)
def _registers(text: str) -> frozenset[int]:
    """What an instruction reads."""
    opcode, _, operands = re.sub(r"^@!?U?P\w+\s+", "", text).partition(" ")
    if not re.match("ST|RED|ATOM", opcode):  # else the first operand is written
        operands = operands.partition(",")[2]
    words = {".64": 2, ".128": 4}
    wide = next((n for suffix, n in words.items() if suffix in opcode), 1) if opcode.startswith("ST") else 1
    found = re.findall(r"\bR(\d+)(\.64)?", operands)
    return frozenset(int(r) + i for r, two in found for i in range(2 if two else wide))


def _flight(texts: list[str], labels: dict[str, int], load: int) -> int:
    """How many instructions come before the first that reads what was loaded: loops go round, and no other branch that
    is conditional is taken."""
    suffixes, first = re.search(r"LDG(\S*)\s+(?:U?P\w+,\s*)?R(\d+|Z)", texts[load]).groups()
    words = 4 if ".128" in suffixes else 2 if ".64" in suffixes else 1
    loaded = {int(first) + i for i in range(words)} if first != "Z" else set()
    at, passed = load + 1, 0
    while passed < len(texts) and at < len(texts) and not loaded & _registers(texts[at]):
        target = labels.get(_branch(texts[at]) or "")
        conditional = texts[at].startswith("@") or re.search(r"BRA\S*\s+!?U?P\d", texts[at])
        at = target if target is not None and (target <= at or not conditional) else at + 1
        passed += 1
    return passed


def spilled(code: MachineCode) -> str | None:
    if code.stack or code.local or code.matching(r"(LDL|STL)\b.*"):
        return f"{code.registers} registers, {code.stack} bytes of stack, {code.local} bytes of local memory"
    return None


def loses_nan(code: MachineCode) -> str | None:
    lossy = [op for op in code.matching(r"(FMNMX|HMNMX|VHMNMX).*") if ".NAN" not in op]
    return ", ".join(dict.fromkeys(lossy)) or None


def narrow(code: MachineCode, bits: int = 128) -> str | None:
    """Accesses of fewer ``bits``. Activations are what is loaded and stored in loops; vectors of channels are read and
    written around them."""
    accesses = [op for op in code.in_loops if re.match(r"(LDG|LDGSTS|STG)\b", op)]
    wide = {128: r".*\.(128|ENL2\.256)", 64: r".*\.(64|128|ENL2\.256)", 32: r"(?!.*\.[US](8|16)\b)"}
    narrower = [op for op in accesses if not re.match(wide[bits], op)]
    if narrower:
        return ", ".join(dict.fromkeys(narrower))
    kinds = {op[:3] for op in accesses}
    return None if kinds == {"LDG", "STG"} else f"loads and stores wanted in the loop: {sorted(kinds)}"
