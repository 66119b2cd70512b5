"""Read machine code of NVIDIA chips: the loops of a kernel, and what they wait for.

A loop over keys that is well pipelined copies the tiles of later steps while it multiplies. Its
copies (LDGSTS) are put together into groups (LDGDEPBAR), and `DEPBAR.LE SB0, n` waits until at most
the n youngest groups are under way: a wait for 0 on top of a loop means that nothing is in flight
while the first product runs.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)$")
LABEL = re.compile(r"^(\.L_x_\d+):")
TARGET = re.compile(r"\.L_x_\d+")
WAIT = re.compile(r"SB0, 0x([0-9a-f]+)")

PRODUCTS = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "IGMMA", "IMMA")
"""Matrix instructions of sm_80, sm_90 and sm_100: on 16-bit numbers, and the last two on 8-bit."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One machine instruction: its address, its name with modifiers, and its operands as text."""

    address: int
    name: str
    operands: str

    def of(self, *names: str) -> bool:
        """Whether the instruction is one of `names`, whatever its modifiers."""
        return self.name.split(".")[0] in names


@dataclass(frozen=True, slots=True)
class Loop:
    """The body of an innermost loop that multiplies matrices, in the order of its addresses."""

    body: tuple[Instruction, ...]

    @property
    def products(self) -> int:
        """Matrix instructions of one step."""
        return sum(i.of(*PRODUCTS) for i in self.body)

    @property
    def copies(self) -> int:
        """Asynchronous copies from global to shared memory that a thread starts in one step."""
        return sum(i.of("LDGSTS", "UTMALDG") for i in self.body)

    @property
    def spills(self) -> int:
        """Registers that a step stores to local memory or loads from there."""
        return sum(i.of("STL", "LDL") for i in self.body)

    @property
    def waits(self) -> tuple[int, ...]:
        """For each wait for copies, how many groups of them may still be under way after it."""
        return tuple(
            int(found[1], 16)
            for i in self.body
            if i.of("DEPBAR") and (found := WAIT.search(i.operands))
        )

    @property
    def chains(self) -> tuple[int, ...]:
        """How many products each batch of a warp group holds, on sm_90.

        Ones mean that they are serialized: each is waited for before the next one is started.
        """
        batches: list[int] = []
        for i in self.body:
            if i.name == "WARPGROUP.ARRIVE":
                batches.append(0)
            elif i.of("HGMMA", "IGMMA") and batches:
                batches[-1] += 1
        return tuple(batches)


def disassemble(cubin: bytes) -> tuple[Instruction | str, ...]:
    """Instructions and labels of a cubin's code, by the nvdisasm that comes with Triton."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run(
            [knobs.nvidia.nvdisasm.path, "-c", str(path)],
            capture_output=True,
            text=True,
            check=True,
        )
    return parse(done.stdout)


def parse(listing: str) -> tuple[Instruction | str, ...]:
    """Instructions and labels of a listing of nvdisasm, in order."""
    lines: list[Instruction | str] = []
    for line in listing.splitlines():
        if label := LABEL.match(line):
            lines.append(label[1])
        elif found := INSTRUCTION.match(line):
            lines.append(Instruction(int(found[1], 16), found[2], found[3].rstrip(" ;}")))
    return tuple(lines)


def product_loops(lines: tuple[Instruction | str, ...]) -> list[Loop]:
    """The innermost loops that multiply matrices, in the order of the code."""
    places = {line: place for place, line in enumerate(lines) if isinstance(line, str)}
    spans = []
    for place, line in enumerate(lines):
        if isinstance(line, Instruction) and line.of("BRA"):
            target = TARGET.search(line.operands)
            start = places.get(target[0], place) if target else place
            if start < place:
                spans.append((start, place))
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    loops = [
        Loop(tuple(line for line in lines[start : stop + 1] if isinstance(line, Instruction)))
        for start, stop in inner
    ]
    return [loop for loop in loops if loop.products]
