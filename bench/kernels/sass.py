"""Read a kernel's machine code (SASS): its instructions, the blocks between its branches, and its loops."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([^;]*);", re.MULTILINE)
_LEAVING = ("BRA", "EXIT", "RET")
_GOING = ("BRA", "CALL")  # somewhere else, by an address; a call may come back, or be no more than a branch
_CONDITION = re.compile(r"BRA\S*\s+(!?U?P\d|U?R\d)")  # an argument of the branch, not before it


class Instruction(NamedTuple):
    """One line of machine code."""

    address: int
    opcode: str  # with its modifiers, without a predicate
    conditional: bool  # whether it happens only if a predicate holds
    target: int | None  # of a branch or a call

    @property
    def ends_a_block(self) -> bool:
        return self.opcode.startswith((*_LEAVING, *_GOING))

    @property
    def goes_on(self) -> bool:
        """Whether the next line may run after this one."""
        return self.conditional or not self.opcode.startswith(_LEAVING)


class Block(NamedTuple):
    """Instructions that run one after the other."""

    instructions: Sequence[Instruction]
    following: frozenset[int]  # numbers of the blocks that may run next


def disassembly(cubin: Path) -> str:
    """Returns a cubin's machine code as text; raises CalledProcessError where cuobjdump refuses the file."""
    return subprocess.run([CUOBJDUMP, "--dump-sass", cubin], capture_output=True, text=True, check=True).stdout


def instructions_of(text: str) -> list[Instruction]:
    """Returns the instructions of a disassembly, without the padding behind the last one."""
    found = []
    for address, predicate, code in _LINE.findall(text):
        opcode = code.split()[0]
        target = re.search(r"0x([0-9a-f]+)", code) if opcode.startswith(_GOING) else None
        conditional = bool(predicate or _CONDITION.match(code))
        found.append(Instruction(int(address, 16), opcode, conditional, int(target[1], 16) if target else None))
    while found and (found[-1].opcode == "NOP" or found[-1].target == found[-1].address):
        found.pop()
    return found


def blocks_of(instructions: Sequence[Instruction]) -> list[Block]:
    """Returns the blocks of a kernel; it begins with the first."""
    place = {one.address: index for index, one in enumerate(instructions)}
    targets = {place[one.target] for one in instructions if one.target in place}
    behind = {index + 1 for index, one in enumerate(instructions) if one.ends_a_block}
    bounds = sorted({0, len(instructions)} | targets | behind)
    number = {start: block for block, start in enumerate(bounds[:-1])}
    found = []
    for start, end in pairwise(bounds):
        last = instructions[end - 1]
        following = {number[place[last.target]]} if last.target in place else set()
        if end in number and last.goes_on:
            following.add(number[end])
        found.append(Block(instructions[start:end], frozenset(following)))
    return found


def loops_of(blocks: Sequence[Block]) -> list[frozenset[int]]:
    """Returns the blocks of each loop, inner loops' too. A loop comes back to the one block that leads into it."""
    before: list[list[int]] = [[] for _ in blocks]
    for number, block in enumerate(blocks):
        for following in block.following:
            before[following].append(number)
    loops: dict[int, set[int]] = {}
    for head, tails in enumerate(before):
        for tail in tails:
            body, waiting = {head}, [tail]
            while waiting:
                earlier = waiting.pop()
                if earlier not in body:
                    body.add(earlier)
                    waiting += before[earlier]
            if head == 0 or 0 not in body:  # else the tail can be reached past the head, and this is no way back
                loops.setdefault(head, set()).update(body)
    return [frozenset(body) for body in loops.values()]
